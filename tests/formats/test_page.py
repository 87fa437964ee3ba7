# SPDX-License-Identifier: Apache-2.0
"""``docs/formats.md``: its table is made here, and its examples run.

``python tests/formats/test_page.py`` writes the table.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import cofire.formats
import cofire.nn
from cofire.formats import from_ggml, to_awq, to_bitsandbytes, to_ggml, to_gptq, to_torchao
from cofire.formats.ggml import TYPES
from cofire.ops import NestedScale, QTensor, quantize_weight

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
START, END = "<!-- formats -->\n", "<!-- end of formats -->"
SHAPE = (64, 4096)


def bits(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors) * 8 / (SHAPE[0] * SHAPE[1])


def own(q):
    """Of what grows with the rows."""
    parts = [q.codes, q.zero if q.zero is not None and q.zero.numel() > 1 else q.codes[:0]]
    for x in (q.scale, q.offset):
        parts += [x.codes, x.absmax] if isinstance(x, NestedScale) else [] if x is None else [x]
    return bits(*parts)


def nested_nf4(q):
    """As double quantisation makes it: 8 bits per block, and fp32 per 256 blocks."""
    scale = NestedScale(
        torch.zeros(q.scale.shape, dtype=torch.uint8), torch.zeros(256), torch.zeros(16), torch.tensor(0.0), 256
    )
    return q.replace(scale=scale)


def table():
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).half()
    rows = []

    def row(name, q, tensors, equal):
        rows.append((name, f"{bits(*tensors):.4g}", f"{own(q):.4g}", equal))

    for b in (2, 3, 4, 8):
        q = quantize_weight(weight, "minmax", bits=b, group_size=128)
        q = q.replace(scale=q.scale.half())
        t = to_gptq(q)
        row(
            f"GPTQ, versions 1 and 2, {b} bits, groups of 128",
            q,
            [t["qweight"], t["qzeros"], t["scales"]],
            "AutoGPTQ's",
        )
    q = quantize_weight(weight, "minmax", bits=4, group_size=128)
    q = q.replace(scale=q.scale.half())
    row('AWQ, "gemm", groups of 128', q, to_awq(q).values(), "AutoAWQ's")
    other = cofire.formats.from_awq(**to_awq(q, "llm-awq"), group_size=128)
    row('AWQ, "llm-awq", groups of 128', other, to_awq(other).values(), "(its kernels add in fp16)")
    q = quantize_weight(weight, "nf4", group_size=64)
    for name, x in (("", q), (", nested", nested_nf4(q))):
        data, state = to_bitsandbytes(x)
        tensors = [data, state["absmax"], *([state["nested_absmax"]] if name else [])]
        row(f"bitsandbytes, NF4 and FP4, blocks of 64{name}", x, tensors, "bitsandbytes' on a CPU")
    q = quantize_weight(weight.bfloat16(), "minmax", bits=4, group_size=128)
    for layout in ("tile_packed_to_4d", "plain", "cpu"):
        t = to_torchao(q, layout, capability="AVX2")
        x = cofire.formats.from_torchao(t, SHAPE, layout, capability="AVX2")
        equal = (
            "torch's CPU kernel's, with 16-bit scales" if layout == "cpu" else "not compared: its kernels need a GPU"
        )
        row(f"torchao, int4, {layout}, groups of 128", x, t.values(), equal)
    for kind, t in TYPES.items():
        data = torch.zeros(SHAPE[0] * SHAPE[1] // t.block * t.bytes, dtype=torch.uint8)
        row(f"ggml, {kind}", from_ggml(data, kind, SHAPE), [data], "gguf's")
    q = quantize_weight(weight.float(), "palette", bits=3, group_size=None)
    rows.append(("coremltools, palettes of 1 to 8 bits (3 bits)", "-", f"{own(q):.4g}", "coremltools'"))
    head = ("format", "bits per weight there", "here", "decoded weight is")
    lines = [head, ("---",) * 4, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def test_the_table_is_up_to_date():
    text = PAGE.read_text()
    found = text[text.index(START) + len(START) : text.index(END)]
    assert found == table(), "run python tests/formats/test_page.py"


def examples():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_examples_have_four_lines():
    assert [len(e.strip().splitlines()) for e in examples()] == [4, 4]


def test_the_example_of_a_checkpoint_runs(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    q = quantize_weight(torch.randn(32, 64), "minmax", bits=4, group_size=32)
    save_file({f"model.layers.0.mlp.up_proj.{n}": t for n, t in to_gptq(q).items()}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"safetensors": SimpleNamespace(torch=safetensors), "cofire": cofire, "torch": torch}
    exec(examples()[0], names)
    assert isinstance(names["q"], QTensor) and names["layer"](torch.randn(2, 64)).shape == (2, 32)


def test_the_example_of_gguf_runs(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    q = quantize_weight(torch.randn(8, 64), "absmax", bits=4, group_size=32)
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_tensor("up", to_ggml(q, "Q4_0").numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    names = {"gguf": gguf, "cofire": cofire, "x": torch.randn(2, 64)}
    exec(examples()[1], names)
    assert names["y"].shape == (2, 8) and torch.equal(names["q"].unpack(), q.unpack())


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(START) + len(START)] + table() + text[text.index(END) :])
