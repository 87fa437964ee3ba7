# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel is compiled for GPUs that need not be there, and what comes out is inspected."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from cofire_kernels import aot

PACKAGE = Path(aot.__file__).parent
#: The kernels by name, from the sources: importing them here would find them wrapped by the interpreter.
KERNELS = sorted(
    name
    for file in PACKAGE.rglob("*.py")
    for name in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", file.read_text(), re.MULTILINE)
)
STREAMING = [
    "channel_pool_forward_kernel",
    "gated_norm_act_statistics_kernel",
    "gated_norm_act_forward_kernel",
    "gated_norm_act_backward_sums_kernel",
    "gated_norm_act_backward_kernel",
    "histogram16_kernel",
    "scatter16_largest_kernel",
    "scatter16_add_kernel",
    "lut_apply16_kernel",
    "apply_mask_kernel",
    "dequantize_kernel",
    "qlinear_rows_kernel",
    "sum_splits_kernel",
    "row_bytes_kernel",
    "fake_quantize_lsq_kernel",
    "fake_quantize_lsq_backward_kernel",
    "fake_quantize_affine_kernel",
    "fake_quantize_affine_backward_kernel",
    "fake_quantize_minmax_kernel",
    "fake_quantize_minmax_backward_kernel",
    "fake_quantize_statsq_kernel",
    "fake_quantize_group_kernel",
    "moe2_linear_sums_kernel",
    "kv_gather_kernel",
]
#: These check their arguments, and nobody waits for them.
ASSERTING = ["kv_append_kernel", "kv_select_kernel"]
CHIPS = ["sm_90", *(pytest.param(chip, marks=pytest.mark.full) for chip in aot.SHARED_MEMORY if chip != "sm_90")]
NVIDIA = CHIPS[:-1]  # gfx942 comes last


@functools.cache
def compiled(chip: str) -> list[dict[str, Any]]:
    """One process per chip, without the interpreter. One 16-bit type stands for both; fp32 is compiled for sm_90."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), environment.get("PYTHONPATH", "")])
    dtypes = ["bfloat16", "float32"] if chip == "sm_90" else ["bfloat16"]
    command = [sys.executable, "-m", "cofire_kernels.aot", chip, "--dtypes", *dtypes]
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(__file__).parents[1] / ".cache" / "aot"
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / f"{session}-{chip}.json"
    with (folder / f"{chip}.lock").open("w") as file:  # a second worker waits, and then reads what the first one found
        fcntl.flock(file, fcntl.LOCK_EX)
        if not found.exists():
            run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert run.returncode == 0, run.stderr[-2000:]
            for old in folder.glob(f"*-{chip}.json"):
                old.unlink()
            partial = found.with_suffix(".part")
            partial.write_text(run.stdout)
            partial.replace(found)
    return [json.loads(line) for line in found.read_text().splitlines()]


def of(chip: str, kernel: str) -> list[dict[str, Any]]:
    variants = [facts for facts in compiled(chip) if facts["kernel"] == kernel]
    assert variants, f"no call in cofire_kernels/cases.py launches {kernel}: add one"
    return variants


def test_streaming_kernels_exist() -> None:
    assert set(STREAMING) <= set(KERNELS)


@pytest.mark.parametrize("chip", CHIPS)
def test_everything_compiles(chip: str) -> None:
    assert [facts for facts in compiled(chip) if "error" in facts] == []


@pytest.mark.parametrize(
    ("branch", "expected"),
    [("@P0 BRA 0x10", 1), ("BRA.U UP0, 0x10", 1), ("@P0 BRA 0x00", 2), ("@P0 BRA 0x30", 0), ("@P0 BRA 0x60", 0)],
)
def test_an_access_in_a_loop_is_one_that_returns_to_itself(branch: str, expected: int) -> None:
    """What stands behind the end and jumps back into the middle (0x60) is run once."""
    code = ["STL [R1], R2", "LDL R3, [R1]", branch, "MOV R1, R2", "EXIT", "BRA 0x50", "@!P5 BRA 0x60", "BRA 0x30"]
    sass = "\n".join(f"        /*{16 * place:04x}*/        {text} ;   /* 0x0 */" for place, text in enumerate(code))
    assert aot._spills_in_loops(sass) == expected


@pytest.mark.parametrize("chip", NVIDIA)
@pytest.mark.parametrize("kernel", ASSERTING)
def test_what_is_checked_on_the_device(kernel: str, chip: str) -> None:
    """As the launchers compile it; the interpreter does not look at assertions."""
    assert all(facts["asserts"] for facts in of(chip, kernel))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fits_the_chip(kernel: str, chip: str) -> None:
    """Shared memory within the limit of a block, and no register spilled to memory.

    For sm_80 and sm_100, ptxas keeps some values (at most 32 bytes) on the stack from before a loop until after it, and
    gains a step of occupancy: it stops at 64, 96 or 128 registers. That costs nothing, so there only a loop must not touch
    the stack.
    """
    for facts in of(chip, kernel):
        assert facts["shared"] <= aot.SHARED_MEMORY[chip], facts
        if chip == "gfx942":
            spilled = facts["spills"]
        elif chip in ("sm_80", "sm_100"):
            spilled = facts["spills_in_loops"] + max(facts["stack"] - 32, 0) + facts["local"]
        else:
            spilled = facts["stack"] + facts["local"]
        assert spilled == 0, facts


@pytest.mark.parametrize(
    ("kernel", "height"),
    [
        ("gated_conv2d_forward_kernel", None),
        ("qlinear_kernel", None),
        ("qlinear_bytes_kernel", None),
        ("input_gradient_kernel", "BLOCK_M"),
        ("masked_linear_kernel", None),
        ("masked_input_gradient_kernel", "BLOCK_M"),
        ("masked_weight_gradient_kernel", None),
        ("block_product_kernel", "BLOCK_M"),
        ("block_gradient_kernel", "BLOCK_K"),
        ("binary_softmax_attention_kernel", None),
        ("moe2_linear_forward_kernel", None),
        ("moe2_linear_input_gradient_kernel", None),
        ("moe2_linear_weight_gradient_kernel", None),
        ("kv_fuse_forward_kernel", None),
        ("kv_fuse_logits_kernel", None),
        ("kv_fuse_sums_kernel", None),
        ("kv_fuse_logit_gradient_kernel", None),
        ("kv_fuse_weight_gradient_kernel", None),
        ("kv_fuse_token_gradient_kernel", None),
        ("attention_forward_kernel", None),
        ("attention_scores_kernel", None),
        ("attention_query_gradient_kernel", None),
        ("attention_key_gradient_kernel", None),
        ("masked_attention_forward_kernel", None),
    ],
)
def test_products_use_the_tensor_cores_of_hopper(kernel: str, height: str | None) -> None:
    """Where 16-bit floats or bytes are multiplied in tiles of 64; a product of few rows, or small blocks, has none."""
    narrow = [facts for facts in of("sm_90", kernel) if facts["dtype"] == "bfloat16"]
    if height is not None:
        narrow = [facts for facts in narrow if facts["constants"][height] >= 64]
    assert narrow
    assert all(facts["wgmma"] for facts in narrow), narrow


@pytest.mark.parametrize("chip", NVIDIA)
@pytest.mark.parametrize("kernel", STREAMING)
def test_streaming_kernels_load_128_bits(kernel: str, chip: str) -> None:
    for facts in of(chip, kernel):
        if facts["constants"].get("BITS") in (3, 5, 6, 7):
            continue  # 32 codes are so many words: three to seven, which no vector is
        tile = [facts["constants"].get(n, 1) for n in ("BITS", "BLOCK_N", "BLOCK_K")]
        if "BITS" in facts["constants"] and math.prod(tile) // 8 < 16 * 32 * facts["num_warps"]:
            continue  # a tile of fewer than 16 bytes a thread
        assert facts["vector_loads"], facts
