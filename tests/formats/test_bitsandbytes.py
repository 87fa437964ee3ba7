# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: tensors that it made, read bit by bit, there and back; live where it is installed; refusals."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cofire.formats import from_bitsandbytes, to_bitsandbytes
from cofire.formats.bitsandbytes import FP4, STATE
from cofire.ops import NF4, NestedScale, QTensor, qlinear, quantize_weight
from helpers import check_examples

GOLDEN = load_file(Path(__file__).with_name("golden") / "bitsandbytes.safetensors")
NAMES = sorted({key.split("/")[0] for key in GOLDEN})


def golden(name):
    state = {k.split("/")[2]: v for k, v in GOLDEN.items() if k.startswith(f"{name}/state/")}
    return GOLDEN[f"{name}/data"], state, GOLDEN[f"{name}/decoded"]


def read(state):
    key = next(k for k in state if k.startswith(STATE))
    return {**{k: v for k, v in state.items() if k != key}, **json.loads(bytes(state[key].tolist()))}


def decode(data, state):
    """Flat code by flat code; each operation rounded to fp32."""
    s = read(state)
    rows, columns = s["shape"]
    raw = data.flatten().tolist()
    out = torch.empty(rows * columns)
    for i in range(rows * columns):
        code = raw[i // 2] >> (4 if i % 2 == 0 else 0) & 15
        block = i // s["blocksize"]
        scale = s["absmax"][block]
        if "nested_absmax" in s:
            scale = s["nested_quant_map"][int(scale)] * s["nested_absmax"][block // s["nested_blocksize"]]
            scale = scale + torch.tensor(s["nested_offset"])
        out[i] = s["quant_map"][code] * scale
    return out.view(rows, columns).to(getattr(torch, s["dtype"]))


def same(a, b):
    assert torch.equal(a[0], b[0]) and sorted(a[1]) == sorted(b[1])
    for name in a[1]:
        assert a[1][name].dtype == b[1][name].dtype and torch.equal(a[1][name], b[1][name]), name


@pytest.mark.parametrize("name", NAMES)
def test_its_own_tensors_decode_to_what_it_decodes_and_come_back(name):
    data, state, decoded = golden(name)
    q = from_bitsandbytes(data, state)
    assert q.dtype == decoded.dtype and isinstance(q.scale, NestedScale) == ("nested" in name)
    assert torch.equal(q.dequantize()[-len(decoded) :], decoded)
    same(to_bitsandbytes(q), (data, state))


def test_the_tables_are_its_own():
    assert torch.equal(golden("nf4")[1]["quant_map"], torch.tensor(NF4))
    assert torch.equal(golden("fp4")[1]["quant_map"], torch.tensor(FP4))


@pytest.mark.parametrize("name", ["across_rows", "across_rows_nested", "fp4_nested"])
def test_every_bit_is_read(name):
    data, state, _ = golden(name)
    assert torch.equal(from_bitsandbytes(data, state).dequantize(), decode(data, state))


def random_state(rows, columns, blocksize, nested, kind="nf4", dtype="float16", nested_blocksize=4):
    blocks = math.ceil(rows * columns / blocksize)
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    rest = {"quant_type": kind, "blocksize": blocksize, "dtype": dtype, "shape": [rows, columns]}
    state = {"absmax": torch.rand(blocks), "quant_map": table}
    if nested:
        state["absmax"] = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        state["nested_absmax"] = torch.rand(math.ceil(blocks / nested_blocksize))
        state["nested_quant_map"] = torch.randn(256)
        mean = float(torch.rand(()))
        rest |= {"nested_blocksize": nested_blocksize, "nested_dtype": "float32", "nested_offset": mean}
    state[STATE + kind] = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
    return torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8), state


@given(
    rows=st.integers(1, 6),
    half=st.integers(1, 80),
    blocksize=st.sampled_from([32, 64, 128, 256, 4096]),
    nested=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_there_and_back(rows, half, blocksize, nested, kind, seed):
    torch.manual_seed(seed)
    data, state = random_state(rows, 2 * half, blocksize, nested, kind)
    q = from_bitsandbytes(data, state)
    assert q.group_size == math.gcd(2 * half, blocksize)
    same(to_bitsandbytes(q), (data, state))


@pytest.mark.parametrize(("rows", "columns", "nested"), [(3, 96, True), (5, 40, False), (1, 2, True), (2, 128, True)])
def test_blocks_that_cross_rows(rows, columns, nested):
    data, state = random_state(rows, columns, 64, nested, dtype="float32")
    q = from_bitsandbytes(data, state)
    assert torch.equal(q.dequantize(), decode(data, state))
    x = torch.randn(2, columns)
    torch.testing.assert_close(qlinear(x, q), x @ decode(data, state).t())


def test_other_storage_types():
    data, state = random_state(4, 64, 64, False)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(
            from_bitsandbytes(data.flatten().view(dtype), state).unpack(), from_bitsandbytes(data, state).unpack()
        )


def test_a_state_that_is_not_packed():
    data, state = random_state(4, 64, 64, True)
    for form in (read(state), {**read(state), "shape": torch.Size([4, 64])}):
        assert torch.equal(from_bitsandbytes(data, form).dequantize(), from_bitsandbytes(data, state).dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_our_quantiser_makes_goes_out(dtype):
    q = quantize_weight(torch.randn(8, 128).to(dtype), "nf4", group_size=64)
    again = from_bitsandbytes(*to_bitsandbytes(q))
    assert again.dtype == dtype and torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_live(name):
    bnb = pytest.importorskip("bitsandbytes.functional")
    data, state, decoded = golden(name)
    theirs = bnb.QuantState.from_dict(dict(to_bitsandbytes(from_bitsandbytes(data, state))[1]), "cpu")
    assert torch.equal(bnb.dequantize_4bit(data, theirs)[-len(decoded) :], decoded)
    weight = torch.randn(16, 128).to(decoded.dtype)
    data, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=theirs.nested, quant_type=theirs.quant_type
    )
    q = from_bitsandbytes(data, state)
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(data, state))
    same(to_bitsandbytes(q), (data, state.as_dict(packed=True)))


def bad(name="nf4", data=None, **changes):
    good, state, _ = golden(name)
    rest = read(state) | changes
    return from_bitsandbytes(good if data is None else data, {k: v for k, v in rest.items() if v is not None})


def own(bits=4, columns=64, **parts):
    parts = {"lut": torch.tensor([NF4]), **parts}
    return QTensor.from_codes(torch.randint(1 << bits, (2, columns)), torch.ones(2, 1), bits=bits, **parts)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: from_bitsandbytes(torch.zeros(4), 3), TypeError, "state must be a mapping or a QuantState, got int"),
        (lambda: bad(absmax=None), ValueError, "state must have absmax, got"),
        (lambda: bad(quant_type="int4"), ValueError, "quant_type must be nf4 or fp4, got 'int4'"),
        (lambda: bad(shape=[1024]), ValueError, "must be a matrix of an even number of columns"),
        (lambda: bad(shape=[1024, 1]), ValueError, "an even number of columns, got shape .1024, 1."),
        (lambda: bad(shape=[9, 128]), ValueError, "data must have 576 bytes for a weight .9, 128., got 512"),
        (lambda: bad(absmax=torch.rand(15)), ValueError, r"absmax must have shape \[16\], got \[15\]"),
        (lambda: bad(absmax=torch.rand(16).half()), TypeError, "absmax must be torch.float32, got torch.float16"),
        (lambda: bad(absmax=torch.full((16,), torch.nan)), ValueError, "absmax must be finite, got 16"),
        (lambda: bad(quant_map=torch.rand(8)), ValueError, r"quant_map must have shape \[16\]"),
        (lambda: bad("fp4_nested", nested_absmax=torch.rand(2)), ValueError, r"nested_absmax must have shape \[1\]"),
        (lambda: bad("fp4_nested", absmax=torch.rand(6)), TypeError, "absmax must be torch.uint8"),
        (lambda: to_bitsandbytes(own(lut=None)), ValueError, "one table, that of NF4 or FP4"),
        (
            lambda: to_bitsandbytes(own(lut=torch.zeros(1, 16))),
            ValueError,
            "the table must be bitsandbytes' NF4 or FP4",
        ),
        (lambda: to_bitsandbytes(own(lut=torch.tensor([NF4, NF4]))), ValueError, "one table"),
        (lambda: to_bitsandbytes(own(columns=48)), ValueError, "groups must have a size of 32, 64, .*, got 48"),
        (lambda: to_bitsandbytes(own(zero=torch.zeros(1, 1))), ValueError, "no place for zero points"),
        (lambda: to_bitsandbytes(own(bits=3, lut=torch.zeros(1, 8))), ValueError, "the format has 4 bits"),
        (
            lambda: to_bitsandbytes(quantize_weight(torch.randn(2, 64), "fp4", group_size=64)),
            ValueError,
            "the table must be bitsandbytes' NF4 or FP4",
        ),
    ],
)
def test_refusals(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_the_examples_of_the_docstrings():
    check_examples(importlib.import_module("cofire.formats.bitsandbytes"))
