# SPDX-License-Identifier: Apache-2.0
"""Products with weights of few bits: decoding to the last bit, integers as integers, and the contract of every operator."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import explain, native, ops
from cofire.ops import QTensor, pack_bits, pack_shift
from cofire.ops.lowbit import int8_activations
from cofire.registry import FLOATS, OPERATORS
from helpers import (
    Args,
    Provider,
    Random,
    Refusal,
    Sample,
    check_close,
    check_examples,
    check_forward,
    check_gradient,
    check_op,
    refusals,
    threads,
)

compiled = pytest.mark.skipif(native.STATUS.variant is None, reason="no compiled kernels")


def weight(
    rand: Random, rows: int, columns: int, bits: int, group: int, *, zero: str = "", offset: bool = False,
    lut: int = 0, int8: bool = False, scale: bool = True, powers: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """codes, scale, zero, offset, lut: what the operators take."""
    codes = (rand.uniform(rows, columns) * (1 << bits)).floor().clamp(max=(1 << bits) - 1).to(torch.uint8)
    groups = columns // group
    z: Tensor | None = None
    if zero == "bytes":
        z = (rand.uniform(rows, groups) * (1 << bits)).floor().to(torch.uint8)
    elif zero == "floats":
        z = rand.uniform(rows, groups) * (1 << bits)
    elif zero == "one":
        z = torch.full((1, 1), float(1 << (bits - 1)))
    table: Tensor | None = None
    if lut:
        table = rand.normal(lut, 1 << bits).sort(1).values
        table = (table * 40).clamp(-128, 127).round().to(torch.int8) if int8 else table
    if powers:  # the table of shift layers, with its zeros
        table = pack_shift(*torch.zeros(2, 1, 1, dtype=torch.int8), format=f"S{bits}").lut
    return (
        pack_bits(codes, bits).clone(),
        (rand.uniform(rows, groups) + 0.5) / (1 << bits) if scale else None,
        z,
        rand.normal(rows, groups) if offset else None,
        table,
    )


#: rows, columns, bits, group and the rest of a weight. Together: every number of bits, groups of every kind, every part.
WEIGHTS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "4bits_g32": ((33, 64, 4, 32), {"zero": "bytes"}),
    "4bits_rows": ((7, 37, 4, 37), {"zero": "one"}),
    "1bit": ((17, 64, 1, 64), {"zero": "floats"}),
    "2bits_g7": ((5, 21, 2, 7), {"zero": "bytes"}),
    "3bits_g32": ((49, 96, 3, 32), {"offset": True}),
    "5bits": ((16, 64, 5, 32), {"zero": "floats", "offset": True}),
    "6bits_g16": ((20, 48, 6, 16), {"zero": "one"}),
    "7bits": ((18, 32, 7, 32), {}),
    "8bits": ((35, 128, 8, 64), {"zero": "one"}),
    "palette": ((19, 40, 4, 40), {"lut": 1, "scale": False}),
    "palettes_of_blocks": ((48, 64, 2, 32), {"lut": 3}),
    "palettes_of_rows": ((9, 33, 3, 33), {"lut": 4, "zero": "floats"}),
    "palette_256": ((17, 64, 8, 32), {"lut": 1}),
    "shift_s5": ((35, 96, 5, 96), {"powers": True, "scale": False}),
    "shift_s5_odd": ((9, 37, 5, 37), {"powers": True, "scale": False}),
    "shift_s8": ((18, 64, 8, 64), {"powers": True, "scale": False}),
    "palette_of_bytes": ((34, 64, 4, 64), {"lut": 1, "int8": True}),
    "palette_of_bytes_6": ((16, 32, 6, 32), {"lut": 1, "int8": True, "zero": "floats"}),
    "palettes_of_bytes": ((40, 64, 4, 32), {"lut": 3, "int8": True, "offset": True}),
    "palettes_of_bytes_rows": ((7, 33, 3, 33), {"lut": 3, "int8": True}),
    "no_rows": ((0, 32, 4, 32), {}),
}
INT8 = (
    "1bit", "4bits_g32", "4bits_rows", "2bits_g7", "3bits_g32", "5bits", "7bits", "8bits", "palette_of_bytes",
    "palette_of_bytes_6", "palettes_of_bytes", "palettes_of_bytes_rows", "6bits_g16",
)  # fmt: skip
LATER = (
    "palettes_of_rows", "palette_256", "2bits_g7", "palette_of_bytes_6", "palettes_of_bytes", "palettes_of_bytes_rows",
)  # fmt: skip
TINY = tuple((sizes, {"zero": "floats", "offset": True, "lut": 1}) for sizes in ((3, 6, 2, 3), (4, 9, 2, 3)))


def parts(rand: Random, name: str) -> tuple[tuple[int, int, int, int], tuple[Any, ...]]:
    sizes, rest = WEIGHTS[name]
    return sizes, weight(rand, *sizes, **rest)


def dequantize_args(rand: Random, name: str) -> Args:
    (_, columns, bits, group), w = parts(rand, name)
    return *w, bits, group, columns


def tiny(make: Callable[[Random, tuple[int, int, int, int], tuple[Any, ...]], Args]) -> list[Sample]:
    return [
        Sample(f"tiny_{i}", lambda rand, s=sizes, r=rest: make(rand, s, weight(rand, *s, **r)))
        for i, (sizes, rest) in enumerate(TINY)
    ]


def checks(operator: str, samples: Sequence[Sample], *, sums: Mapping[str, int], **rest: Any) -> list[Any]:
    """:func:`check_op` for operators that sum in fp32 whatever the dtype is.

    ``sums`` says how many roundings a sum may cost in fp32. In 16 bits those are nothing: there it is two of its result,
    one of a weight or gradient on its way in and one of the sum on its way out.
    """
    wide = check_op(operator, samples, sums=sums, **rest)
    narrow = check_op(operator, samples, sums=dict.fromkeys(sums, 2), **rest)
    CHECKS[operator] = [n if n.id.endswith("float16") else w for w, n in zip(wide, narrow, strict=True)]
    return CHECKS[operator]


#: By operator: :func:`test_zeros_are_refused` looks at them again.
CHECKS: dict[str, list[Any]] = {}
SUMS = {"output 0": 16, "scale_grad": 32, "zero_grad": 64, "offset_grad": 32, "lut_grad": 64, "input_grad": 16}


@pytest.mark.parametrize(
    "check",
    checks(
        "dequantize",
        [Sample(n, lambda rand, n=n: dequantize_args(rand, n), full=n in LATER) for n in WEIGHTS],
        tiny=tiny(lambda rand, s, w: (*w, s[2], s[3], s[1])),
        sums={"scale": 32, "zero": 64, "offset": 32, "lut": 64},
    ),
)
def test_dequantize(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    checks(
        "dequantize_backward",
        [
            Sample(
                n,
                lambda rand, n=n: (lambda s, w: (rand.normal(s[0], s[1]), *w, s[2], s[3]))(*parts(rand, n)),
                full=n in LATER,
            )
            for n in WEIGHTS
        ],
        tiny=tiny(lambda rand, s, w: (rand.normal(s[0], s[1]), *w, s[2], s[3])),
        sums=SUMS,
    ),
)
def test_dequantize_backward(check: Callable[[], None]) -> None:
    check()


def product_args(rand: Random, name: str, rows: tuple[int, ...], bias: bool, activations: str) -> Args:
    (n, columns, bits, group), w = parts(rand, name)
    return rand.normal(*rows, columns), *w, rand.normal(n) if bias else None, bits, group, activations


#: rows of the input: a few of them go another way than many.
ROWS: dict[str, tuple[int, ...]] = {
    "1": (1,),
    "2": (2,),
    "3": (3,),
    "9": (3, 3),
    "vector": (),
    "none": (0,),
    "40": (40,),
    "131": (131,),
}


def products(
    make: Callable[[Random, str, tuple[int, ...], bool], Args], names: tuple[str, ...] = tuple(WEIGHTS)
) -> list[Sample]:
    chosen = [(n, r) for i, n in enumerate(names) for j, r in enumerate(("1", "2", "9")) if j == i % 3]
    chosen += [("4bits_g32", r) for r in ROWS] + [("palette", "3"), ("8bits", "131"), ("3bits_g32", "131")]
    chosen += [("shift_s5", r) for r in ("1", "3", "9", "131")] + [("shift_s8", r) for r in ("1", "9", "131")]
    chosen += [("4bits_rows", "131"), ("palettes_of_blocks", "131"), ("no_rows", "131")]
    chosen += [(n, "40") for n in ("palette", "8bits", "3bits_g32", "shift_s5", "palettes_of_blocks")]
    chosen = [c for c in dict.fromkeys(chosen) if c[0] in names]
    return [
        Sample(
            f"{n}_{r}", lambda rand, n=n, r=r: make(rand, n, ROWS[r], len(n) % 2 == 0), full=n in LATER or r == "131"
        )
        for n, r in chosen
    ]


@pytest.mark.parametrize(
    "check",
    checks(
        "qlinear",
        products(lambda rand, n, rows, bias: product_args(rand, n, rows, bias, "exact")),
        tiny=tiny(lambda rand, s, w: (rand.normal(2, s[1]), *w, rand.normal(s[0]), s[2], s[3], "exact")),
        sums={"output 0": 16, "scale": 64, "zero": 128, "offset": 64, "lut": 128, "input": 16},
    ),
)
def test_qlinear(check: Callable[[], None]) -> None:
    check()


def backward_args(rand: Random, name: str, rows: tuple[int, ...], whole: bool, activations: str) -> Args:
    (n, columns, bits, group), w = parts(rand, name)
    x = rand.normal(*rows, columns) if whole else None
    return rand.normal(*rows, n), x, *w, bits, group, columns, activations, True


@pytest.mark.parametrize(
    "check",
    checks(
        "qlinear_backward",
        products(lambda rand, n, rows, whole: backward_args(rand, n, rows, whole, "exact")),
        tiny=tiny(lambda rand, s, w: (rand.normal(2, s[0]), rand.normal(2, s[1]), *w, s[2], s[3], s[1], "exact", True)),
        sums=SUMS,
    ),
)
def test_qlinear_backward(check: Callable[[], None]) -> None:
    check()


def lora_args(rand: Random, name: str, rows: tuple[int, ...], bias: bool) -> Args:
    (n, columns, bits, group), w = parts(rand, name)
    low = (rand.normal(4, columns), rand.normal(n, 4))
    return rand.normal(*rows, columns), *w, rand.normal(n) if bias else None, *low, 0.5, bits, group


FROZEN = ("scale", "zero", "offset", "lut")


@pytest.mark.parametrize(
    "check",
    checks(
        "qlora_linear",
        products(lora_args, ("4bits_g32", "palette", "3bits_g32", "8bits")),
        tiny=[
            Sample(
                f"tiny_{i}",
                lambda rand, s=s, r=r: (
                    rand.normal(2, s[1]),
                    *weight(rand, *s, **r),
                    rand.normal(s[0]),
                    rand.normal(2, s[1]),
                    rand.normal(s[0], 2),
                    0.5,
                    s[2],
                    s[3],
                ),
            )
            for i, (s, r) in enumerate(TINY)
        ],
        constants=FROZEN,
        sums={"output": 16, "low": 16, "input": 32, "lora_a": 64, "lora_b": 64},
    ),
)
def test_qlora_linear(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    checks(
        "qlora_linear_backward",
        products(
            lambda rand, n, rows, whole: (
                lambda a: (
                    rand.normal(*rows, WEIGHTS[n][0][0]), rand.normal(*rows, 4), a[0] if whole else None,
                    rand.normal(*rows, 4) if whole else None, *a[1:6], *a[7:10], *a[10:], True,
                )
            )(lora_args(rand, n, rows, False)),
            ("4bits_g32", "palette", "3bits_g32"),
        ),
        tiny=[
            Sample(
                f"tiny_{i}",
                lambda rand, s=s, r=r: (
                    rand.normal(2, s[0]), rand.normal(2, 2), rand.normal(2, s[1]), rand.normal(2, 2),
                    *weight(rand, *s, **r), rand.normal(2, s[1]), rand.normal(s[0], 2), 0.5, s[2], s[3], True,
                ),
            )
            for i, (s, r) in enumerate(TINY)
        ],
        constants=FROZEN,
        sums={"input_grad": 32, "lora_a_grad": 64, "lora_b_grad": 64},
    ),
)  # fmt: skip
def test_qlora_linear_backward(check: Callable[[], None]) -> None:
    check()


# ---------------------------------------------------------------------------------------------------- tolerances


def every_part(rand: Random) -> tuple[Any, ...]:
    """Of 4 bits: 33 rows of 64 columns in groups of 32, with all that a weight may have."""
    return weight(rand, 33, 64, 4, 32, zero="floats", offset=True, lut=1)


ALL: dict[str, Callable[[Random], Args]] = {
    "dequantize": lambda rand: (*every_part(rand), 4, 32, 64),
    "dequantize_backward": lambda rand: (rand.normal(33, 64), *every_part(rand), 4, 32),
    "qlinear": lambda rand: (rand.normal(9, 64), *every_part(rand), rand.normal(33), 4, 32, "exact"),
    "qlinear_backward": lambda rand: (
        rand.normal(9, 33), rand.normal(9, 64), *every_part(rand), 4, 32, 64, "exact", True,
    ),
    "qlora_linear": lambda rand: (
        rand.normal(9, 64), *every_part(rand), rand.normal(33), rand.normal(4, 64), rand.normal(33, 4), 0.5, 4, 32,
    ),
    "qlora_linear_backward": lambda rand: (
        rand.normal(9, 33), rand.normal(9, 4), rand.normal(9, 64), rand.normal(9, 4), *every_part(rand),
        rand.normal(4, 64), rand.normal(33, 4), 0.5, 4, 32, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operator", ALL)
def test_zeros_are_refused(operator: str, dtype: torch.dtype) -> None:
    """The checks of this file can fail: zeros in place of any output, or of any gradient, are outside of their bounds."""
    suffix = str(dtype).removeprefix("torch.")
    start, end = f"-{operator}-cpu-", f"-{suffix}"
    (of_values, *_) = [p for p in CHECKS[operator] if p.id.startswith(f"forward{start}") and p.id.endswith(end)]
    case, provider, *_ = of_values.values[0].args
    sample = Sample("all", ALL[operator])
    check_forward(case, provider, sample, dtype)
    for i, name in enumerate(case.outputs):

        def zeros(*args: Any, i: int = i) -> tuple[Tensor, ...]:
            return tuple(torch.zeros_like(o) if i == j else o for j, o in enumerate(provider.run(*args)))

        with pytest.raises(AssertionError, match=rf"{re.escape(name)}: \d+ of \d+ values are wrong"):
            check_forward(case, _by(provider, zeros), sample, dtype)
    if operator.endswith("_backward"):
        return
    check_gradient(case, provider, sample, dtype)
    args = case.make(sample, dtype)
    for i, (name, a) in enumerate(zip(case.names, args, strict=True)):
        if not isinstance(a, Tensor) or not a.is_floating_point() or name in case.constants:
            continue

        def blind(*args: Any, i: int = i) -> tuple[Tensor, ...]:
            return tuple(provider.run(*(a.detach() + 0 * a if i == j else a for j, a in enumerate(args))))

        with pytest.raises(AssertionError, match=rf"gradient of {name} .*: \d+ of \d+ values are wrong"):
            check_gradient(case, _by(provider, blind), sample, dtype)


def _by(provider: Provider, run: Callable[..., tuple[Tensor, ...]]) -> Provider:
    return dataclasses.replace(provider, name="a fault", run=run)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [n for n in WEIGHTS if n != "no_rows"])
def test_products_are_as_exact_as_their_terms(name: str, dtype: torch.dtype) -> None:
    """Each element by itself, however much its terms cancel: by the sum of their sizes.

    In 16 bits each weight may be rounded once, and the result.
    """
    (n, columns, bits, group), (codes, *rest) = parts(Random(name), name)
    q = QTensor(codes, rest[0], (n, columns), bits, group, *rest[1:])
    rand, w = Random(f"terms {name}"), q.dequantize().double()
    half = torch.finfo(dtype).eps / 2
    bound = 1e-5 if dtype == torch.float32 else half
    for rows in (1, 4, 20, 131):
        x, grad = rand.normal(rows, columns).to(dtype).requires_grad_(), rand.normal(rows, n).to(dtype)
        y = ops.qlinear(x, q)
        y.backward(grad)
        assert x.grad is not None
        for found, left, right in ((y, x, w.t()), (x.grad, grad, w)):
            terms = left.detach().double().abs() @ right.abs()
            expected = left.detach().double() @ right
            allowed = 1.01 * (bound * terms + half * (expected.abs() + torch.finfo(dtype).tiny))
            assert ((found.detach().double() - expected).abs() <= allowed).all()


# ------------------------------------------------------------------------------------------------------ decoding


def slowly(w: tuple[Any, ...], bits: int, group: int, columns: int) -> Tensor:
    """The weight, bit by bit and number by number, each operation rounded to fp32."""
    codes, scale, zero, offset, lut = w
    rows = codes.shape[0]
    out = torch.empty(rows, columns)
    for n in range(rows):
        for k in range(columns):
            q = sum(int(codes[n, i // 8] >> (i % 8) & 1) << (i - k * bits) for i in range(k * bits, (k + 1) * bits))
            size = -(-rows // lut.shape[0]) if lut is not None else 1
            v = torch.tensor(float(q)) if lut is None else lut[n // size, q].float()
            if zero is not None:
                v = v - (zero[0, 0] if zero.numel() == 1 else zero[n, k // group]).float()
            if scale is not None:
                v = v * scale[n, k // group].float()
            if offset is not None:
                v = v + offset[n, k // group].float()
            out[n, k] = v
    return out


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n != "no_rows"])
def test_decoding_is_exact_to_the_bit(name: str) -> None:
    (_, columns, bits, group), w = parts(Random(name), name)
    expected = slowly(w, bits, group, columns)
    operator = OPERATORS["dequantize"]
    for how in (operator.reference, operator.overload):
        assert torch.equal(how(*w, bits, group, columns), expected)


GROUPS = (16, 32, 64, 96, 128, None)  #: None: whole rows
COLUMNS = 384
#: Parts of a weight beside its codes and scales: zero points, offsets, entries of a table, tables.
KINDS = ("plain", "zeros", "floats and offsets", "one zero", "table", "tables", "table of bytes", "tables of bytes")


def every_code(
    rand: Random, bits: int, group: int | None, kind: str, *, whole: bool, rows: int = 5, columns: int = COLUMNS
) -> tuple[QTensor, Tensor]:
    """A weight in which every code stands in every row (if there is room), and the same computed part by part.

    ``whole``: scales are powers of two, the other numbers integers of 7 bits: every product with integers is exact.
    """
    group = columns if group is None else group
    groups, size = columns // group, 1 << bits
    codes = (torch.arange(columns) + 3 * torch.arange(rows)[:, None]) % size

    def some(*shape: int) -> Tensor:
        return (rand.normal(*shape) * 20).round().clamp(-63, 63) if whole else rand.normal(*shape)

    scale = torch.exp2((rand.uniform(rows, groups) * 3).floor() - 2) if whole else rand.uniform(rows, groups) + 0.1
    zero = offset = lut = None
    if kind == "zeros":
        zero = (rand.uniform(rows, groups) * size).to(torch.uint8)
    elif kind == "floats and offsets":
        zero, offset = some(rows, groups), some(rows, groups)
    elif kind == "one zero":
        zero = torch.full((1, 1), float(size // 2))
    elif kind.startswith("table"):
        lut = some(2 if kind.startswith("tables") else 1, size)
        if kind.endswith("of bytes"):
            lut = (lut if whole else lut * 40).round().clamp(-128, 127).to(torch.int8)
    q = QTensor.from_codes(codes, scale, bits=bits, zero=zero, offset=offset, lut=lut)
    values = codes.float()
    if lut is not None:
        block = torch.arange(rows) // -(-rows // lut.shape[0])
        values = lut.float()[block[:, None], codes]
    values = values.view(rows, groups, group)
    if zero is not None:
        values = values - zero.float().expand(rows, groups)[:, :, None]
    values = values * scale[:, :, None]
    if offset is not None:
        values = values + offset[:, :, None]
    return q, values.reshape(rows, columns)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_of_every_width_decodes(bits: int, group: int | None, kind: str) -> None:
    q, expected = every_code(Random(f"{bits} {group} {kind}"), bits, group, kind, whole=False)
    assert q.unpack().unique().numel() == 1 << bits
    assert torch.equal(q.dequantize(), expected)
    args = (q.codes, q.scale, q.zero, q.offset, q.lut, bits, q.group_size, COLUMNS)
    assert torch.equal(OPERATORS["dequantize"].reference(*args), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_unit_vectors_are_the_weight(bits: int, group: int | None, kind: str) -> None:
    """Decoding inside the products, from whatever layout they read: of few rows and of many, both ways, floats and bytes."""
    n = 64 if kind.startswith("tables") else 35  # tables change with a block of 16 rows, or there is no layout
    rand = Random(f"unit {bits} {group} {kind}")
    q, w = every_code(rand, bits, group, kind, whole=True, rows=n)
    assert torch.equal(q.dequantize(), w)
    units, back = torch.eye(COLUMNS), torch.eye(n)
    parts = (q.codes, q.scale, q.zero, q.offset, q.lut)
    for dtype in (torch.float32, torch.bfloat16):
        for some in (slice(None), slice(5, 6), slice(40, 43), slice(100, 370, 30)):
            x = units[some].to(dtype)
            assert torch.equal(ops.qlinear(x, q), w.t()[some].to(dtype))
            if q.lut is None or q.lut.dtype == torch.int8:
                assert torch.equal(ops.qlinear(127 * x, q, activations="int8"), (127 * w.t()[some]).to(dtype))
        for some in (slice(None), slice(3, 4), slice(7, 10)):
            grad = back[some].to(dtype)
            args = (grad, None, *parts, bits, q.group_size, COLUMNS, "exact", True)
            assert torch.equal(OPERATORS["qlinear_backward"].overload(*args)[0], w[some].to(dtype))


# ----------------------------------------------------------------------------------------------------- integers


def of_integers(rand: Random, rows: int, columns: int, bits: int, group: int, **rest: Any) -> tuple[QTensor, Tensor]:
    """A weight whose parts are multiples of 1/128, and 128 times that weight in int64."""
    codes, scale, zero, offset, lut = weight(rand, rows, columns, bits, group, **rest)
    assert scale is not None
    scale = torch.exp2((rand.uniform(*scale.shape) * 2).floor() - 7)
    zero = None if zero is None else zero.float().round()
    offset = None if offset is None else (offset * 100).round() / 128
    q = QTensor(codes, scale, (rows, columns), bits, group, zero, offset, lut)
    v = ops.unpack_bits(codes, bits, columns).long()
    if lut is not None:
        v = lut.long()[(torch.arange(rows) // -(-rows // lut.shape[0]))[:, None], v]
    v = v.view(rows, columns // group, group)
    if zero is not None:
        v = v - zero.long().expand(rows, columns // group)[:, :, None]
    v = v * (128 * scale).long()[:, :, None]
    if offset is not None:
        v = v + (128 * offset).long()[:, :, None]
    return q, v.reshape(rows, columns)


def integers(rand: Random, rows: int, columns: int, most: int = 127) -> Tensor:
    """From ``-most`` to ``most``, exact in all floats, with a 127 in each row: its scale is 1."""
    x = (rand.uniform(rows, columns) * (2 * most + 1)).floor() - most
    x[:, 0] = 127
    return x


def check_integers(x: Tensor, q: QTensor, w: Tensor) -> None:
    """The product of bytes is that of int64, rounded once to the dtype of the input."""
    sums = x.long() @ w.t()
    assert sums.abs().max() < 1 << 24, "the test is useless: fp32 does not hold the result"
    y = ops.qlinear(x, q, activations="int8")
    assert y.dtype == x.dtype and y.isfinite().all()
    assert torch.equal(y, (sums.double() / 128).to(x.dtype))


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 130])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_multiplied_as_integers(name: str, rows: int, dtype: torch.dtype) -> None:
    """With scales that are powers of two everything is an integer times a power of two: equal to int64, to the last bit."""
    sizes, rest = WEIGHTS[name]
    rand = Random(name)
    q, w = of_integers(rand, *sizes, **rest)
    check_integers(integers(rand, rows, sizes[1]).to(dtype), q, w)


#: Further parts: of weights of rows so long that a mistake of one in a group shows in the sum.
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zeros": {"zero": "bytes"},
    "one zero": {"zero": "one"},
    "offsets": {"zero": "one", "offset": True},
    "table": {"lut": 1, "int8": True},
    "tables": {"lut": 2, "int8": True},
}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [32, 128, 4096])
@pytest.mark.parametrize("name", PARTS)
def test_long_rows_are_multiplied_as_integers(bits: int, group: int, name: str) -> None:
    rand = Random(f"long {bits} {group} {name}")
    q, w = of_integers(rand, 32, 4096, bits, group, **PARTS[name])
    for rows in (1, 5, 40):
        check_integers(integers(rand, rows, 4096, 31), q, w)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("group", [257, 65535])
@pytest.mark.parametrize("name", PARTS)
def test_the_longest_rows_are_multiplied_as_integers(bits: int, group: int, name: str) -> None:
    rand = Random(f"longest {bits} {group} {name}")
    q, w = of_integers(rand, 4, 65535, bits, group, **PARTS[name])
    for rows in (1, 20):
        check_integers(integers(rand, rows, 65535, 5), q, w)


@compiled
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("bits", "columns", "code", "zero", "lut"),
    [
        (8, 66311, 255, None, None),
        (8, 66311, 255, 128.0, None),
        (8, 66311, 0, 128.0, None),
        (7, 131072, 127, None, None),
        (4, 131072, 15, 8.0, None),
        (4, 66311, 15, None, 127),
        (4, 66311, 15, None, -128),
    ],
)
def test_the_largest_sums_stay_in_32_bits(
    rows: int, sign: int, bits: int, columns: int, code: int, zero: float | None, lut: int | None
) -> None:
    """The longest group that is allowed, with the largest codes and inputs there are."""
    codes = torch.full((3, columns), code)
    table = None if lut is None else torch.tensor([[-128, *[0] * 14, lut]], dtype=torch.int8)
    q = QTensor.from_codes(
        codes, torch.ones(3, 1), bits=bits, zero=None if zero is None else torch.full((1, 1), zero), lut=table
    )
    y = ops.qlinear(torch.full((rows, columns), 127.0 * sign), q, activations="int8").double()
    expected = 127.0 * sign * columns * ((code if lut is None else lut) - (zero or 0))
    assert ((y - expected).abs() <= 2**-22 * abs(expected)).all()


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("rows", ["1", "2", "3", "9", "131", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_agrees_with_its_reference(name: str, rows: str, dtype: torch.dtype) -> None:
    args = list(product_args(Random(name), name, ROWS[rows], True, "int8"))
    args[0], args[6] = args[0].to(dtype), args[6].to(dtype)
    y, r = OPERATORS["qlinear"].overload(*args), OPERATORS["qlinear"].reference(args[0].double(), *args[1:])
    assert y.dtype == dtype
    # Rounded once to the dtype, after a sum in fp32 of integers times scales.
    if r.numel():
        eps, largest = torch.finfo(dtype).eps, r.abs().max()
        allowed = 4 * eps * largest + 1e-5 if dtype == torch.float32 else eps * r.abs() + 1e-5 * (1 + largest)
        assert ((y.double() - r).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [9, 32])
@pytest.mark.parametrize("group", [None, 1024])
def test_sums_of_long_groups_do_not_drown_in_their_offset(rows: int, group: int | None) -> None:
    """Bytes of the weight are stored above zero: with inputs of one sign what is taken off is a hundred times the result."""
    rand = Random(f"long groups {rows} {group}")
    q = ops.quantize_weight(rand.normal(64, 4096), "absmax", bits=8, group_size=group)
    x = 1 + 0.01 * rand.normal(rows, 4096)
    y = ops.qlinear(x, q, activations="int8").double()
    codes, scale = int8_activations(x)
    r = (codes.double() * scale.double()) @ q.dequantize().double().t()
    assert (y - r).abs().max() <= 3e-6 * r.abs().max()


def test_a_row_that_is_not_finite_spoils_itself_alone() -> None:
    (n, columns, bits, group), w = parts(Random("x"), "4bits_g32")
    x = torch.randn(3, columns)
    x[0, 3], x[1, 2] = torch.nan, torch.inf
    q = QTensor(w[0], w[1], (n, columns), bits, group, w[2])
    y = ops.qlinear(x, q, activations="int8")
    assert y[:2].isnan().all() and y[2].isfinite().all()


def test_the_gradient_passes_through_the_rounding() -> None:
    (n, columns, bits, group), w = parts(Random("x"), "4bits_g32")
    x = torch.randn(5, columns, requires_grad=True)
    q = QTensor(w[0], w[1].requires_grad_(), (n, columns), bits, group, w[2])
    ops.qlinear(x, q, activations="int8").sum().backward()
    assert torch.allclose(x.grad, q.dequantize().detach().sum(0).expand_as(x), atol=1e-4)
    scale = w[1].detach().clone().requires_grad_()
    args = (x.detach(), w[0], scale, w[2], None, None, None, bits, group, "int8")
    OPERATORS["qlinear"].reference(*args).sum().backward()
    assert torch.allclose(w[1].grad, scale.grad, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------- packed layouts


def test_what_changed_is_packed_again() -> None:
    """Layouts are kept by the identity of the tensors; in-place changes, new tensors in old memory, views all count."""
    (n, columns, bits, group), w = parts(Random("x"), "4bits_g32")
    x = torch.randn(3, columns)

    def agree(q: QTensor) -> None:
        assert torch.allclose(ops.qlinear(x, q), x @ q.dequantize().t(), atol=1e-4)

    q = QTensor(w[0].clone(), w[1].clone(), (n, columns), bits, group, w[2].clone())
    agree(q)
    q.scale.mul_(2)
    agree(q)
    q.codes.bitwise_not_()
    agree(q)
    q.zero.add_(1)
    agree(q)
    agree(q.replace(scale=q.scale + 1))
    agree(q.replace(lut=torch.randn(1, 16)))
    agree(QTensor(q.codes[16:], q.scale[16:], (n - 16, columns), bits, group))
    agree(QTensor(q.codes, torch.ones(n, 1), (n, columns), bits, columns))
    for _ in range(20):  # memory is used again
        agree(QTensor(torch.randint(0, 256, (n, 32), dtype=torch.uint8), torch.rand(n, 2), (n, columns), 4, 32))
    with torch.inference_mode():
        agree(QTensor(q.codes.clone(), q.scale.clone(), (n, columns), bits, group))


def test_the_number_of_threads_changes_nothing() -> None:
    rand = Random("threads")
    w = weight(rand, 200, 256, 4, 64, zero="bytes")
    for rows in (1, 4, 40, 600, 1100):
        x, dy = rand.normal(rows, 256), rand.normal(rows, 200)
        calls = [
            lambda x=x: OPERATORS["qlinear"].overload(x, *w, None, 4, 64, "exact"),
            lambda x=x: OPERATORS["qlinear"].overload(x, *w, None, 4, 64, "int8"),
            lambda x=x, dy=dy: OPERATORS["qlinear_backward"].overload(dy, x, *w, 4, 64, 256, "exact", True)[:2],
        ]
        for call in calls:
            results = []
            for count in (1, 2, 3):
                with threads(count):
                    results.append(call())
            flat = [torch.cat([t.flatten() for t in r]) if isinstance(r, tuple) else r for r in results]
            assert all(torch.equal(flat[0], other) for other in flat[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 70, 200, 520])
def test_long_sums_are_the_same_for_any_number_of_threads(rows: int, dtype: torch.dtype) -> None:
    """Of 2,048 products, by tiles and by the library, which cuts so long a sum otherwise for one thread than for several."""
    sizes, rest = (96, 2048, 4, 128), {"zero": "bytes"}
    rand = Random("long sums")
    codes, scale, zero, offset, lut = weight(rand, *sizes, **rest)
    q = QTensor(codes, scale, (96, 2048), 4, 128, zero, offset, lut)
    x = rand.normal(2048, rows).to(dtype).t()
    grad = rand.normal(rows, 96).to(dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            leaf = x.detach().requires_grad_()
            y = ops.qlinear(leaf, q)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ------------------------------------------------------------------------------------------------------ the way


def way(x: Tensor, q: QTensor, activations: str = "exact") -> str:
    (call,) = explain("qlinear", x, q, activations=activations)
    return call["kernel"]


@compiled
@pytest.mark.parametrize("rows", [131, 600])
def test_many_rows_in_bf16(rows: int) -> None:
    """Odd sizes, both ways, and the same bits for any number of threads: some processors multiply on tiles."""
    n, columns = 1100, 328
    rand = Random("many rows")
    codes, scale, zero, offset, lut = weight(rand, n, columns, 4, columns, zero="bytes")
    x, grad = rand.normal(rows, columns).bfloat16(), rand.normal(rows, n).bfloat16()
    forward = (x, codes, scale, zero, offset, lut, None, 4, columns, "exact")
    backward = (grad, None, codes, scale, zero, offset, lut, 4, columns, columns, "exact", True)
    for name, args in (("qlinear", forward), ("qlinear_backward", backward)):
        operator = OPERATORS[name]
        exact, plain = (
            r if isinstance(r, Tensor) else r[0]
            for r in (operator.reference(args[0].double(), *args[1:]), operator.reference(*args))
        )
        found = []
        for count in (1, 2, 3):
            with threads(count):
                y = operator(*args)
            found.append(y if isinstance(y, Tensor) else y[0])
        check_close(name, found[0], exact, plain, factor=2, scale=float(exact.abs().max()))
        assert all(torch.equal(found[0], y) for y in found), f"{name} depends on the number of threads"


def right_for_any_threads(x: Tensor, *rest: Any) -> Tensor:
    """The product, which is right, and the same bits for one to three threads."""
    operator, found = OPERATORS["qlinear"], []
    exact, plain = operator.reference(x.double(), *rest), operator.reference(x, *rest)
    for count in (1, 2, 3):
        with threads(count):
            found.append(operator(x, *rest))
    check_close("qlinear", found[0], exact, plain, factor=2, scale=float(exact.abs().max()))
    assert all(torch.equal(found[0], y) for y in found)
    y: Tensor = found[0]
    return y


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "columns"), [(64, 64), (70, 100), (130, 512), (33, 1), (128, 1024)])
@pytest.mark.parametrize("kind", ["uniform", "zero", "palette"])
def test_many_rows_of_bytes_and_a_small_weight(n: int, columns: int, dtype: torch.dtype, kind: str) -> None:
    """One scale a row; sizes that fill the registers of a product and that do not, with a bias; the same bits for any number
    of threads and for any rows beside a row, also where some of them are zero or not finite."""
    rand = Random(f"small {n} {columns} {kind}")
    parts: dict[str, Any] = {"uniform": {}, "zero": {"zero": "floats"}, "palette": {"lut": 1, "int8": True}}[kind]
    codes, scale, zero, offset, lut = weight(rand, n, columns, 4, columns, **parts)
    x, bias = rand.normal(197, columns).to(dtype), rand.normal(n)
    operator, rest = OPERATORS["qlinear"], (codes, scale, zero, offset, lut, bias, 4, columns, "int8")
    found = right_for_any_threads(x, *rest)
    assert torch.equal(operator(x[:131], *rest), found[:131]) and torch.equal(operator(x[66:], *rest), found[66:])
    odd = x.clone()
    odd[5], odd[70, 0], odd[71, -1] = 0, float("nan"), float("inf")
    y = operator(odd, *rest)
    assert torch.equal(y[72:], found[72:]) and torch.equal(y[:5], found[:5])
    torch.testing.assert_close(y[[5, 70, 71]], operator(odd[[5, 70, 71]], *rest), equal_nan=True)


ONCE = "the weight decoded to floats once, as it is small"


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize(
    ("n", "columns", "group"), [(64, 64, 32), (70, 50, 50), (96, 33, 33), (17, 1, 1), (33, 300, 300), (128, 1024, 128)]
)
def test_many_rows_and_a_small_weight(n: int, columns: int, group: int, bits: int, dtype: torch.dtype) -> None:
    """Sizes that fill the registers of a product and that do not, with a bias and without; the same bits for any number of
    threads and for any rows beside a row."""
    rand = Random(f"dense {n} {columns}")
    codes, scale, zero, offset, lut = weight(rand, n, columns, bits, group, zero="floats")
    x, bias = rand.normal(197, columns).to(dtype), rand.normal(n)
    operator = OPERATORS["qlinear"]
    for added in (None, bias):
        rest = (codes, scale, zero, offset, lut, added, bits, group, "exact")
        found = right_for_any_threads(x, *rest)
        assert torch.equal(operator(x.t().contiguous().t(), *rest), found)
        assert torch.equal(operator(x[:131], *rest), found[:131]) and torch.equal(operator(x[66:], *rest), found[66:])
    low = rand.normal(3, columns).to(dtype), rand.normal(n, 3).to(dtype)
    args = (x, codes, scale, zero, offset, lut, bias, *low, 0.5, bits, group)
    operator = OPERATORS["qlora_linear"]
    (y, *_), (plain, *_) = operator(*args), operator.reference(*args)
    exact, *_ = operator.reference(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    )
    check_close("qlora_linear", y, exact, plain, factor=2, scale=float(exact.abs().max()))


@compiled
def test_when_a_small_weight_is_decoded_once() -> None:
    codes, scale, zero, offset, lut = weight(Random("when"), 32, 48, 4, 48)
    q = QTensor(codes, scale, (32, 48), 4, 48, zero, offset, lut)
    for x, once in (
        (torch.ones(64, 48), True),
        (torch.ones(4, 16, 48), True),
        (torch.ones(64, 48).half(), True),
        (torch.ones(63, 48), False),
        (torch.ones(0, 48), False),
    ):
        assert (ONCE in way(x, q)) is once, x.shape
        assert ops.qlinear(x, q).shape == (*x.shape[:-1], 32)
    assert ONCE not in way(torch.ones(64, 48), q, "int8")
    larger = ops.quantize_weight(torch.randn(4096, 64), "absmax", bits=4, group_size=64)
    assert ONCE not in way(torch.ones(4096, 64), larger)


@compiled
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["4bits_g32", "2bits_wide", "palette_of_bytes"])
def test_the_ways_meet_where_explain_says(activations: str, dtype: torch.dtype, name: str) -> None:
    """Both sides of the limit between the two loops, and of the 64 rows that a tile is multiplied by at a time."""
    sizes, rest = ((40, 512, 2, 512), {"zero": "bytes"}) if name == "2bits_wide" else WEIGHTS[name]
    rand = Random(name)
    codes, scale, zero, offset, lut = weight(rand, *sizes, **rest)
    n, columns, bits, group = sizes
    q = QTensor(codes, scale, (n, columns), bits, group, zero, offset, lut)
    first = way(torch.ones(1, columns, dtype=dtype), q, activations)
    found = re.search(r"registers: 1 row(, up to (\d+))?$", first)
    assert found is not None, first
    limit = int(found[2] or 12)  # without one, those that are decoded for at a time
    assert "registers" in way(torch.ones(limit, columns, dtype=dtype), q, activations)
    beyond = way(torch.ones(limit + 1, columns, dtype=dtype), q, activations)
    assert re.search(
        rf"tiles of the weight decoded to (bytes|floats|pairs of bf16): {limit + 1} rows, more than {limit}"
        rf"|the weight decoded to bytes once, as it is small: {limit + 1} rows, {limit + 1} or more"
        if found[2]
        else r"decoded (to pairs of bf16 )?in registers: 13 rows$",
        beyond,
    ), beyond
    beyond = way(torch.ones(512, columns, dtype=dtype), q, activations)
    assert activations == "int8" or re.search(
        r"library's product: 512 rows, 512 or more$|pairs of bf16|scales included|floats once, as it is small: 512 rows",
        beyond,
    ), beyond
    x = rand.normal(517, columns).to(dtype)
    expected = OPERATORS["qlinear"].reference(
        x.double(), codes, scale, zero, offset, lut, None, bits, group, activations
    )
    # Rounded once to the dtype, after a sum in fp32 whose error grows with the sum of the terms' sizes.
    terms = (x.abs().float() @ q.dequantize().abs().t()).amax()
    bound = 2 * torch.finfo(dtype).eps * expected.abs().amax() + 4 * torch.finfo(torch.float32).eps * terms
    for rows in (limit, limit + 1, 64, 65, 131, 512, 517):
        y = ops.qlinear(x[:rows], q, activations=activations)
        assert (y.double() - expected[:rows]).abs().amax() <= bound


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["5bits", "palette", "palettes_of_rows", "6bits_g16"])
def test_many_rows_are_the_library_s(name: str, dtype: torch.dtype) -> None:
    """With a bias and a low-rank term, of a packed layout (also over several slabs) and of codes as they are stored."""
    large = {"5bits": (700, 2048, 5, 32), "palette": (719, 200, 4, 200)}  # smaller ones are decoded once
    sizes, rest = large.get(name, WEIGHTS[name][0]), WEIGHTS[name][1]
    rand = Random(name)
    codes, scale, zero, offset, lut = weight(rand, *sizes, **rest)
    n, columns, bits, group = sizes
    q = QTensor(codes, scale, (n, columns), bits, group, zero, offset, lut)
    x, bias = rand.normal(520, columns).to(dtype), rand.normal(n)
    assert re.search("library's product|pairs of bf16|scales included", way(x, q)), way(x, q)
    a, b = rand.normal(3, columns), rand.normal(n, 3)
    w = q.dequantize().double()
    expected = x.double() @ w.t() + bias.double()
    size = expected.abs().amax()
    low = (x @ a.to(dtype).t()).double()
    bound = 2 * torch.finfo(dtype).eps * size + 16 * torch.finfo(torch.float32).eps * size
    assert (ops.qlinear(x, q, bias).double() - expected).abs().amax() <= bound
    y = ops.qlora_linear(x, q, a, b, bias=bias).double()
    more = expected + low @ b.double().t()
    assert (y - more).abs().amax() <= 4 * torch.finfo(dtype).eps * more.abs().amax() + bound


@compiled
@pytest.mark.parametrize(("bits", "zero"), [(4, 8.0), (8, 128.0), (4, 7.5)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_long_rows_of_bytes_lose_nothing(bits: int, zero: float, rows: int) -> None:
    """A zero point that all share comes off sums of integers: where it is whole, what is left is exact in fp32."""
    rand = Random("long")
    codes = (rand.uniform(20, 16384) * (1 << bits)).floor().to(torch.uint8)
    q = QTensor.from_codes(codes, torch.ones(20, 1), bits=bits, group_size=16384, zero=torch.full((1, 1), zero))
    x = rand.normal(rows, 16384)
    p, a = int8_activations(x)
    expected = p.double() @ (codes.double() - zero).t()
    y = ops.qlinear(x, q, activations="int8").double() / a.double()
    tolerance = 2**-22 if zero == int(zero) else 2**-12
    assert ((y - expected).abs() <= tolerance * expected.abs().clamp(min=expected.abs().mean())).all()


@compiled
def test_explain_names_the_exceptions() -> None:
    codes, scale, *_ = weight(Random("x"), 8, 40, 4, 20)
    assert "from the stored codes" in way(torch.ones(1, 40), QTensor(codes, scale, (8, 40), 4, 20))
    codes, scale, _, _, lut = weight(Random("x"), 16, 32, 6, 32, lut=1, int8=True)
    q = QTensor(codes, scale, (16, 32), 6, 32, lut=lut)
    assert "a table of more than 16 entries" in way(torch.ones(1, 32), q, "int8")
    assert "registers" in way(torch.ones(1, 32), q)
    wide = q.replace(scale=scale.double())
    assert "parts in fp64" in way(torch.ones(1, 32), wide)
    (call,) = explain("qlora_linear", torch.ones(70, 32), q, torch.ones(2, 32), torch.ones(16, 2))
    assert f"{ONCE}: 70 rows" in call["kernel"]
    (call,) = explain("qlora_linear", torch.ones(60, 32), q, torch.ones(2, 32), torch.ones(16, 2))
    assert "tiles of the weight decoded to floats: 60 rows" in call["kernel"]


# ---------------------------------------------------------------------------------------------------- the tensor


def test_a_permuted_weight() -> None:
    perm = torch.randperm(32)
    q = QTensor.from_codes(torch.randint(0, 16, (6, 32)), torch.rand(6, 2), bits=4, perm=perm)
    plain = q.replace(perm=None).dequantize()
    assert torch.equal(q.dequantize()[:, perm], plain)
    x = torch.randn(4, 32)
    assert torch.allclose(ops.qlinear(x, q), x @ q.dequantize().t(), atol=1e-5)
    a, b = torch.randn(2, 32), torch.randn(6, 2)
    expected = x @ (q.dequantize() + 0.5 * b @ a).t()
    assert torch.allclose(ops.qlora_linear(x, q, a, b, 0.5), expected, atol=1e-4)


def test_tensors_there_and_back() -> None:
    q = QTensor.from_codes(
        torch.randint(0, 8, (6, 32)), torch.rand(6, 2), bits=3, lut=torch.randn(2, 8), dtype=torch.bfloat16, format="x"
    )
    again = q.map(lambda t: t.clone())
    assert torch.equal(again.dequantize(), q.dequantize())
    assert (again.shape, again.bits, again.group_size, again.dtype, again.format) == (
        (6, 32),
        3,
        16,
        torch.bfloat16,
        "x",
    )
    nested = ops.NestedScale(
        torch.randint(0, 256, (6, 2), dtype=torch.uint8), torch.rand(256), torch.rand(3), torch.tensor(0.5), 4
    )
    q = q.replace(scale=nested)
    assert torch.equal(q.map(lambda t: t.clone()).scales(), nested.dequantize())
    assert q.nbytes == sum(t.nbytes for t in q.tensors().values())
    assert "groups of 16" in repr(q)


def test_saved_for_backward_is_what_is_needed() -> None:
    (n, columns, bits, group), w = parts(Random("x"), "4bits_g32")
    saved: list[Tensor] = []
    q = QTensor(w[0], w[1], (n, columns), bits, group, w[2])
    x = torch.randn(50, columns, requires_grad=True)
    a, b = torch.randn(4, columns), torch.randn(n, 4, requires_grad=True)

    def elements() -> int:
        return sum(t.numel() for t in saved if t.dtype == torch.float32)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.qlinear(x, q)
        assert elements() == w[1].numel()
        saved.clear()
        ops.qlora_linear(x, q, a, b)
        assert elements() == w[1].numel() + a.numel() + b.numel() + 50 * 4


def test_compiled() -> None:
    (n, columns, bits, group), w = parts(Random("x"), "4bits_g32")
    q = QTensor(w[0], w[1], (n, columns), bits, group, w[2])
    x = torch.randn(3, columns)
    compiled = torch.compile(lambda x: ops.qlinear(x, q) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.qlinear(x, q) * 2)


def plain_weight(**changes: Any) -> QTensor:
    parts = {"codes": torch.zeros(33, 32, dtype=torch.uint8), "scale": torch.ones(33, 2), "shape": (33, 64)}
    return QTensor(**{**parts, "bits": 4, "group_size": 32, **changes})


def refused(**changes: Any) -> Callable[[], object]:
    def call() -> object:
        made = {k: v() if callable(v) else v for k, v in changes.items()}
        return plain_weight(**made)

    return call


def multiplied(**changes: Any) -> Callable[[], object]:
    def call() -> object:
        made = {k: v() if callable(v) else v for k, v in changes.items()}
        q = plain_weight(lut=made.pop("lut", None))
        return ops.qlinear(**{"input": torch.zeros(2, 64), "weight": q, **made})

    return call


REFUSALS = [
    Refusal("bits", refused(bits=9), ValueError, "QTensor: bits must be between 1 and 8, got 9"),
    Refusal("codes", refused(codes=lambda: torch.ones(33, 32)), TypeError, "QTensor: codes must be uint8, got torch.float32"),
    Refusal(
        "codes_shape", refused(bits=3), ValueError,
        "QTensor: codes must have shape [N, 24] (64 columns of 3 bits), got [33, 32]",
    ),
    Refusal("rows", refused(shape=(32, 64)), ValueError, "QTensor: codes must have a row for each of 32 rows, got shape [33, 32]"),
    Refusal(
        "group", refused(group_size=24), ValueError,
        "QTensor: group_size must be positive and divide the 64 columns, got 24",
    ),
    Refusal("scale", refused(scale=lambda: torch.ones(33, 3)), ValueError, "QTensor: scale must have shape [33, 2], got [33, 3]"),
    Refusal(
        "scale_dtype", refused(scale=lambda: torch.ones(33, 2).int()), TypeError,
        "QTensor: scale must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "zero", refused(zero=lambda: torch.ones(33, 3)), ValueError,
        "QTensor: zero must have shape [33, 2] or [1, 1], got [33, 3]",
    ),
    Refusal(
        "zero_dtype", refused(zero=lambda: torch.ones(33, 2).int()), TypeError,
        "QTensor: zero must be uint8 or a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "lut", refused(lut=lambda: torch.ones(1, 15)), ValueError,
        "QTensor: lut must have shape [P, 16] with P from 1 to 33, got [1, 15]",
    ),
    Refusal(
        "perm", refused(perm=lambda: torch.arange(3)), ValueError,
        "QTensor: perm must be int64 of shape [64], got torch.int64 [3]",
    ),
    Refusal("dtype", refused(dtype=torch.int8), TypeError, "QTensor: dtype must be a floating-point type, got torch.int8"),
    Refusal(
        "codes_range", lambda: QTensor.from_codes(torch.tensor([[4]]), None, bits=2), ValueError,
        "QTensor.from_codes: codes must be in 0 to 3, got 4 to 4", data=True,
    ),
    Refusal(
        "codes_float", lambda: QTensor.from_codes(torch.ones(2, 2), None, bits=2), ValueError,
        "QTensor.from_codes: codes must be integers of shape [N, K], got torch.float32 [2, 2]",
    ),
    Refusal("weight", lambda: ops.qlinear(torch.ones(2, 2), "w"), TypeError, "qlinear: weight must be a QTensor, got str"),
    Refusal("weight_2", lambda: ops.dequantize(2), TypeError, "dequantize: weight must be a QTensor, got int"),
    Refusal(
        "input", multiplied(input=lambda: torch.ones(2, 63)), ValueError,
        "qlinear: input must have shape [..., 64], got [2, 63]",
    ),
    Refusal("input_none", multiplied(input=None), TypeError, "qlinear: input must be a tensor, got NoneType"),
    Refusal(
        "input_dtype", multiplied(input=lambda: torch.ones(2, 64).int()), TypeError,
        "qlinear: input must be a floating-point tensor, got torch.int32",
    ),
    Refusal("bias", multiplied(bias=lambda: torch.ones(3)), ValueError, "qlinear: bias must have shape [33], got [3]"),
    Refusal("bias_list", multiplied(bias=[1.0]), TypeError, "qlinear: bias must be a tensor, got list"),
    Refusal(
        "activations", multiplied(activations="int4"), ValueError,
        "qlinear: activations must be one of exact, int8, got 'int4'",
    ),
    Refusal(
        "int8_columns",
        lambda: ops.qlinear(
            torch.zeros(2, 66312),
            plain_weight(codes=torch.zeros(33, 66312, dtype=torch.uint8), scale=torch.ones(33, 1), shape=(33, 66312), bits=8,
                         group_size=66312),
            activations="int8",
        ),
        ValueError, "qlinear: int8 activations take groups of at most 66311 columns with bits=8 (sums stay in 32 bits), got 66312",
    ),
    Refusal(
        "int8_columns_lut",
        lambda: ops.qlinear(
            torch.zeros(2, 66312),
            plain_weight(codes=torch.zeros(33, 33156, dtype=torch.uint8), scale=torch.ones(33, 1), shape=(33, 66312),
                         group_size=66312, lut=torch.zeros(1, 16, dtype=torch.int8)),
            activations="int8",
        ),
        ValueError,
        "qlinear: int8 activations take groups of at most 66311 columns with an int8 lut (sums stay in 32 bits), got 66312",
    ),
    Refusal(
        "int8_lut", multiplied(activations="int8", lut=lambda: torch.ones(1, 16)), ValueError,
        "qlinear: int8 activations need uniform codes or an int8 lut, got a lut of torch.float32",
    ),
    Refusal(
        "lora_a",
        lambda: ops.qlora_linear(torch.ones(2, 64), plain_weight(), torch.ones(2, 63), torch.ones(33, 2)), ValueError,
        "qlora_linear: lora_a must have shape [R, 64], got [2, 63]",
    ),
    Refusal(
        "lora_b",
        lambda: ops.qlora_linear(torch.ones(2, 64), plain_weight(), torch.ones(2, 64), torch.ones(33, 3)), ValueError,
        "qlora_linear: lora_b must have shape [33, 2], got [33, 3]",
    ),
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


def test_a_trained_weight_is_refused_by_lora() -> None:
    (n, columns, bits, group), w = parts(Random("x"), "4bits_g32")
    q = QTensor(w[0], w[1].requires_grad_(), (n, columns), bits, group)
    with pytest.raises(RuntimeError, match="qlora_linear: the weight is frozen"):
        ops.qlora_linear(torch.ones(2, columns), q, torch.ones(2, columns), torch.ones(n, 2))


def test_examples() -> None:
    from cofire.ops import lowbit, qtensor

    check_examples(lowbit)
    check_examples(qtensor)
