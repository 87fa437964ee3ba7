# SPDX-License-Identifier: Apache-2.0
"""Masked and compressed products: every format by every provider, and what the masks promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cofire import native, ops
from cofire.ops import SparseWeight, sparse
from cofire.ops.packing import pack_bits
from helpers import Random, Refusal, Sample, check_examples, check_op, refusals, threads
from laws import given, settings, st

FORMATS = ("csr", "delta", "bitmap", "block")


def bits_of(mask: Tensor) -> Tensor:
    return pack_bits(mask.flatten(1).to(torch.uint8), 1)


def without_gradients(checks: list[Any]) -> list[Any]:
    """Where the gradient is none (packed for inference) or is defined, not derived: other tests are about it."""
    return [check for check in checks if not check.id.startswith("gradient")]


# ------------------------------------------------------------------------------------------------ apply_mask


def weight_and_bits(*shape: int, density: float = 0.5) -> Callable[[Random], tuple[Any, ...]]:
    def make(rand: Random) -> tuple[Any, ...]:
        return rand.normal(*shape), bits_of(rand.mask(*shape, density=density))

    return make


APPLY = [
    Sample("odd", weight_and_bits(5, 17)),
    Sample("convolution", weight_and_bits(3, 5, 3, 3)),
    Sample("long", weight_and_bits(3, 1030)),
    Sample("none", weight_and_bits(3, 9, density=0.0)),
    Sample("no_rows", weight_and_bits(0, 7)),
]
TINY_APPLY = [Sample("tiny", weight_and_bits(2, 9)), Sample("tiny_resized", weight_and_bits(3, 17))]


@pytest.mark.parametrize("check", check_op("apply_mask", APPLY, tiny=TINY_APPLY))
def test_apply_mask(check: Callable[[], None]) -> None:
    check()


# --------------------------------------------------------------------------------------------- masked_linear


def layer(
    rows: int, n: int, k: int, mode: str, *, bias: bool = True, density: float = 0.5
) -> Callable[[Random], tuple[Any, ...]]:
    def make(rand: Random) -> tuple[Any, ...]:
        mask = rand.mask(n, k, density=density)
        w = rand.normal(n, k)
        if mode == "invariant":
            w = torch.where(mask, w, 0.0)
        return rand.normal(rows, k), w, bits_of(mask), rand.normal(n) if bias else None, mode, 0.25

    return make


def layer_backward(rows: int, n: int, k: int, mode: str, wanted: tuple[bool, bool] = (True, True)) -> Any:
    def make(rand: Random) -> tuple[Any, ...]:
        x, w, bits, _, mode_, decay = layer(rows, n, k, mode)(rand)
        return rand.normal(rows, n), x, w, bits, mode_, decay, *wanted

    return make


LINEAR = [
    *(Sample(f"{mode}", layer(3, 5, 17, mode)) for mode in sparse.MODES),
    Sample("no_bias", layer(2, 17, 9, "hard", bias=False)),
    Sample("nothing", layer(0, 3, 9, "hard")),
    Sample("many", layer(33, 65, 129, "hard"), full=True),
]
BACKWARD = [
    *(Sample(f"{mode}", layer_backward(3, 5, 17, mode)) for mode in sparse.MODES),
    Sample("input", layer_backward(3, 5, 17, "hard", (True, False))),
    Sample("weight", layer_backward(3, 5, 17, "hard", (False, True))),
]
TINY_LINEAR = [Sample("tiny", layer(2, 3, 9, "hard")), Sample("tiny_resized", layer(3, 4, 10, "hard"))]
TINY_BACKWARD = [
    Sample("tiny", layer_backward(2, 3, 9, "srste")),
    Sample("tiny_resized", layer_backward(3, 4, 10, "srste")),
]


@pytest.mark.parametrize(
    "check",
    [
        *check_op("masked_linear", [*LINEAR[:2], *LINEAR[4:]], tiny=TINY_LINEAR, by_library=True),
        *without_gradients(check_op("masked_linear", LINEAR[2:4], tiny=(), by_library=True)),
        *check_op("masked_linear_backward", BACKWARD, tiny=TINY_BACKWARD, by_library=True),
    ],
)
def test_masked_linear(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("mode", sparse.MODES)
def test_gradients_of_the_modes(mode: str) -> None:
    """Against autograd of the expression that defines each."""
    rand = Random("modes")
    mask = rand.mask(5, 17)
    w = torch.where(mask, rand.normal(5, 17), 0.0) if mode == "invariant" else rand.normal(5, 17)
    x, g = rand.normal(4, 17), rand.normal(4, 5)
    ours = [t.clone().requires_grad_() for t in (x, w)]
    ops.masked_linear(*ours, bits_of(mask), mode=mode, decay=0.25).backward(g)
    a, b = (t.clone().requires_grad_() for t in (x, w))
    (a @ (b * mask).t()).backward(g)
    expected = b.grad
    if mode in ("ste", "srste"):
        expected = g.t() @ x
    if mode == "srste":
        expected = expected + 0.25 * torch.where(mask, 0.0, w)
    torch.testing.assert_close(ours[0].grad, a.grad)
    torch.testing.assert_close(ours[1].grad, expected)
    if mode in ("hard", "invariant"):
        assert (ours[1].grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_pruned_never_leaks(dtype: torch.dtype) -> None:
    rand = Random("leak")
    mask = rand.mask(5, 17)
    mask[0, 0] = True
    clean = rand.normal(5, 17).to(dtype)
    x = rand.normal(3, 17).to(dtype)
    for value in (torch.nan, torch.inf, -torch.inf):
        w = torch.where(mask, clean, value)
        assert torch.equal(ops.apply_mask(w, bits_of(mask)), torch.where(mask, clean, 0.0))
        ours = [t.clone().requires_grad_() for t in (x, w)]
        y = ops.masked_linear(*ours, bits_of(mask))
        assert torch.equal(y, ops.masked_linear(x, clean, bits_of(mask)))
        y.sum().backward()
        assert ours[0].grad.isfinite().all() and ours[1].grad.isfinite().all()
        for format in FORMATS:
            packed = SparseWeight.from_dense(w, mask, format)
            assert torch.equal(packed.to_dense(), torch.where(mask, clean, 0.0))
            assert ops.spmm(x, packed).isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_nan_in_the_input_reaches_what_is_kept(format: str, rows: int) -> None:
    """Where an index says what is kept, nothing else; a bitmap is multiplied with its zeros, as a dense weight is."""
    rand = Random("nan")
    mask = rand.mask(48, 40)
    mask[:16] = mask[:1]
    mask[16:32, 7], mask[32:, 7] = True, False
    w, x = rand.normal(48, 40), rand.normal(rows, 40)
    clean = ops.spmm(x, SparseWeight.from_dense(w, mask, format, block=(16, 1)))
    x[0, 7] = torch.nan
    y = ops.spmm(x, SparseWeight.from_dense(w, mask, format, block=(16, 1)))
    assert y[0, mask[:, 7]].isnan().all()
    assert torch.equal(y[1:], clean[1:])
    if format != "bitmap" and native.STATUS.variant is not None:  # the reference multiplies zeros too
        assert torch.equal(y[0, ~mask[:, 7]], clean[0, ~mask[:, 7]])


@pytest.mark.parametrize("format", FORMATS)
def test_a_kept_zero_stays_with_its_sign(format: str) -> None:
    """The mask says what is kept, not the values: zeros of either sign are stored, and come back."""
    w = torch.tensor([[0.0, -0.0, 2.0, -1.0]]).repeat(16, 1)
    mask = torch.tensor([[True, True, True, False]]).repeat(16, 1)
    packed = SparseWeight.from_dense(w, mask, format, block=(16, 1))
    assert torch.equal(packed.mask(), mask)
    back = packed.to_dense()
    assert torch.equal(back, torch.where(mask, w, 0.0))
    assert torch.equal(back.signbit(), torch.where(mask, w, 0.0).signbit())
    x = torch.tensor([[-1.0, 1.0, 0.5, 3.0]])
    assert torch.equal(ops.spmm(x, packed), torch.ones(1, 16))
    bits = bits_of(mask)
    assert torch.equal(ops.apply_mask(w, bits).signbit(), torch.where(mask, w, 0.0).signbit())
    assert torch.equal(ops.masked_linear(x, w, bits), torch.ones(1, 16))


#: rows of the input, rows and columns of the weight
SHAPES = list(
    zip(
        (0, 1, 2, 3, 7, 8, 9, 16, 17, 64, 1000, 1, 17, 4, 300),
        (1, 15, 17, 16, 48, 1, 33, 64, 15, 17, 16, 64, 32, 15, 17),
        (1, 15, 16, 17, 63, 64, 65, 130, 1, 15, 63, 4096, 11008, 4096, 64),
        strict=True,
    )
)


#: The same, with the extremes crossed.
EXTREMES = [(m, n, k) for m in (0, 1, 17, 64) for n in (1, 15, 17, 65) for k in (1, 15, 17, 65)]
DTYPES = (torch.float32, torch.bfloat16)


def close(got: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """Within the rounding of sums of so many terms in fp32, and of the result to its own dtype."""
    rounding = 4 * torch.finfo(torch.float32).eps * max(terms, 1) ** 0.5
    largest = float(expected.abs().amax()) if expected.numel() else 0.0
    result = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else 0.0
    assert ((got.double() - expected).abs() <= rounding * (1 + largest) + result * expected.abs()).all()


def with_holes(rand: Random, n: int, k: int, density: float) -> Tensor:
    """A mask; if there is room for them, with an empty row and an empty column."""
    mask = rand.uniform(n, k) < density
    if n > 2:
        mask[n // 2] = False
    if k > 2:
        mask[:, k // 3] = False
    return mask


def check_products(format: str, m: int, n: int, k: int, mask: Tensor, dtype: torch.dtype) -> None:
    """A product and its gradients against fp64."""
    rand = Random(f"{m} {n} {k}")
    if format == "block":  # (those at the edge are cut off)
        mask = mask[::16].repeat_interleave(16, 0)[:n]
    w = torch.where(mask, rand.normal(n, k), 0.0).to(dtype)
    x, g = rand.normal(m, k).to(dtype).requires_grad_(), rand.normal(m, n).to(dtype)
    packed = SparseWeight.from_dense(w, mask, format, block=(16, 1))
    trained = format in ("csr", "block")  # the others are for inference
    packed.values.requires_grad_(trained)
    y = ops.spmm(x if trained else x.detach(), packed)
    assert y.dtype == dtype
    wide, a, b = w.double(), x.detach().double(), g.double()

    close(y, a @ wide.t(), k)
    if trained:
        y.backward(g)
        assert x.grad is not None and packed.values.grad is not None
        close(x.grad, b @ wide, n)
        close(packed.replace(values=packed.values.grad).to_dense(), torch.where(mask, b.t() @ a, 0.0), m)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("format", FORMATS)
def test_shapes_and_densities(format: str, density: float) -> None:
    """Products and gradients of every size."""
    for m, n, k in SHAPES:
        check_products(format, m, n, k, Random(f"{m} {n} {k} {density}").uniform(n, k) < density, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("format", FORMATS)
def test_extremes_of_shapes(format: str, density: float, dtype: torch.dtype) -> None:
    """All of them with each other, with rows and columns of which nothing is kept, in 16 bits too."""
    for m, n, k in EXTREMES:
        check_products(format, m, n, k, with_holes(Random(f"{m} {n} {k} {density}"), n, k, density), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["hard", "srste"])
def test_shapes_and_densities_of_masked_layers(mode: str, density: float, dtype: torch.dtype) -> None:
    """Output and both gradients, as :func:`test_gradients_of_the_modes` defines them."""
    for m, n, k in (*EXTREMES, (3, 70, 300), (300, 33, 129)):
        rand = Random(f"masked {m} {n} {k} {density}")
        mask = with_holes(rand, n, k, density)
        x, w, bias, g = (rand.normal(*shape).to(dtype) for shape in ((m, k), (n, k), (n,), (m, n)))
        for leaf in (x, w):
            leaf.requires_grad_()
        y = ops.masked_linear(x, w, bits_of(mask), bias, mode=mode, decay=0.25)
        y.backward(g)
        a, wide, b = x.detach().double(), w.detach().double(), g.double()
        kept = torch.where(mask, wide, 0.0)
        close(y, a @ kept.t() + bias.double(), k)
        assert x.grad is not None and w.grad is not None
        close(x.grad, b @ kept, n)
        expected = b.t() @ a
        if mode == "hard":
            assert not w.grad[~mask].any()
            close(w.grad, torch.where(mask, expected, 0.0), m)
        else:  # (the product is rounded before the decay is added)
            decay = torch.where(mask, 0.0, 0.25 * wide)
            slack = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
            error = (w.grad.double() - expected - decay).abs()
            rounding = 4 * torch.finfo(torch.float32).eps * max(m, 1) ** 0.5 * (1 + expected.abs().max())
            assert (error <= rounding + slack * (expected.abs() + (expected + decay).abs() + decay.abs())).all()


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("empty", [False, True])
def test_bitmaps_of_many_panels(m: int, values: torch.dtype, empty: bool) -> None:
    """One thread or two take several panels side by side, more take them one by one: the same bits."""
    rand = Random(f"panels {m} {values} {empty}")
    n, k = 530, 300
    mask = rand.mask(n, k, density=0.3)
    if empty:  # no values before those of the first panel that has some, and none behind the last
        mask[:40], mask[100:140], mask[-20:] = False, False, False
    packed = SparseWeight.from_dense(rand.normal(n, k), mask, "bitmap", values=values)
    x = rand.normal(m, k)
    products = []
    for count in (1, 2, 3):
        with threads(count):
            products.append(ops.spmm(x, packed))
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], products[2])
    close(products[0], x.double() @ packed.to_dense().double().t(), k)


@pytest.mark.parametrize("m", [1, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_any_number_of_threads(format: str, m: int) -> None:
    """Also more than there are parts: the same bits."""
    rand = Random(f"threads {format} {m}")
    n, k = 1030, 600
    packed = SparseWeight.from_dense(rand.normal(n, k), rand.mask(n, k, density=0.4), format)
    x = rand.normal(m, k)
    products = []
    for count in (1, 2, 5, 70):
        with threads(count):
            products.append(ops.spmm(x, packed))
    assert all(torch.equal(products[0], other) for other in products[1:])
    close(products[0], x.double() @ packed.to_dense().double().t(), k)


def test_products_that_record_nothing() -> None:
    """They go past autograd: the same values, and a gradient wherever one is wanted."""
    rand = Random("past autograd")
    packed = SparseWeight.from_dense(rand.normal(33, 40), rand.mask(33, 40, density=0.4), "csr")
    x = rand.normal(3, 5, 40)
    y = ops.spmm(x, packed)
    leaf = x.clone().requires_grad_()
    recorded = ops.spmm(leaf, packed)
    with torch.no_grad():
        unrecorded = ops.spmm(leaf, packed)
    assert recorded.requires_grad and not (y.requires_grad or unrecorded.requires_grad)
    assert torch.equal(y, recorded) and torch.equal(y, unrecorded)
    recorded.sum().backward()
    close(leaf.grad, packed.to_dense().double().sum(0).expand_as(x), 33)


# ------------------------------------------------------------------------------------------------------ spmm


def compressed(
    rows: int, n: int, k: int, format: str, *, density: float = 0.3, block: tuple[int, int] = (16, 1),
    values: torch.dtype | None = None, bias: bool = True, holes: bool = False,
) -> Callable[[Random], tuple[Any, ...]]:  # fmt: skip
    def make(rand: Random) -> tuple[Any, ...]:
        mask = rand.mask(n, k, density=density)
        if holes:  # an empty row, an empty column, and full ones
            mask[n // 2], mask[:, k // 2] = False, False
            mask[0], mask[:, -1] = True, True
        w = SparseWeight.from_dense(rand.normal(n, k), mask, format, block=block, values=values)
        return rand.normal(rows, k), rand.normal(n) if bias else None, *w.arguments()

    return make


def compressed_backward(rows: int, n: int, k: int, format: str, **options: Any) -> Any:
    wanted = options.pop("wanted", (True, True))

    def make(rand: Random) -> tuple[Any, ...]:
        x, _, *rest = compressed(rows, n, k, format, **options)(rand)
        return rand.normal(rows, n), x, *rest, *wanted

    return make


def sampled(rows: int, n: int, k: int, format: str, **options: Any) -> Any:
    def make(rand: Random) -> tuple[Any, ...]:
        x, _, _, index, offsets, _, format_, _, _, *block = compressed(rows, n, k, format, **options)(rand)
        return rand.normal(rows, n), x, index, offsets, format_, *block

    return make


WIDE = {"block": (32, 4)}
TRAINED = [
    *(Sample(f"{f}_one", compressed(1, 33, 67, f, holes=True)) for f in ("csr", "block")),
    *(Sample(f"{f}_some", compressed(7, 33, 67, f)) for f in ("csr", "block")),
    Sample("csr_many", compressed(70, 17, 300, "csr", bias=False)),
    Sample("block_wide", compressed(9, 40, 19, "block", block=(32, 4))),
    Sample("csr_empty", compressed(3, 5, 9, "csr", density=0.0)),
    Sample("csr_full", compressed(2, 5, 65, "csr", density=1.0)),
    Sample("nobody", compressed(0, 5, 9, "csr")),
    *(Sample(f"{f}_no_rows", compressed(3, 0, 9, f)) for f in ("csr", "block")),
    Sample("block_panels", compressed(1, 250, 67, "block", holes=True)),
    *(Sample(f"block_32x1_{m}", compressed(m, 40, 300, "block", block=(32, 1))) for m in (1, 2, 3, 15)),
    Sample("csr_slabs", compressed(65, 70, 2100, "csr", density=0.05), full=True),
    Sample("csr_long_sums", compressed(64, 5, 8192, "csr", density=0.5), full=True),
    Sample("block_long_sums", compressed(7, 16, 8192, "block", density=0.5), full=True),
    Sample("block_square", compressed(65, 64, 64, "block", block=(16, 16)), full=True),
]
PACKED = [
    *(Sample(f"{f}_one", compressed(1, 33, 67, f, holes=True)) for f in ("delta", "bitmap")),
    *(Sample(f"{f}_some", compressed(7, 33, 67, f)) for f in ("delta", "bitmap")),
    *(Sample(f"{f}_no_rows", compressed(3, 0, 9, f)) for f in ("delta", "bitmap")),
    Sample("delta_far", compressed(3, 5, 1100, "delta", density=0.003)),
    Sample("bitmap_three", compressed(3, 17, 129, "bitmap", density=0.9)),
    Sample("bitmap_last_panel", compressed(1, 18, 3, "bitmap", density=0.1)),
    Sample("bitmap_empty", compressed(2, 16, 5, "bitmap", density=0.0)),
    Sample("delta_many", compressed(66, 17, 700, "delta", density=0.02), full=True),
    Sample("bitmap_many", compressed(29, 40, 520, "bitmap"), full=True),
]
EIGHT = [
    Sample(f"int8_{f}", compressed(m, 33, 67, f, values=torch.int8))
    for f, m in (("csr", 1), ("delta", 5), ("bitmap", 2), ("block", 3))
]
EIGHT += [Sample("int8_block_panels", compressed(1, 250, 67, "block", values=torch.int8))]
TINY_SPMM = [
    Sample("tiny", compressed(2, 3, 5, "csr", density=0.5)),
    Sample("tiny_resized", compressed(3, 4, 6, "csr", density=0.5)),
]
SPMM_BACKWARD = [
    *(Sample(f"{f}", compressed_backward(7, 33, 67, f, holes=f == "csr")) for f in ("csr", "block")),
    Sample("wide", compressed_backward(70, 40, 19, "block", block=(32, 4))),
    Sample("one", compressed_backward(1, 5, 300, "csr")),
    Sample("input", compressed_backward(3, 5, 17, "csr", wanted=(True, False))),
    Sample("values", compressed_backward(3, 5, 17, "csr", wanted=(False, True))),
    Sample("many", compressed_backward(70, 65, 1700, "csr", density=0.05), full=True),
]
TINY_SPMM_BACKWARD = [
    Sample("tiny", compressed_backward(2, 3, 5, "csr", density=0.5)),
    Sample("tiny_resized", compressed_backward(3, 4, 6, "csr", density=0.5)),
]
SAMPLED = [
    *(Sample(f, sampled(7, 33, 67, f)) for f in ("csr", "block")),
    Sample("wide", sampled(9, 40, 19, "block", block=(32, 4))),
    Sample("many", sampled(70, 17, 1700, "csr", density=0.05)),
]
TINY_SAMPLED = [Sample("tiny", sampled(2, 3, 5, "csr")), Sample("tiny_resized", sampled(3, 4, 6, "csr"))]


@pytest.mark.parametrize(
    "check",
    [
        *check_op("spmm", TRAINED, tiny=TINY_SPMM, constants=("scale",)),
        *check_op("spmm_backward", SPMM_BACKWARD, tiny=TINY_SPMM_BACKWARD),
        *check_op("sddmm", SAMPLED, tiny=TINY_SAMPLED),
    ],
)
def test_products(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    without_gradients(check_op("spmm", [*PACKED, *EIGHT], tiny=(), kept=("scale",))),
)
def test_packed(check: Callable[[], None]) -> None:
    check()


def test_blocks_of_odd_sizes() -> None:
    """Panels are 16 rows high; other blocks are the reference's."""
    x, bias, *rest = compressed(3, 9, 10, "block", block=(3, 2))(Random("odd blocks"))
    w = SparseWeight(*rest[:3], (9, 10), "block", (3, 2))
    torch.testing.assert_close(ops.spmm(x, w, bias), x @ w.to_dense().t() + bias)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("values", [None, torch.int8])
def test_packed_for_inference_has_no_backward(format: str, values: torch.dtype | None) -> None:
    rand = Random("inference")
    w = SparseWeight.from_dense(rand.normal(17, 9), rand.mask(17, 9), format, values=values)
    y = ops.spmm(rand.normal(2, 9).requires_grad_(), w)
    if w.trainable:
        y.sum().backward()
        return
    what = "int8 values" if values is not None else f"the format {format}"
    sentence = (
        rf"spmm: the weight is packed for inference \({what}\) and has no backward; pack it as csr or block, with "
        "floating-point values"
    )
    with pytest.raises(RuntimeError, match=sentence):
        y.sum().backward()


def test_the_transposed_index_follows_its_index() -> None:
    """What a kernel keeps about an index is made anew when the index changes in place."""
    rand = Random("transposed")
    w = SparseWeight.from_dense(rand.normal(6, 40), rand.mask(6, 40, density=0.2), "csr")
    g, x = rand.normal(9, 6), rand.normal(9, 40)
    for _ in range(2):
        args = (g, x, *w.arguments(), True, True)
        found = torch.ops.cofire.spmm_backward(*args)
        expected = torch.ops.cofire.spmm_backward.reference(*args)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ops.spmm(x, w), x @ w.to_dense().t())
        w.index.copy_((39 - w.index.int()).to(torch.uint16))  # within a row no longer ascending
        order = torch.cat([w.index[a:b].int().sort().values for a, b in zip(w.offsets, w.offsets[1:], strict=False)])
        w.index.copy_(order.to(torch.uint16))


# ------------------------------------------------------------------------------------------------ convolution


def convolution(
    shape: tuple[int, int, int, int], out: int, kernel: tuple[int, int], format: str = "csr", *, stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), groups: int = 1, bias: bool = True,
    values: torch.dtype | None = None,
) -> Callable[[Random], tuple[Any, ...]]:  # fmt: skip
    def make(rand: Random) -> tuple[Any, ...]:
        columns = shape[1] // groups * kernel[0] * kernel[1]
        mask = rand.mask(out, columns, density=0.4)
        w = SparseWeight.from_dense(rand.normal(out, columns), mask, format, block=(2, 3), values=values)
        window = [list(kernel), list(stride), list(padding), list(dilation), groups]
        return rand.normal(*shape), rand.normal(out) if bias else None, *w.arguments(), *window

    return make


def convolution_backward(*args: Any, **options: Any) -> Any:
    def make(rand: Random) -> tuple[Any, ...]:
        x, bias, *rest = convolution(*args, **options)(rand)
        y = torch.ops.cofire.sparse_conv2d.reference(x, bias, *rest)
        return rand.normal(*y.shape), x, *rest, True, True

    return make


CONV = [
    Sample("same", convolution((2, 3, 7, 9), 5, (3, 3), padding=(1, 1))),
    Sample("stride", convolution((1, 4, 11, 8), 3, (3, 2), stride=(2, 3), padding=(1, 0))),
    Sample("dilation", convolution((1, 4, 12, 17), 6, (2, 3), dilation=(3, 2), padding=(2, 1), groups=2, bias=False)),
    Sample("stride_dilation", convolution((1, 2, 13, 15), 3, (3, 3), stride=(2, 2), dilation=(3, 2), padding=(2, 3))),
    Sample("pointwise", convolution((3, 5, 4, 4), 7, (1, 1))),
    Sample("large", convolution((1, 3, 20, 30), 70, (5, 5), padding=(2, 2)), full=True),
]
CONV_PACKED = [
    Sample("delta", convolution((1, 3, 9, 9), 5, (3, 3), "delta", padding=(1, 1))),
    Sample("int8", convolution((1, 3, 9, 9), 5, (3, 3), values=torch.int8)),
]
TINY_CONV = [
    Sample("tiny", convolution((3, 2, 4, 5), 3, (2, 2), padding=(1, 0))),
    Sample("tiny_resized", convolution((2, 2, 5, 6), 3, (2, 2), padding=(1, 0))),
]
CONV_BACKWARD = [
    Sample("same", convolution_backward((2, 3, 7, 9), 5, (3, 3), padding=(1, 1))),
    Sample("block", convolution_backward((1, 4, 8, 8), 5, (3, 3), "block", stride=(2, 1), groups=1)),
]
TINY_CONV_BACKWARD = [
    Sample("tiny", convolution_backward((3, 2, 4, 5), 3, (2, 2), padding=(1, 0))),
    Sample("tiny_resized", convolution_backward((2, 2, 5, 6), 3, (2, 2), padding=(1, 0))),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("format", FORMATS)
def test_shapes_and_densities_of_convolutions(format: str, density: float, dtype: torch.dtype) -> None:
    """Output and gradients against the dense convolution in fp64; an output channel of which nothing is kept."""
    for images, channels, height, width, out, kernel, stride, padding, dilation, groups in (
        (1, 1, 5, 5, 1, 1, 1, 0, 1, 1),
        (2, 3, 7, 9, 17, 3, 1, 1, 1, 1),
        (1, 4, 17, 15, 6, 3, 2, 1, 1, 2),
        (3, 16, 8, 33, 33, 1, 1, 0, 1, 1),
        (1, 5, 19, 18, 15, 5, 3, 4, 2, 1),
    ):
        rand = Random(f"convolution {channels} {out} {density}")
        columns = channels // groups * kernel * kernel
        mask = rand.uniform(out, columns) < density
        mask[out // 2] = False
        if format == "block":
            mask = mask[:, :1].expand(out, columns)
        shape = (out, channels // groups, kernel, kernel)
        w = torch.where(mask, rand.normal(out, columns), 0.0).to(dtype)
        x, bias = rand.normal(images, channels, height, width).to(dtype).requires_grad_(), rand.normal(out).to(dtype)
        packed = SparseWeight.from_dense(w, mask, format, block=(1, columns))
        trained = format in ("csr", "block")
        packed.values.requires_grad_(trained)
        window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        y = ops.sparse_conv2d(x if trained else x.detach(), packed, bias, kernel_size=kernel, **window)
        a, wide = x.detach().double().requires_grad_(), w.double().view(shape).requires_grad_()
        expected = F.conv2d(a, wide, bias.double(), **window)
        close(y, expected.detach(), columns)
        assert torch.equal(y[:, out // 2], bias[out // 2].expand_as(y[:, out // 2]))
        if trained:
            g = rand.normal(*y.shape).to(dtype)
            y.backward(g)
            expected.backward(g.double())
            assert x.grad is not None and packed.values.grad is not None
            close(x.grad, a.grad, out * kernel * kernel)
            found = packed.replace(values=packed.values.grad).to_dense()
            close(found, torch.where(mask, wide.grad.view(out, columns), 0.0), y[:, 0].numel())


@pytest.mark.parametrize(
    "check",
    [
        *check_op("sparse_conv2d", CONV, tiny=TINY_CONV),
        *without_gradients(check_op("sparse_conv2d", CONV_PACKED, tiny=(), kept=("scale",))),
        *check_op("sparse_conv2d_backward", CONV_BACKWARD, tiny=TINY_CONV_BACKWARD, by_library=True),
    ],
)
def test_convolution(check: Callable[[], None]) -> None:
    check()


# -------------------------------------------------------------------------------------------------- the laws

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))


@given(shapes, st.sampled_from(FORMATS), st.sampled_from([(16, 1), (4, 4), (3, 2), (16, 16)]))
@settings(max_examples=120, deadline=None)
def test_round_trip(shape: tuple[int, int, float, int], format: str, block: tuple[int, int]) -> None:
    n, k, density, seed = shape
    if format == "delta":  # far apart
        k, density = 40 * k, density / 40 if seed % 2 else density
    rand = Random(str(seed))
    w, mask = rand.normal(n, k), rand.mask(n, k, density=density)
    w[rand.mask(n, k, density=0.2)] = 0.0  # a kept zero stays a kept value
    packed = SparseWeight.from_dense(w, mask, format, block=block)
    assert torch.equal(packed.to_dense(), torch.where(mask, w, 0.0))
    stored = mask
    if format == "block":  # kept whole
        blocks = tuple(-(-size // b) for size, b in zip((n, k), block, strict=True))
        margin = (0, blocks[1] * block[1] - k, 0, blocks[0] * block[0] - n)
        tiles = F.pad(mask, margin).view(blocks[0], block[0], blocks[1], block[1]).any(3).any(1)
        stored = tiles.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    assert torch.equal(packed.mask(), stored)
    if format in ("csr", "bitmap"):
        assert packed.values.numel() == int(mask.sum())
    again = SparseWeight.from_tensors(packed.tensors(), shape=packed.shape, format=format, block=packed.block)
    assert torch.equal(again.to_dense(), packed.to_dense())


@pytest.mark.parametrize("format", FORMATS)
def test_casts_change_no_mask(format: str) -> None:
    """What is too small for the type is a kept zero, at the distances of bridges too."""
    w, mask = torch.zeros(32, 1100), torch.zeros(32, 1100, dtype=torch.bool)
    for row in range(16):
        w[row, [255, 511, 1021]] = torch.tensor([1e-9, 1.0, -1e-9])
    mask[:16, [255, 511, 1021]] = True
    packed = SparseWeight.from_dense(w, mask, format)
    half = packed.cast(torch.float16)
    assert half.values.dtype == torch.float16 and half.format == format and torch.equal(half.mask(), mask)
    assert torch.equal(half.to_dense(), w.half())
    assert (half.values.numel() > packed.values.numel()) == (format == "delta")
    wide = packed.cast(torch.float64)
    assert torch.equal(wide.mask(), mask) and wide.index is packed.index
    with pytest.raises(
        TypeError, match=r"^SparseWeight.cast: floats alone have another type, got torch.float32 to torch.int8"
    ):
        packed.cast(torch.int8)
    packed = SparseWeight.from_dense(w, mask, format, values=torch.int8)
    with pytest.raises(TypeError, match=r"^SparseWeight.cast: floats alone .* got torch.int8 to torch.float16"):
        packed.cast(torch.float16)


@pytest.mark.parametrize(("columns", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_columns_beyond_sixteen_bits(columns: int, dtype: torch.dtype) -> None:
    w = torch.zeros(2, columns)
    w[0, -1], w[1, 3], w[1, 40000] = 2.0, 3.0, 5.0
    x = torch.arange(columns, dtype=torch.float32).expand(3, -1)
    for format in ("csr", "delta"):
        packed = SparseWeight.from_dense(w, w != 0, format)
        assert format == "delta" or packed.index.dtype == dtype
        assert torch.equal(ops.spmm(x, packed), x @ w.t())


def test_auto_chooses() -> None:
    rand = Random("auto")
    w = rand.normal(32, 64)
    columns = rand.mask(2, 64).repeat_interleave(16, 0)
    assert SparseWeight.from_dense(w, columns).format == "block"
    assert SparseWeight.from_dense(w, rand.mask(32, 64, density=0.5)).format == "bitmap"
    assert SparseWeight.from_dense(w, rand.mask(32, 64, density=0.05)).format == "csr"


def test_bytes() -> None:
    """What each format costs, in bytes of a 4096th of the entries."""
    rand = Random("bytes")
    w, mask = rand.normal(64, 256), rand.mask(64, 256, density=0.25)
    kept = int(mask.sum())
    assert SparseWeight.from_dense(w, mask, "csr").nbytes == 6 * kept + 8 * 65
    assert SparseWeight.from_dense(w, mask, "bitmap").nbytes == 4 * kept + 64 * 256 // 8 + 8 * 5
    assert SparseWeight.from_dense(w, mask, "bitmap", values=torch.bfloat16).nbytes == 2 * kept + 2048 + 40
    assert SparseWeight.from_dense(w, mask, "bitmap", values=torch.int8).nbytes == kept + 2048 + 40 + 4 * 64


# ------------------------------------------------------------------------------------------------- sentences

W = torch.ones(3, 9)
B = torch.zeros(3, 2, dtype=torch.uint8)
M = torch.ones(3, 9, dtype=torch.bool)


def packed(**changes: Any) -> SparseWeight:
    return SparseWeight.from_dense(torch.ones(3, 9), torch.ones(3, 9, dtype=torch.bool), "csr").replace(**changes)


REFUSALS = [
    Refusal(
        "bits_shape", lambda: ops.apply_mask(torch.ones(3, 9), torch.zeros(3, 1, dtype=torch.uint8)), ValueError,
        "apply_mask: bits must have shape [3, 2] (9 columns of one bit), got [3, 1]",
    ),
    Refusal(
        "bits_dtype", lambda: ops.apply_mask(torch.ones(3, 9), torch.zeros(3, 2)), TypeError,
        "apply_mask: bits must be uint8 (a packed mask), got torch.float32",
    ),
    Refusal(
        "weight_dtype", lambda: ops.apply_mask(torch.ones(3, 9).int(), torch.zeros(3, 2, dtype=torch.uint8)), TypeError,
        "apply_mask: weight must be a floating-point tensor, got torch.int32",
    ),
    Refusal(
        "mode",
        lambda: ops.masked_linear(torch.ones(1, 9), torch.ones(3, 9), torch.zeros(3, 2, dtype=torch.uint8), mode="soft"),
        ValueError, "masked_linear: mode must be one of invariant, hard, ste, srste, got 'soft'",
    ),
    Refusal(
        "columns",
        lambda: ops.masked_linear(torch.ones(1, 8), torch.ones(3, 9), torch.zeros(3, 2, dtype=torch.uint8)),
        ValueError, "masked_linear: input must have shape [..., 9], got [1, 8]",
    ),
    Refusal(
        "decay",
        lambda: ops.masked_linear(torch.ones(1, 9), torch.ones(3, 9), torch.zeros(3, 2, dtype=torch.uint8), decay="a"),
        TypeError, "masked_linear: decay must be a number, got 'a'",
    ),
]  # fmt: skip
PACKED_REFUSALS = [
    (lambda: ops.spmm(torch.ones(2, 8), packed()), ValueError, "spmm: input must have shape [..., 9], got [2, 8]"),
    (
        lambda: ops.spmm(torch.ones(2, 9).int(), packed()),
        TypeError,
        "spmm: input must be a floating-point tensor, got torch.int32",
    ),
    (lambda: ops.spmm(torch.ones(2, 9), packed(), [1.0]), TypeError, "spmm: bias must be a tensor, got list"),
    (
        lambda: ops.spmm(torch.ones(2, 9), packed(), torch.ones(4)),
        ValueError,
        "spmm: bias must have shape [3], got [4]",
    ),
    (
        lambda: ops.spmm(torch.ones(2, 9), torch.ones(3, 9)),
        TypeError,
        "spmm: weight must be a SparseWeight, got Tensor",
    ),
    (lambda: ops.spmm([1.0], packed()), TypeError, "spmm: input must be a tensor, got list"),
    (
        lambda: packed(format="coo"),
        ValueError,
        "SparseWeight: format must be one of csr, delta, bitmap, block, got 'coo'",
    ),
    (
        lambda: packed(offsets=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "SparseWeight: offsets must have shape [4], got [3]",
    ),
    (
        lambda: packed(index=torch.zeros(27, dtype=torch.int64)),
        TypeError,
        "SparseWeight: index must be uint16 or int32 in the format csr, got torch.int64",
    ),
    (
        lambda: packed(values=torch.zeros(27, dtype=torch.int8)),
        ValueError,
        "SparseWeight: int8 values need a scale, and others have none",
    ),
    (
        lambda: SparseWeight.from_dense(W, M.float()),
        ValueError,
        "SparseWeight.from_dense: mask must be bool of shape [3, 9], got torch.float32 [3, 9]",
    ),
    (
        lambda: SparseWeight.from_dense(W, M[:2]),
        ValueError,
        "SparseWeight.from_dense: mask must be bool of shape [3, 9], got torch.bool [2, 9]",
    ),
    (
        lambda: SparseWeight.from_dense(W.int(), M),
        ValueError,
        "SparseWeight.from_dense: weight must be a floating-point tensor of shape [N, K], got torch.int32 [3, 9]",
    ),
    (
        lambda: SparseWeight.from_dense(W, M, block=0),
        ValueError,
        "SparseWeight.from_dense: block must be two positive integers, got 0",
    ),
    (
        lambda: ops.sddmm(torch.ones(2, 3), torch.ones(2, 9), SparseWeight.from_dense(W, M, "bitmap")),
        ValueError,
        "sddmm: format must be one of csr, block, got 'bitmap'",
    ),
    (
        lambda: ops.sparse_conv2d(torch.ones(1, 1, 5, 5), packed(), kernel_size=2),
        ValueError,
        "sparse_conv2d: weight must have 4 columns (1 channels of 2x2), got 9",
    ),
    (
        lambda: ops.sparse_conv2d(torch.ones(1, 1, 2, 5), packed(), kernel_size=3),
        ValueError,
        "sparse_conv2d: input must be as large as the kernel, got shape [1, 1, 2, 5]",
    ),
    (
        lambda: ops.sparse_conv2d(torch.ones(1, 1, 5, 5), packed(), kernel_size=3, stride=0),
        ValueError,
        "sparse_conv2d: stride must be two integers of at least 1, got [0, 0]",
    ),
    (
        lambda: ops.sparse_conv2d(torch.ones(1, 2, 5, 5), packed(), kernel_size=3, groups=2),
        ValueError,
        "sparse_conv2d: groups must divide the channels, 2 of the input and 3 of the output, got 2",
    ),
    (
        lambda: ops.sddmm(torch.ones(2, 3), torch.ones(4, 9), packed()),
        ValueError,
        "sddmm: grad and input must agree in all dimensions but the last, got [2, 3] and [4, 9]",
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("call", "error", "sentence"), PACKED_REFUSALS)
def test_refusals_of_compressed_weights(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


def test_examples() -> None:
    check_examples(sparse)


@pytest.mark.parametrize("columns", [1, 2, 255, 256, 257, 333, 600])
@pytest.mark.parametrize("rows", [5, 48, 544])
def test_one_token_of_bf16_times_a_bitmap(rows: int, columns: int) -> None:
    """Columns in pairs, odd ones too, over the limits of what is expanded at once, of some panels and of many."""
    rand = torch.Generator().manual_seed(rows + columns)
    w, x = (torch.randn(n, columns, generator=rand).bfloat16() for n in (rows, 1))
    mask = torch.rand(rows, columns, generator=rand) < 0.4
    y = ops.spmm(x, SparseWeight.from_dense(w, mask, "bitmap"))
    kept = torch.where(mask, w, 0).double()
    bound = 2**-8 * (x.double() @ kept.T).abs() + 1e-5 * (x.double().abs() @ kept.abs().T) + 1e-30
    assert ((y.double() - x.double() @ kept.T).abs() <= bound).all()
