# SPDX-License-Identifier: Apache-2.0
"""One layer out of a checkpoint, in each format; imports; the page in the docs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cofire.formats
from cofire.formats import from_checkpoint, to_awq, to_bitsandbytes, to_coreml, to_gptq
from cofire.ops import quantize_weight
from helpers import check_examples

WEIGHT = torch.randn(32, 128).half()


def parts(format):
    """A weight, and the tensors of its layer."""
    if format.startswith("gptq"):
        q = quantize_weight(WEIGHT, "minmax", bits=3, group_size=64)
        return q, to_gptq(q, 2 if format == "gptq_v2" else 1)
    if format == "bitsandbytes":
        q = quantize_weight(WEIGHT, "nf4", group_size=64)
        data, state = to_bitsandbytes(q)
        return q, {"weight": data, **{f"weight.{k}": v for k, v in state.items()}}
    if format == "coreml":
        q = quantize_weight(WEIGHT.float(), "palette", bits=3, group_size=None)
        return q, to_coreml(q)
    q = quantize_weight(WEIGHT, "minmax", bits=4, group_size=64)
    return q, to_awq(q, "gemm" if format == "awq" else "llm-awq")


FORMATS = ["gptq", "gptq_v2", "awq", "llm-awq", "bitsandbytes", "coreml"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prefix", ["model.layers.1.up_proj", ""])
def test_each_format(format, prefix):
    q, tensors = parts(format)
    start = f"{prefix}." if prefix else ""
    state = {start + k: v for k, v in tensors.items()}
    if prefix:
        state |= {"model.layers.11.up_proj.weight": torch.zeros(2), f"{start}bias": torch.zeros(32)}
    size = {"group_size": 64} if format == "llm-awq" else {}
    again = from_checkpoint(state, prefix, format, **size)
    assert torch.equal(again.unpack(), q.unpack()) and again.bits == q.bits and again.shape == q.shape


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_missing_is_named(format):
    _, tensors = parts(format)
    first = "weight" if "weight" in tensors else "scales"
    rest = {f"fc.{k}": v for k, v in tensors.items() if k != first}
    with pytest.raises(ValueError, match=f"the layer 'fc' must have .*, and has no {first}"):
        from_checkpoint(rest, "fc", format)


def test_autoawq_calls_scaled_zeros_otherwise():
    q, tensors = parts("llm-awq")
    tensors["qzeros"] = tensors.pop("scaled_zeros")
    assert torch.equal(from_checkpoint(tensors, "", "llm-awq", group_size=64).unpack(), q.unpack())


def test_refusals():
    with pytest.raises(ValueError, match="format must be one of gptq, gptq_v2, awq, llm-awq, bitsandbytes, coreml"):
        from_checkpoint({}, "fc", "marlin")
    _, tensors = parts("gptq")
    with pytest.raises(ValueError, match="must have 2, 3, 4 or 8 bits, got 1 by its shapes"):
        from_checkpoint({**tensors, "qzeros": tensors["qzeros"][:, :1]}, "", "gptq")


def test_none_of_the_libraries_is_imported():
    names = ("auto_gptq", "gptqmodel", "awq", "bitsandbytes", "torchao", "gguf", "coremltools")
    code = f"import sys, cofire.formats; print([n for n in {names} if n in sys.modules])"
    root = Path(cofire.formats.__file__).parents[2]
    path = f"{root}:{root.parent / 'kernels'}"
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {path.split(':')}; {code}"]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_the_examples_of_the_docstrings():
    check_examples(importlib.import_module("cofire.formats.checkpoint"))
