# SPDX-License-Identifier: Apache-2.0
"""AWQ: both layouts read bit by bit, random bits there and back, refusals."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cofire.formats import from_awq, to_awq
from cofire.formats.awq import padded_groups
from cofire.ops import QTensor, quantize_weight
from helpers import check_examples

GOLDEN = load_file(Path(__file__).with_name("golden") / "awq.safetensors")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(*shape, dtype=torch.int32):
    half = 1 << (torch.iinfo(dtype).bits - 1)
    return torch.randint(-half, half, shape).to(dtype)


def gemm(rows, columns, group, dtype=torch.float16):
    groups = columns // group
    scales = torch.randn(groups, rows).to(dtype)
    return {"qweight": words(columns, rows // 8), "scales": scales, "qzeros": words(groups, rows // 8)}


def llm_awq(rows, columns, group, full, dtype=torch.float16):
    scales, zeros = (torch.randn(full, rows).to(dtype) for _ in range(2))
    scales[columns // group :] = 0
    zeros[columns // group :] = 0
    return {"qweight": words(rows // 4, columns, dtype=torch.int16), "scales": scales, "scaled_zeros": zeros}


def same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def field(word, n):
    """Output n of the word that holds outputs 8 c to 8 c + 7."""
    return (int(word) >> 4 * ORDER.index(n % 8)) & 15


def golden(name):
    return {k.split("/")[1]: v for k, v in GOLDEN.items() if k.startswith(f"{name}/")}


@pytest.mark.parametrize("group", [64, 128])
def test_autoawq_own_layers_decode_to_what_it_decodes_and_come_back(group):
    first, second = golden(f"gemm_{group}"), golden(f"fast_{group}")
    decoded, codes = first.pop("decoded"), second.pop("codes")
    q, other = from_awq(**first), from_awq(**second, group_size=group)
    assert torch.equal(q.dequantize()[: len(decoded)], decoded)
    assert torch.equal(q.unpack(), codes) and torch.equal(other.unpack(), codes)
    assert torch.equal(q.scale, other.scale) and torch.equal(other.offset, -(q.scale.float() * q.zero.float()).half())
    same(to_awq(q), first)
    renamed = {"scaled_zeros": second.pop("qzeros"), **second}
    same(to_awq(other), renamed)
    same(to_awq(q, "llm-awq"), renamed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemm_is_read_bit_by_bit(dtype):
    t = gemm(16, 64, 32, dtype)
    q = from_awq(**t)
    w = torch.empty(16, 64, dtype=torch.float64)
    for n in range(16):
        for k in range(64):
            zero = field(t["qzeros"][k // 32, n // 8], n)
            w[n, k] = (field(t["qweight"][k, n // 8], n) - zero) * float(t["scales"][k // 32, n])
    assert torch.equal(q.dequantize(), w.to(dtype))
    same(to_awq(q), t)


def test_llm_awq_is_read_bit_by_bit():
    """Forward, as the weights are packed: 32 inputs in steps of 8, each eight even before odd, four outputs per 64 inputs."""
    rows, columns, group = 8, 128, 64
    t = llm_awq(rows, columns, group, 16)
    codes = torch.empty(rows, columns, dtype=torch.long)
    pairs = [8 * a + 2 * b + c for b in range(4) for a in range(4) for c in range(2)]
    order = [pairs[8 * e + i] for e in range(4) for i in ORDER]
    for n in range(rows):
        for k in range(columns):
            place = order.index(k % 32) + k % 64 // 32 * 32  # in the 64 inputs
            nibble = (n % 4) * 64 + place  # in the block of four outputs
            word = int(t["qweight"][n // 4, k // 64 * 64 + nibble // 4])
            codes[n, k] = word >> 4 * (nibble % 4) & 15
    q = from_awq(**t, group_size=group)
    assert torch.equal(q.unpack().long(), codes) and q.zero is None
    scale, offset = (
        t[n][: columns // group].float().repeat_interleave(group, 0).t() for n in ("scales", "scaled_zeros")
    )
    assert torch.equal(q.dequantize(), (codes * scale + offset).half())
    same(to_awq(q), t)


@pytest.mark.parametrize(
    ("columns", "group", "rows"),
    [(4096, 128, 32), (11008, 128, 88), (128, 128, 8), (64, 64, 16), (4096, 32, 128), (64, 32, 32)],
)
def test_the_padding_of_llm_awq(columns, group, rows):
    """Groups by eights, and these by what makes a word of 128 columns."""
    assert padded_groups(columns, group) == rows


@given(
    rows=st.integers(1, 4),
    size=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 5),
    new=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_there_and_back(rows, size, groups, new, seed):
    torch.manual_seed(seed)
    if new and groups * size % 64 == 0:
        t = llm_awq(4 * rows, groups * size, size, padded_groups(groups * size, size))
        same(to_awq(from_awq(**t, group_size=size)), t)
    t = gemm(8 * rows, groups * size, size)
    same(to_awq(from_awq(**t)), t)


@pytest.mark.parametrize("method", ["absmax", "minmax"])
@pytest.mark.parametrize("layout", ["gemm", "llm-awq"])
def test_what_our_quantisers_make_goes_out(method, layout):
    q = quantize_weight(torch.randn(16, 256).half(), method, bits=4, group_size=128)
    again = from_awq(**to_awq(q, layout), group_size=128)
    assert torch.equal(again.unpack(), q.unpack())
    half = q.replace(scale=q.scale.half())
    if layout == "gemm":
        assert torch.equal(again.dequantize(), half.dequantize())
    else:  # the product of scale and zero point is rounded
        expected = -(half.scale.float() * q.zero.expand(16, 2).float())
        assert torch.equal(again.offset, expected.half()) and torch.equal(again.scale, half.scale)


def test_from_one_layout_to_the_other():
    q = from_awq(**gemm(16, 128, 64))
    other = from_awq(**to_awq(q, "llm-awq"), group_size=64)
    assert torch.equal(other.unpack(), q.unpack()) and torch.equal(other.scale, q.scale)
    with pytest.raises(ValueError, match="no place for offsets"):
        to_awq(other, "gemm")


def padding():
    t = llm_awq(8, 128, 64, 16)
    t["scales"][5] = 1
    return t


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: from_awq(words(64, 2), torch.zeros(2, 16)),
            TypeError,
            "one of qzeros .* and scaled_zeros .* must be given",
        ),
        (
            lambda: from_awq(**{**gemm(16, 64, 32), "qzeros": words(2, 3)}),
            ValueError,
            r"qzeros must have shape \[2, 2\]",
        ),
        (lambda: from_awq(**{**gemm(16, 64, 32), "scales": torch.zeros(2, 12)}), ValueError, "multiple of 8 columns"),
        (
            lambda: from_awq(**{**gemm(16, 64, 32), "qweight": words(63, 2)}),
            ValueError,
            "63 columns do not divide into 2",
        ),
        (
            lambda: from_awq(**gemm(16, 64, 32), group_size=64),
            ValueError,
            "64 columns do not divide into 2 groups of 64",
        ),
        (
            lambda: from_awq(**{**gemm(16, 64, 32), "qweight": torch.zeros(64, 2)}),
            TypeError,
            "qweight must be torch.int32",
        ),
        (
            lambda: from_awq(**{**gemm(8, 8, 8), "scales": torch.full((1, 8), torch.nan)}),
            ValueError,
            "scales must be finite",
        ),
        (lambda: from_awq(**llm_awq(8, 128, 64, 16)), TypeError, "group_size must be given for llm-awq"),
        (
            lambda: from_awq(**llm_awq(8, 128, 64, 16), group_size=48),
            ValueError,
            "needs groups of 32, 64, or 128 and more",
        ),
        (lambda: from_awq(**llm_awq(8, 128, 64, 8), group_size=64), ValueError, r"scales must have shape \[16, 8\]"),
        (lambda: from_awq(**padding(), group_size=64), ValueError, "scales must be zero from row 2 on"),
        (lambda: to_awq(weight(bits=3)), ValueError, "the format has 4 bits, got 3"),
        (lambda: to_awq(weight(rows=12)), ValueError, "multiple of 8 rows, got 12"),
        (lambda: to_awq(weight(), "llm-awq"), ValueError, "multiple of 4 rows and of 64 columns"),
        (lambda: to_awq(weight(), "new"), ValueError, "layout must be one of gemm, llm-awq, got 'new'"),
        (lambda: to_awq(weight(zero=torch.full((1, 1), 0.5))), ValueError, "zero points must be integers"),
        (lambda: to_awq(weight(perm=torch.arange(32))), ValueError, "no place for another order of columns"),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def weight(rows=8, columns=32, bits=4, **parts):
    return QTensor.from_codes(torch.randint(1 << bits, (rows, columns)), torch.ones(rows, 1), bits=bits, **parts)


def test_the_examples_of_the_docstrings():
    check_examples(importlib.import_module("cofire.formats.awq"))
