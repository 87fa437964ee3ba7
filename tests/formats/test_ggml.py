# SPDX-License-Identifier: Apache-2.0
"""ggml: against the package gguf and against readings of single bits, random bytes there and back, refusals."""

from __future__ import annotations

import importlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cofire.formats import from_ggml, to_ggml
from cofire.formats.ggml import TYPES
from cofire.nn import QuantLinear
from cofire.ops import QTensor, qlinear, quantize_weight
from helpers import check_examples

NESTED = [kind for kind, t in TYPES.items() if t.nested]
PLAIN = [kind for kind, t in TYPES.items() if not t.nested]


def random_blocks(kind, rows, columns):
    """Any bytes, but for the exponents of fp16 numbers, which stay below that of infinity."""
    t = TYPES[kind]
    data = torch.randint(0, 256, (rows * columns // t.block, t.bytes), dtype=torch.uint8)
    at = 0
    for field, size in t.fields.items():
        if field in ("d", "m"):
            data[:, at + 1] &= 0xBB
        at += size
    return data.view(rows, -1)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


# ------------------------------------------------------------------------------------------ against gguf


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_decodes_it_to_the_same_bits(kind):
    gguf = pytest.importorskip("gguf")
    data = random_blocks(kind, 5, 512)
    expected = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    q = from_ggml(data, kind, (5, 512))
    assert same_bits(q.dequantize(), expected)
    assert torch.equal(to_ggml(q), data)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_what_gguf_quantises(kind):
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(6, 128) * torch.logspace(-6, 4, 6)[:, None] if kind != "MXFP4" else torch.randn(6, 128)
    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    q = from_ggml(data, gguf.GGMLQuantizationType[kind], weight.shape)
    assert q.format == f"ggml-{kind}"
    expected = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    assert same_bits(q.dequantize(), expected) and torch.equal(to_ggml(q), torch.from_numpy(data))


def test_sizes_are_those_of_gguf():
    gguf = pytest.importorskip("gguf")
    for kind, t in TYPES.items():
        assert (t.block, t.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


# ------------------------------------------------------------------------------------------ bit by bit


def half(data, at):
    return struct.unpack("<e", bytes(data[at : at + 2]))[0]


def nearest(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def decode_q4_0(b):
    return [half(b, 0) * ((b[2 + j % 16] >> 4 * (j // 16) & 15) - 8) for j in range(32)]


def decode_q8_0(b):
    return [half(b, 0) * (b[2 + j] - 256 * (b[2 + j] > 127)) for j in range(32)]


def decode_q4_k(b):
    """Eight groups; the scale and the minimum of each in 6 bits."""
    d, m, s, q = half(b, 0), half(b, 2), b[4:16], b[16:]
    out = []
    for g in range(8):
        if g < 4:
            scale, low = s[g] & 63, s[g + 4] & 63
        else:
            scale = s[g + 4] & 15 | s[g - 4] >> 6 << 4
            low = s[g + 4] >> 4 | s[g] >> 6 << 4
        for j in range(32):
            code = q[g // 2 * 32 + j] >> 4 * (g % 2) & 15
            out.append(nearest(d * scale * code - m * low))  # exact in fp64 but for the last operation
    return out


def decode_q6_k(b):
    out = []
    for k in range(256):
        part, r = k // 128, k % 128  # halves of 128: rows of 32
        low = b[part * 64 + r % 64] >> 4 * (r // 64) & 15
        high = b[128 + part * 32 + r % 32] >> 2 * (r // 32) & 3
        scale = b[192 + k // 16]
        out.append(half(b, 208) * (scale - 256 * (scale > 127)) * (low + 16 * high - 32))
    return out


DECODERS = {"Q4_0": decode_q4_0, "Q8_0": decode_q8_0, "Q4_K": decode_q4_k, "Q6_K": decode_q6_k}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_bit_is_read(kind):
    t = TYPES[kind]
    data = random_blocks(kind, 3, 2 * t.block)
    blocks = data.view(-1, t.bytes).tolist()
    expected = torch.tensor([v for b in blocks for v in DECODERS[kind](b)], dtype=torch.float64).float()
    assert torch.equal(from_ggml(data, kind, (3, 2 * t.block)).dequantize().flatten(), expected)


# ------------------------------------------------------------------------------------------ there and back


@given(kind=st.sampled_from(list(TYPES)), rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_there_and_back(kind, rows, blocks, seed):
    torch.manual_seed(seed)
    columns = blocks * TYPES[kind].block
    data = random_blocks(kind, rows, columns)
    q = from_ggml(data.flatten(), kind.lower(), (rows, columns))
    assert torch.equal(to_ggml(q), data) and torch.equal(to_ggml(q, kind), data)


@pytest.mark.parametrize("kind", NESTED)
def test_nested_scales_and_offsets_pass_through_layers_and_their_state(kind):
    data = random_blocks(kind, 4, 512)
    q = from_ggml(data, kind, (4, 512))
    layer, fresh = QuantLinear.from_qtensor(q), QuantLinear(512, 4, bias=False)
    fresh.load_state_dict(layer.state_dict())
    assert same_bits(fresh.weight, q.dequantize())
    assert torch.equal(to_ggml(fresh.qweight, kind), data) and torch.equal(to_ggml(layer.qweight), data)
    assert torch.equal(to_ggml(q.map(torch.clone)), data)


@pytest.mark.parametrize("kind", TYPES)
def test_products_take_it(kind):
    q = from_ggml(random_blocks(kind, 8, 512), kind, (8, 512))
    q = q.replace(scale=torch.randn(8, 512 // q.group_size), offset=None) if not TYPES[kind].nested else q
    x, w = torch.randn(3, 512), q.dequantize()
    bound = 1e-5 * (x.abs() @ w.abs().t())
    assert bool(((qlinear(x, q) - x @ w.t()).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("kind", NESTED)
def test_nothing_grows_much(kind):
    """But for the tables, which have the same size for any weight: the codes' bits, and 8 bits for a scale of 4 or 6."""
    q = from_ggml(random_blocks(kind, 64, 4096), kind, (64, 4096))
    tables = sum(p.table.nbytes for p in (q.scale, q.offset) if p is not None)
    assert (q.nbytes - tables) / (64 * 4096 / TYPES[kind].block * TYPES[kind].bytes) < 1.25


# ------------------------------------------------------------------------------------------ weights of our own


@pytest.mark.parametrize(
    ("kind", "method", "group"),
    [("Q4_0", "absmax", 32), ("Q4_0", "absmax", 128), ("Q8_0", "absmax", 64), ("Q5_0", "absmax", 32),
     ("Q4_1", "minmax", 32), ("Q4_1", "absmax", 32), ("Q5_1", "hqq", 64), ("Q4_1", "statsq", 32)],
)  # fmt: skip
def test_what_our_quantisers_make_goes_out(kind, method, group):
    q = quantize_weight(torch.randn(4, 256).half(), method, bits=TYPES[kind].bits, group_size=group)
    again = from_ggml(to_ggml(q, kind), kind, q.shape, dtype=q.dtype)
    assert torch.equal(again.unpack(), q.unpack())
    scale = q.scale.half().repeat_interleave(group // 32, 1)
    assert torch.equal(again.scale, scale)
    if TYPES[kind].minima:
        low = (-q.scale.float() * q.zero.float()).half().repeat_interleave(group // 32, 1)
        assert torch.equal(again.offset, low)
    else:
        assert torch.equal(again.dequantize(), q.replace(scale=q.scale.half()).dequantize())


def test_powers_of_two_of_mxfp4():
    gguf = pytest.importorskip("gguf")
    every = torch.arange(256, dtype=torch.uint8).view(256, 1)
    data = torch.cat((every, torch.full((256, 16), 0x21, dtype=torch.uint8)), 1)
    q = from_ggml(data, "MXFP4", (256, 32))
    assert same_bits(
        q.dequantize(), torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType.MXFP4))
    )
    assert torch.equal(to_ggml(q), data)
    for wrong in (3.0, -1.0, 0.0):
        with pytest.raises(ValueError, match="the scales of MXFP4 must be powers of two"):
            to_ggml(q.replace(scale=torch.full((256, 1), wrong)))


def own(bits=4, group=32, columns=256, **parts):
    codes = torch.randint(1 << bits, (2, columns))
    return QTensor.from_codes(codes, torch.ones(2, columns // group), bits=bits, **parts)


EIGHT = torch.full((1, 1), 8.0)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: from_ggml(b(18), "Q4_2", (1, 32)), ValueError, "from_ggml: there is no type 'Q4_2' among Q4_0, Q4_1"),
        (lambda: from_ggml(b(18), "Q4_0", (1, 33)), ValueError, "K a multiple of 32 .*, got .1, 33."),
        (lambda: from_ggml(b(18), "Q4_K", (1, 32)), ValueError, "K a multiple of 256"),
        (lambda: from_ggml(b(18), "Q4_0", (32,)), ValueError, r"shape must be \[N, K\]"),
        (
            lambda: from_ggml(b(17), "Q4_0", (1, 32)),
            ValueError,
            r"data must have 18 bytes for \[1, 32\] in Q4_0, got 17",
        ),
        (lambda: from_ggml(b(18).int(), "Q4_0", (1, 32)), TypeError, "data must be torch.uint8, got torch.int32"),
        (lambda: from_ggml(b(18) * 0 + 255, "Q4_0", (1, 32)), ValueError, "d must be finite, got 1 values"),
        (lambda: to_ggml(own(zero=EIGHT)), ValueError, "type must be given"),
        (lambda: to_ggml(own(zero=EIGHT), "Q5_0"), ValueError, "Q5_0 has 5 bits, got 4"),
        (lambda: to_ggml(own(group=16, zero=EIGHT), "Q4_0"), ValueError, "groups of 32, which do not divide"),
        (lambda: to_ggml(own(columns=48, group=48, zero=EIGHT), "Q4_0"), ValueError, "blocks of 32 columns"),
        (lambda: to_ggml(own(), "Q4_0"), ValueError, "Q4_0 has the zero point 8 and no offsets"),
        (lambda: to_ggml(own(zero=EIGHT, offset=torch.ones(2, 8)), "Q4_0"), ValueError, "zero point 8 and no offsets"),
        (lambda: to_ggml(own(lut=torch.zeros(1, 16)), "Q4_0"), ValueError, "Q4_0 has no table"),
        (lambda: to_ggml(own(), "IQ4_NL"), ValueError, "IQ4_NL has a table"),
        (lambda: to_ggml(own(lut=torch.zeros(1, 16)), "IQ4_NL"), ValueError, r"IQ4_NL has the table \[-127"),
        (lambda: to_ggml(own(zero=EIGHT), "Q4_K"), ValueError, "Q4_K holds scales that are small multiples"),
        (lambda: to_ggml(own(perm=torch.arange(256)), "Q4_0"), ValueError, "no place for another order"),
        (lambda: to_ggml(own(zero=EIGHT).replace(scale=torch.full((2, 8), 1e5)), "Q4_0"), ValueError, "scale must fit"),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def b(n):
    return torch.zeros(n, dtype=torch.uint8)


def test_a_nested_offset_needs_a_nested_scale():
    q = from_ggml(random_blocks("Q4_K", 2, 256), "Q4_K", (2, 256))
    with pytest.raises(ValueError, match="a nested offset needs a nested scale of the same block, 8"):
        q.replace(scale=q.scales())
    flat = q.replace(scale=q.scales(), offset=q.offsets())
    assert same_bits(flat.dequantize(), q.dequantize())


def test_scales_out_of_range_do_not_go_back():
    q = from_ggml(random_blocks("Q4_K", 2, 256), "Q4_K", (2, 256))
    codes = q.scale.codes.clone()
    codes[0, 0] = 64
    with pytest.raises(ValueError, match="small multiples"):
        to_ggml(q.replace(scale=type(q.scale)(codes, q.scale.table, q.scale.absmax, q.scale.mean, q.scale.block)))


def test_the_examples_of_the_docstrings():
    check_examples(importlib.import_module("cofire.formats.ggml"))
