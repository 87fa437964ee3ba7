# SPDX-License-Identifier: Apache-2.0
"""The stream of bits: golden bytes, the round trip, a plain-Python reading of it."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from cofire.ops.packing import pack_bits, packed_bytes, unpack_bits
from laws import given, settings, st


def as_stream(row, bits):
    """The bytes of one row, by Python's integers."""
    total = sum(int(value) << (bits * j) for j, value in enumerate(row))
    return list(total.to_bytes(packed_bytes(len(row), bits), "little"))


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), count=st.integers(0, 41), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=200)
def test_round_trip(bits, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)
    packed = pack_bits(labels, bits)
    assert packed.shape == (rows, packed_bytes(count, bits))
    assert packed.tolist() == [as_stream(row, bits) for row in labels]
    assert torch.equal(unpack_bits(packed, bits, count), labels)


def test_golden_bytes():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    assert pack_bits(labels, 3).tolist() == [0b10001000, 0b11000110, 0b11111010]
    assert pack_bits(labels, 4).tolist() == [0x10, 0x32, 0x54, 0x76]
    assert pack_bits(labels % 2, 1).tolist() == [0b10101010]
    assert pack_bits(labels, 8).tolist() == labels.tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_strides_and_dimensions(bits):
    labels = torch.randint(0, 1 << bits, (5, 3, 11), dtype=torch.uint8)
    for view in (labels, labels[:, :, ::2], labels.transpose(0, 2), labels[0, 0]):
        packed = pack_bits(view, bits)
        assert packed.is_contiguous()
        assert torch.equal(unpack_bits(packed, bits, view.shape[-1]), view)
        wide = torch.stack([packed, packed], -1)[..., 0]
        assert torch.equal(unpack_bits(wide, bits, view.shape[-1]), view)


def test_the_result_is_no_view():
    packed = torch.arange(4, dtype=torch.uint8)
    unpack_bits(packed, 8, 4).zero_()
    assert packed.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_it_compiles(bits):
    packed = pack_bits(torch.randint(0, 1 << bits, (3, 10), dtype=torch.uint8), bits)
    compiled = torch.compile(unpack_bits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed, bits, 10), unpack_bits(packed, bits, 10))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: pack_bits(x, 0), ValueError, "pack_bits: bits must be between 1 and 8, got 0"),
        (lambda x: pack_bits(x, 2.0), TypeError, "pack_bits: bits must be an integer, got 2.0"),
        (lambda x: pack_bits(x.int(), 2), TypeError, "pack_bits: labels must be uint8, got torch.int32"),
        (lambda x: pack_bits(x, 2), ValueError, r"labels must be less than 4 \(2 bits\), got 9"),
        (lambda x: pack_bits(x[0], 4), ValueError, r"labels must have at least one dimension, got shape \[\]"),
        (lambda x: unpack_bits(x, 9, 1), ValueError, "unpack_bits: bits must be between 1 and 8, got 9"),
        (lambda x: unpack_bits(x, 3, 9), ValueError, r"9 values of 3 bits take 4 bytes, got \[3\]"),
        (lambda x: unpack_bits(x, 3, 9.0), TypeError, "unpack_bits: count must be an integer, got 9.0"),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.tensor([1, 2, 9], dtype=torch.uint8))


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(importlib.import_module("cofire.ops.packing"))
    assert results.attempted > 0 and results.failed == 0
