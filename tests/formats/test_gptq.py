# SPDX-License-Identifier: Apache-2.0
"""GPTQ: read bit by bit, words of random bits there and back, activation order, the zero point that wraps, refusals."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cofire.formats import from_gptq, to_gptq
from cofire.nn import QuantLinear
from cofire.ops import QTensor, quantize_weight

GOLDEN = load_file(Path(__file__).with_name("golden") / "gptq.safetensors")


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape).int()


def layer(bits, rows, columns, group, order=False, dtype=torch.float16):
    groups = columns // group
    g_idx = torch.arange(columns) // group
    return {
        "qweight": words(columns * bits // 32, rows),
        "qzeros": words(groups, rows * bits // 32),
        "scales": torch.randn(groups, rows).to(dtype),
        "g_idx": (g_idx[torch.randperm(columns)] if order else g_idx).int(),
    }


def stream(values, i, bits):
    """Field i of a stream of bits in 32-bit words, low bits first."""
    whole = sum((int(v) & 0xFFFFFFFF) << (32 * j) for j, v in enumerate(values))
    return whole >> (bits * i) & ((1 << bits) - 1)


def decode(t, bits, version):
    """The weight, by Python's integers; the product of a 16-bit number and a code is exact in fp64."""
    rows, columns = t["scales"].shape[1], len(t["g_idx"])
    w = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        column = t["qweight"][:, n].tolist()
        for k in range(columns):
            g = int(t["g_idx"][k])
            zero = stream(t["qzeros"][g].tolist(), n, bits)
            zero = (zero + 1) % (1 << bits) if version == 1 else zero
            w[n, k] = (stream(column, k, bits) - zero) * float(t["scales"][g, n])
    return w.to(t["scales"].dtype)


def same(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [False, True])
def test_every_bit_is_read_and_comes_back(bits, version, order):
    t = layer(bits, 32, 96, 32, order)
    q = from_gptq(**t, bits=bits, version=version)
    assert q.shape == (32, 96) and q.group_size == 32 and q.dtype == torch.float16
    assert (q.perm is not None) == order
    assert torch.equal(q.dequantize(), decode(t, bits, version))
    same(to_gptq(q), t)


@pytest.mark.parametrize("name", [f"{bits}{order}" for bits in (2, 3, 4, 8) for order in ("", "_ordered")])
def test_autogptq_own_layers_decode_to_what_it_decodes_and_come_back(name):
    t = {k.split("/")[1]: v for k, v in GOLDEN.items() if k.startswith(f"{name}/")}
    decoded = t.pop("decoded")
    q = from_gptq(**t, bits=int(name[0]))
    assert torch.equal(q.dequantize()[: len(decoded)], decoded) and (q.perm is not None) == ("ordered" in name)
    same(to_gptq(q), t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype):
    t = layer(4, 8, 64, 64, dtype=dtype)
    q = from_gptq(**t, bits=4)
    assert q.dtype == dtype and torch.equal(q.dequantize(), decode(t, 4, 1))
    same(to_gptq(q), t)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    version=st.sampled_from([1, 2]),
    rows=st.integers(1, 3),
    size=st.integers(1, 3),
    groups=st.integers(1, 4),
    order=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_there_and_back(bits, version, rows, size, groups, order, seed):
    torch.manual_seed(seed)
    t = layer(bits, 32 * rows, 32 * size * groups, 32 * size, order)
    same(to_gptq(from_gptq(**t, bits=bits, version=version)), t)


def test_without_g_idx_groups_are_neighbours():
    t = layer(4, 16, 64, 16)
    a, b = from_gptq(**t, bits=4), from_gptq(t["qweight"], t["qzeros"], t["scales"], bits=4)
    assert a.perm is None and torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_zero_point_zero_wraps(bits):
    """Version 1 stores zero - 1: all ones for 0, and read as 0 again, not as 2^bits."""
    top = (1 << bits) - 1
    q = QTensor.from_codes(
        torch.randint(top + 1, (32, 32)),
        torch.ones(32, 1).half(),
        bits=bits,
        zero=torch.zeros(32, 1, dtype=torch.uint8),
    )
    one, two = to_gptq(q, 1), to_gptq(q, 2)
    assert one["qzeros"].eq(-1).all() and two["qzeros"].eq(0).all()
    for t, version in ((one, 1), (two, 2)):
        assert torch.equal(from_gptq(**t, bits=bits, version=version).dequantize(), q.unpack().float())


def test_equal_zero_points_are_kept_once():
    q = from_gptq(**to_gptq(quantize_weight(torch.randn(32, 64).half(), "absmax", bits=4, group_size=32)), bits=4)
    assert q.zero.tolist() == [[8]]


@pytest.mark.parametrize("method", ["absmax", "minmax", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_our_quantisers_make_goes_out(method, bits):
    weight = torch.randn(32, 128)
    q = quantize_weight(weight, method, bits=bits, group_size=64)
    again = from_gptq(**to_gptq(q), bits=bits)
    half = q.replace(scale=q.scale.half(), dtype=torch.float16)  # the only thing that is lost
    assert torch.equal(again.dequantize(), half.dequantize())


def test_activation_order_of_our_gptq_goes_out():
    x = torch.randn(200, 64) * torch.linspace(0.1, 3, 64)
    q = quantize_weight(torch.randn(32, 64).half(), "gptq", bits=4, group_size=16, hessian=x.t() @ x, act_order=True)
    t = to_gptq(q)
    assert torch.bincount(t["g_idx"]).tolist() == [16] * 4 and not torch.equal(t["g_idx"], t["g_idx"].sort().values)
    assert torch.equal(from_gptq(**t, bits=4).dequantize(), q.replace(scale=q.scale.half()).dequantize())


def test_products_take_it():
    q = from_gptq(**layer(4, 32, 96, 32, order=True, dtype=torch.float32), bits=4)
    x = torch.randn(5, 96)
    torch.testing.assert_close(QuantLinear.from_qtensor(q)(x), x @ q.dequantize().t(), rtol=1e-4, atol=1e-3)


def broken(**changes):
    return {**layer(4, 16, 64, 32), **changes}


@pytest.mark.parametrize(
    ("tensors", "bits", "error", "sentence"),
    [
        (lambda: broken(), 5, ValueError, "from_gptq: bits must be 2, 3, 4 or 8, got 5"),
        (lambda: broken(qweight=torch.zeros(8, 16)), 4, TypeError, "qweight must be torch.int32, got torch.float32"),
        (lambda: broken(qweight=words(8, 15)), 4, ValueError, r"qweight must have shape \[any, 16\], got \[8, 15\]"),
        (lambda: broken(qzeros=words(2, 3)), 4, ValueError, r"qzeros must have shape \[2, 2\], got \[2, 3\]"),
        (lambda: broken(qzeros=None), 4, TypeError, "qzeros must be a tensor, got NoneType"),
        (lambda: broken(scales=torch.zeros(2, 12)), 4, ValueError, "the 12 rows of 4 bits must fill words of 32 bits"),
        (lambda: broken(qweight=words(7, 16)), 4, ValueError, "56 columns do not divide into 2 groups|g_idx must have"),
        (lambda: layer(4, 32, 64, 32), 3, ValueError, r"qzeros must have shape \[2, 3\]"),
        (lambda: broken(scales=torch.full((2, 16), torch.inf)), 4, ValueError, "scales must be finite, got 32 values"),
        (lambda: broken(g_idx=torch.zeros(63).int()), 4, ValueError, r"g_idx must have shape \[64\], got \[63\]"),
        (lambda: broken(g_idx=torch.zeros(64)), 4, TypeError, "g_idx must be torch.int32 or torch.int64"),
        (lambda: broken(g_idx=torch.arange(64).int() // 16), 4, ValueError, "g_idx must be in 0 to 1, got 0 to 3"),
        (lambda: broken(g_idx=-torch.ones(64).int()), 4, ValueError, "g_idx must be in 0 to 1, got -1 to -1"),
        (
            lambda: broken(g_idx=(torch.arange(64) > 30).int()),
            4,
            ValueError,
            "g_idx must put 32 columns into each of 2 groups, got 31 to 33",
        ),
    ],
)
def test_refusals_on_the_way_in(tensors, bits, error, sentence):
    with pytest.raises(error, match=sentence):
        from_gptq(**tensors(), bits=bits)


def weight(rows=32, columns=64, bits=4, group=32, **parts):
    codes = torch.randint(1 << bits, (rows, columns))
    return QTensor.from_codes(codes, torch.ones(rows, columns // group), bits=bits, **parts)


@pytest.mark.parametrize(
    ("q", "options", "error", "sentence"),
    [
        (lambda: torch.zeros(2), {}, TypeError, "to_gptq: q must be a QTensor, got Tensor"),
        (lambda: weight(), {"version": 3}, ValueError, "version must be 1 or 2, got 3"),
        (lambda: weight(bits=5), {}, ValueError, "bits must be 2, 3, 4 or 8, got 5"),
        (lambda: weight(rows=12), {}, ValueError, "must fill words of 32 bits, got 12 rows and 64 columns"),
        (lambda: weight(lut=torch.zeros(1, 16)), {}, ValueError, "no place for tables of values"),
        (lambda: weight(offset=torch.zeros(32, 2)), {}, ValueError, "no place for offsets"),
        (lambda: weight(zero=torch.full((1, 1), 7.5)), {}, ValueError, "zero points must be integers"),
        (lambda: weight(zero=torch.full((1, 1), 16.0)), {}, ValueError, "zero points must be codes, 0 to 15"),
        (
            lambda: weight().replace(perm=torch.zeros(64).long()),
            {},
            ValueError,
            "to_gptq: perm must be a permutation of the 64 columns",
        ),
        (
            lambda: weight().replace(scale=torch.full((32, 2), 1e6)),
            {},
            ValueError,
            "scale must fit torch.float16, got up to",
        ),
    ],
)
def test_refusals_on_the_way_out(q, options, error, sentence):
    with pytest.raises(error, match=sentence):
        to_gptq(q(), **options)


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(importlib.import_module("cofire.formats.gptq"))
    assert results.attempted > 0 and results.failed == 0
