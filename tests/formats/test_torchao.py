# SPDX-License-Identifier: Apache-2.0
"""torchao's 4 bits: its own tensors, torch's packer, tiles by the definition of the kernel, there and back, refusals."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cofire.formats import from_torchao, to_torchao
from cofire.formats.torchao import _from_blocks, _to_blocks
from cofire.ops import QTensor, quantize_weight
from helpers import check_examples

GOLDEN = load_file(Path(__file__).with_name("golden") / "torchao.safetensors")


def golden(name):
    return {k.split("/")[1]: v for k, v in GOLDEN.items() if k.startswith(f"{name}/")}


def same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def tensors(rows, columns, group, layout="tile_packed_to_4d", dtype=torch.bfloat16):
    groups = columns // group
    if layout == "plain":
        qdata = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
        return {"qdata": qdata, **{n: torch.randn(groups, rows).to(dtype) for n in ("scale", "zero_point")}}
    both = torch.randn(groups, rows, 2).to(dtype)
    if layout == "cpu":
        return {"qdata": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8), "scale_and_zero": both}
    qdata = torch.randint(-(2**31), 2**31, (rows // 8, columns // 128, 32, 4)).int()
    return {"qdata": qdata, "scale_and_zero": both}


def decode(codes, scale, zero, group):
    """(q - 8) * s + z in fp32; the product is exact."""
    s, z = (x.float().t().repeat_interleave(group, 1) for x in (scale, zero))
    return ((codes.float() - 8) * s + z).to(scale.dtype)


# ------------------------------------------------------------------------------------------------ tiles


def test_tiles_are_read_as_the_kernel_writes_them():
    """What lane t of a tile holds, by the indices of ``matrix_to_m16n8k16_Bint4_layout`` (torch, ``int4mm.cu``)."""
    t = tensors(16, 2048, 64)
    codes = torch.full((16, 2048), -1)
    for n_tile in range(2):
        for k_tile in range(16):
            for lane in range(32):
                for inner in range(0, 8, 2):
                    word = int(t["qdata"][n_tile, k_tile, lane, inner // 2])
                    first = (k_tile * 8 + inner) * 16 + lane % 4 * 2
                    k = [first, first + 1, first + 8, first + 9, first + 16, first + 17, first + 24, first + 25]
                    for field, v in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                        codes[n_tile * 8 + lane // 4, k[v]] = word >> 4 * field & 15
    q = from_torchao(t, (16, 2048))
    assert torch.equal(q.unpack().long(), codes)
    assert torch.equal(q.dequantize(), decode(codes, *t["scale_and_zero"].unbind(-1), 64))
    same(to_torchao(q), t)


def test_tiles_are_filled_up_as_torchao_does_it():
    """Its own codes and scales of a weight [5, 96], which it fills up to [8, 1024] before it quantises."""
    g = golden("tiles")
    scale, offset = (x[:3, :5].t().contiguous() for x in g["scale_and_zero"].unbind(-1))
    zero = torch.full((1, 1), 8, dtype=torch.uint8)
    q = QTensor.from_codes(g["codes"][:5, :96], scale, bits=4, zero=zero, offset=offset, dtype=torch.bfloat16)
    out = to_torchao(q)
    assert torch.equal(out["scale_and_zero"], g["scale_and_zero"])
    assert torch.equal(from_torchao(out, (8, 1024)).unpack(), g["codes"])
    back = from_torchao(out, (5, 96))
    assert torch.equal(back.unpack(), g["codes"][:5, :96]) and torch.equal(back.scale, scale)
    # torchao's own function decodes in bf16, and rounds the product as well; its kernels and ours do not.
    s, z = (x.repeat_interleave(32, 1) for x in (scale, offset))
    assert torch.equal((back.unpack().bfloat16() - 8) * s + z, g["decoded"])
    assert torch.equal(back.dequantize(), ((back.unpack().float() - 8) * s.float() + z.float()).bfloat16())


# ------------------------------------------------------------------------------------------------ cpu


@pytest.mark.parametrize("name", ["cpu_a", "cpu_b"])
def test_its_own_tensors_decode_to_what_torch_multiplies_with_and_come_back(name):
    g = golden(name)
    decoded = g.pop("decoded")
    q = from_torchao(g, decoded.shape, "cpu", capability="AVX2")
    assert q.dtype == decoded.dtype
    scale, zero = (x.double().t().repeat_interleave(q.group_size, 1) for x in g["scale_and_zero"].unbind(-1))
    exact = (q.unpack().double() - 8) * scale + zero
    assert torch.equal(exact.float().to(q.dtype), decoded)  # one rounding
    if q.dtype == torch.bfloat16:
        assert torch.equal(q.dequantize(), decoded)
    else:  # the product is rounded too
        bound = 2**-24 * ((exact - zero).abs() + exact.abs())
        assert bool(((q.dequantize().double() - exact).abs() <= bound).all())
    same(to_torchao(q, capability="AVX2"), g)


SIZES = (16, 32, 48, 64, 80, 144)
PACK = """
import torch
print(torch.backends.cpu.get_cpu_capability())
for rows in (16, 32, 48, 64, 80, 144):
    codes = torch.arange(rows * 12).view(-1, 12) * 7 % 16
    print(*torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).flatten().tolist())
"""


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_torch_packs_the_same(capability):
    """torch's own packer, under each instruction set that this machine can run, or pretend to."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
    found = subprocess.run([sys.executable, "-c", PACK], env=environment, capture_output=True, text=True)
    if found.returncode == -signal.SIGILL:
        pytest.skip(f"needs a machine with {capability}")
    assert found.returncode == 0, found.stderr
    here, *lines = found.stdout.splitlines()
    if here != capability:
        pytest.skip(f"needs a machine with {capability}, this one has {here}")
    for rows, line in zip(SIZES, lines, strict=True):
        codes = (torch.arange(rows * 12).view(-1, 12) * 7 % 16).to(torch.uint8)
        packed = torch.tensor([int(v) for v in line.split()], dtype=torch.uint8)
        assert torch.equal(_to_blocks(codes, capability).flatten(), packed)
        assert torch.equal(_from_blocks(packed, rows, 12, capability), codes)


@pytest.mark.parametrize(("capability", "size", "apart"), [("AVX512", 64, 32), ("AVX2", 32, 16), ("DEFAULT", 32, 1)])
def test_blocks_by_their_definition(capability, size, apart):
    """Column by column; in a full block rows r and r + apart share a byte, in what is left neighbours."""
    rows, columns = 80, 4
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8)
    out = []
    for first in range(0, rows, size):
        block = codes[first : first + size].tolist()
        for k in range(columns):
            if len(block) < size or apart == 1:
                pairs = [(r, r + 1) for r in range(0, len(block), 2)]
            else:
                pairs = [(r, r + apart) for r in range(apart)]
            out += [block[low][k] | block[high][k] << 4 for low, high in pairs]
    packed = _to_blocks(codes, capability)
    assert packed.flatten().tolist() == out
    assert torch.equal(_from_blocks(packed, rows, columns, capability), codes)


def test_live():
    opaque = pytest.importorskip("torchao.prototype.quantization.int4.int4_opaque_tensor")
    weight = torch.randn(48, 128, dtype=torch.bfloat16)
    theirs = opaque.Int4OpaqueTensor.from_hp(weight, [1, 32])
    t = {"qdata": theirs.qdata, "scale_and_zero": theirs.scale_and_zero}
    q = from_torchao(t, weight.shape, "cpu")
    x = torch.eye(128, dtype=torch.bfloat16)
    assert torch.equal(torch.nn.functional.linear(x, theirs).t(), q.dequantize())
    same(to_torchao(q), t)


# ------------------------------------------------------------------------------------------------ all


def test_plain_is_read_bit_by_bit():
    t = tensors(6, 64, 32, "plain")
    q = from_torchao(t, (6, 64), "plain")
    w = torch.empty(6, 64)
    for n in range(6):
        for k in range(64):
            byte = int(t["qdata"][n, k // 2]) & 255
            nibble = byte >> 4 * (k % 2) & 15
            signed = nibble - 16 * (nibble > 7)
            w[n, k] = signed * t["scale"][k // 32, n].float() + t["zero_point"][k // 32, n].float()
    assert torch.equal(q.dequantize(), w.bfloat16())
    same(to_torchao(q), t)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    layout=st.sampled_from(["tile_packed_to_4d", "plain", "cpu"]),
    capability=st.sampled_from(["AVX512", "AVX2", "DEFAULT"]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_there_and_back(rows, columns, group, layout, capability, seed):
    torch.manual_seed(seed)
    n, k = {"plain": (rows, 128 * columns), "cpu": (16 * rows, 128 * columns)}.get(layout, (8 * rows, 1024 * columns))
    t = tensors(n, k, group, layout)
    same(to_torchao(from_torchao(t, (n, k), layout, capability=capability), capability=capability), t)


@pytest.mark.parametrize("layout", ["tile_packed_to_4d", "plain", "cpu"])
@pytest.mark.parametrize("method", ["absmax", "minmax", "hqq"])
def test_what_our_quantisers_make_goes_out(layout, method):
    q = quantize_weight(torch.randn(16, 256), method, bits=4, group_size=64)
    again = from_torchao(
        to_torchao(q, layout, dtype=torch.float32, capability="AVX2"), q.shape, layout, capability="AVX2"
    )
    assert torch.equal(again.unpack(), q.unpack()) and torch.equal(again.scale, q.scale)
    assert torch.equal(again.offset, (8 - q.zero.float().expand(16, 4)) * q.scale)
    if method == "absmax":
        assert torch.equal(again.dequantize(), q.dequantize())
    rounded = from_torchao(to_torchao(q, layout, capability="AVX2"), q.shape, layout, capability="AVX2")
    assert torch.equal(rounded.scale, q.scale.bfloat16()) and rounded.dtype == torch.bfloat16


def test_from_one_layout_to_the_other():
    q = from_torchao(tensors(16, 1024, 32), (16, 1024))
    for layout in ("plain", "cpu"):
        t = to_torchao(q, layout, capability="AVX2")
        other = from_torchao(t, q.shape, layout, capability="AVX2")
        assert torch.equal(other.dequantize(), q.dequantize()) and other.format == f"torchao-{layout}"


def own(rows=16, columns=64, bits=4, group=64, **parts):
    codes = torch.randint(1 << bits, (rows, columns))
    return QTensor.from_codes(codes, torch.ones(rows, columns // group), bits=bits, **parts)


def changed(**changes):
    return {**tensors(8, 1024, 64), **changes}


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: from_torchao({}, (8, 1024)), KeyError, "qdata"),
        (lambda: from_torchao(changed(), (8, 1024, 1)), ValueError, r"shape must be \[N, K\]"),
        (
            lambda: from_torchao(changed(), (8, 1024), "marlin"),
            ValueError,
            "layout must be one of tile_packed_to_4d, plain",
        ),
        (lambda: from_torchao(changed(), (9, 1024)), ValueError, r"scale_and_zero must have shape \[any, 16, 2\]"),
        (lambda: from_torchao(changed(), (8, 1025)), ValueError, "groups must divide the 1025 columns"),
        (
            lambda: from_torchao(changed(qdata=torch.zeros(1, 8, 32, 4)), (8, 1024)),
            TypeError,
            "qdata must be torch.int32",
        ),
        (
            lambda: from_torchao(changed(qdata=torch.zeros(1, 8, 32, 2).int()), (8, 1024)),
            ValueError,
            "qdata must have shape",
        ),
        (
            lambda: from_torchao(changed(scale_and_zero=torch.full((16, 8, 2), torch.nan)), (8, 1024)),
            ValueError,
            "scale must be finite, got 128",
        ),
        (
            lambda: from_torchao(tensors(16, 64, 32, "cpu"), (16, 64), "cpu", capability="NEON"),
            ValueError,
            "capability must be",
        ),
        (lambda: to_torchao(own(bits=3)), ValueError, "the format has 4 bits, got 3"),
        (lambda: to_torchao(own(lut=torch.zeros(1, 16))), ValueError, "no place for tables"),
        (lambda: to_torchao(own(rows=8), "cpu"), ValueError, "cpu needs a multiple of 16 rows, got 8"),
        (
            lambda: to_torchao(own(columns=63, group=63), "plain"),
            ValueError,
            "plain needs an even number of columns, got 63",
        ),
        (lambda: to_torchao(own(columns=96, group=96)), ValueError, "groups of 96 columns must divide 1024"),
        (
            lambda: to_torchao(own().replace(scale=torch.full((16, 1), 1e6)), dtype=torch.float16),
            ValueError,
            "scale must fit",
        ),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_the_examples_of_the_docstrings():
    check_examples(importlib.import_module("cofire.formats.torchao"))
