# SPDX-License-Identifier: Apache-2.0
"""What the launchers of lowbit have of their own: words of codes, tiles, splits, plans, large addresses, random numbers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("launchers on CPU tensors need the interpreter", allow_module_level=True)

import triton
import triton.language as tl

from cofire.info import kernel_for
from cofire.ops import pack_bits, unpack_bits
from cofire.ops.fake_quantize import philox_uniform
from cofire.registry import OPERATORS
from cofire_kernels import configs, lowbit
from cofire_kernels.lowbit import decode, product
from cofire_kernels.lowbit.fake_quantize import nearest, random_words
from helpers import Args, Case, Context, bits, check_values

HALVES = (torch.bfloat16, torch.float16)
fake_quantize_module = importlib.import_module("cofire_kernels.lowbit.fake_quantize")


def weight(
    rows: int, columns: int, width: int, group: int, *, zero: str = "", offset: bool = False, lut: int = 0, int8: bool = False
) -> tuple[Any, ...]:  # fmt: skip
    """codes, scale, zero, offset, lut."""
    codes = torch.randint(0, 1 << width, (rows, columns), dtype=torch.uint8)
    groups = columns // group
    zeros = {
        "": None,
        "one": torch.full((1, 1), float(1 << width >> 1)),
        "bytes": torch.randint(0, 1 << width, (rows, groups), dtype=torch.uint8),
        "floats": torch.rand(rows, groups) * (1 << width),
    }[zero]
    table = torch.randn(lut, 1 << width) if lut else None
    if table is not None and int8:
        table = (table * 40).clamp(-128, 127).round().to(torch.int8)
    scale = (torch.rand(rows, groups) + 0.5) / (1 << width)
    return pack_bits(codes, width), scale, zeros, torch.randn(rows, groups) if offset else None, table


def launch(name: str, *args: Any, **sums: int) -> tuple[Tensor, ...]:
    """The launcher's result, which is right and the same again."""
    outputs, again = (getattr(lowbit, name)(*args) for _ in range(2))
    outputs, again = (o if isinstance(o, tuple) else (o,) for o in (outputs, again))
    sums = {"output 0": 16, "input_grad": 16, "scale_grad": 64, "zero_grad": 64, "output": 16, "low": 16, **sums}
    check_values(Context(Case(OPERATORS[name], (), (), (), sums, None), "triton", "kernel test"), args, outputs)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outputs, again, strict=True)), f"{name} varies"
    return outputs


@pytest.fixture
def narrow() -> Iterator[None]:
    """Tiles so small that every sum is shared by several programs."""
    product_tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4}
    rows = {"BLOCK_N": 4, "BLOCK_K": 32, "AHEAD": 1, "num_warps": 4}
    configs.forced.update(dict.fromkeys(("qlinear", "qlinear_backward", "qlinear_bytes"), product_tile))
    configs.forced.update({"qlinear_rows": rows, "sum_splits": {"BLOCK": 16, "num_warps": 1}})
    yield
    configs.forced.clear()


# ---------------------------------------------------------------------------------------------- words of codes


@triton.jit
def codes_kernel(codes_ptr, out_ptr, rows, row_units, columns, BITS: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    start = tl.program_id(0) * K
    q = decode.tile_codes(codes_ptr, row, start, rows, row_units, BITS, K)
    k = start + tl.arange(0, K)
    inside = (row < rows)[:, None] & (k < columns)[None, :]
    tl.store(out_ptr + row[:, None] * columns + k[None, :], q.to(tl.uint8), mask=inside)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("columns", [32, 64, 96, 224])
def test_words_come_apart_in_order(width: int, columns: int) -> None:
    """Every bit of every word lands in its place; packing the codes again gives the same bytes."""
    codes = torch.randint(0, 1 << width, (5, columns), dtype=torch.uint8)
    packed = pack_bits(codes, width)
    for units in (packed.view(torch.int32), *([packed] if width in (1, 2, 4, 8) else [])):
        out = torch.empty(5, columns, dtype=torch.uint8)
        codes_kernel[(triton.cdiv(columns, 64), 3)](units, out, 5, units.shape[1], columns, BITS=width, N=2, K=64)
        assert torch.equal(out, codes)
        assert torch.equal(pack_bits(out, width), packed)
    assert torch.equal(unpack_bits(packed, width, columns), codes)


@pytest.mark.parametrize("columns", [1, 7, 17, 33, 37, 63, 65])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_odd_rows(width: int, columns: int) -> None:
    """Rows that are no whole words: bytes where codes divide one, else each code by itself."""
    w = weight(5, columns, width, columns, zero="floats", offset=True)
    (found,) = launch("dequantize", *w, width, columns, columns)
    assert torch.equal(found, OPERATORS["dequantize"].reference(*w, width, columns, columns))
    launch("qlinear", torch.randn(3, columns), *w, None, width, columns, "exact")


def test_codes_anywhere_in_memory() -> None:
    """Codes that do not begin at a word, codes with gaps between the rows, a transposed scale."""
    w = list(weight(6, 64, 4, 32))
    expected = OPERATORS["dequantize"].reference(*w, 4, 32, 64)
    memory = torch.empty(6 * 32 + 1, dtype=torch.uint8)
    memory[1:] = w[0].flatten()
    for codes in (memory[1:].view(6, 32), torch.cat([w[0], w[0]], 1)[:, :32]):
        assert torch.equal(lowbit.dequantize(codes, *w[1:], 4, 32, 64), expected)
    scale = w[1].t().contiguous().t()
    assert torch.equal(lowbit.dequantize(w[0], scale, *w[2:], 4, 32, 64), expected)
    x = torch.randn(64, 6).t()[::2]
    torch.testing.assert_close(lowbit.qlinear(x, *w, None, 4, 32, "exact"), x @ expected.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 8, 12, 16, 24, 32, 48, 96, 192])
def test_groups_and_tiles(group: int) -> None:
    """A tile has several groups, lies within one, or there is none and each code goes by itself."""
    w = weight(9, 192, 4, group, zero="bytes", offset=True)
    (found,) = launch("dequantize", *w, 4, group, 192)
    assert torch.equal(found, OPERATORS["dequantize"].reference(*w, 4, group, 192))
    for samples in (2, 7):
        launch("qlinear", torch.randn(samples, 192), *w, None, 4, group, "exact")
    launch("qlinear", torch.randn(2, 192), *w, None, 4, group, "int8")
    block = decode.block_of(192, group, 128)
    if not decode.tiles_refused(192, 4, group):
        assert group % block["BLOCK_K"] == 0 or block["BLOCK_K"] == group * block["GROUPS"] or group == 192


@pytest.mark.parametrize("tables", [1, 2, 3])
def test_tables(tables: int) -> None:
    for int8 in (False, True):
        w = weight(20, 64, 4, 32, lut=tables, int8=int8)
        (found,) = launch("dequantize", *w, 4, 32, 64)
        assert torch.equal(found, OPERATORS["dequantize"].reference(*w, 4, 32, 64))
        for samples in (1, 6):
            launch("qlinear", torch.randn(samples, 64), *w, None, 4, 32, "exact")
        if int8:
            launch("qlinear", torch.randn(3, 64), *w, None, 4, 32, "int8")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 17, 33])
def test_rows_of_every_number(samples: int, dtype: torch.dtype) -> None:
    w = weight(19, 64, 4, 32, zero="one")
    bias = torch.randn(19).to(dtype)
    launch("qlinear", torch.randn(samples, 64).to(dtype), *w, bias, 4, 32, "exact")
    launch("qlinear_backward", torch.randn(samples, 19).to(dtype), None, *w, 4, 32, 64, "exact", True)


# ------------------------------------------------------------------------------------------------- shared sums


@pytest.mark.parametrize("samples", [1, 3, 18])
def test_many_programs_share_a_sum(narrow: None, samples: int) -> None:
    w = weight(22, 192, 4, 32, zero="floats")
    x, bias, a, b = torch.randn(samples, 192), torch.randn(22), torch.randn(3, 192), torch.randn(22, 3)
    launch("qlinear", x, *w, bias, 4, 32, "exact")
    launch("qlinear", x, *w, bias, 4, 32, "int8")
    launch("qlora_linear", x, *w, bias, a, b, 0.5, 4, 32, output=64)
    tall = weight(150, 64, 4, 64)
    launch("qlinear_backward", torch.randn(samples, 150), None, *tall, 4, 64, 64, "exact", True)


@pytest.mark.parametrize("columns", [64, 96, 320])
@pytest.mark.parametrize("group", ["one", "row"])
def test_integers_of_a_shared_sum_are_exact(narrow: None, columns: int, group: str) -> None:
    """Scales are powers of two: the result is an integer over two."""
    size = columns if group == "row" else 32
    for width in (4, 8):
        codes, scale, zero, *rest = weight(17, columns, width, size, zero="bytes")
        scale = torch.exp2(torch.randint(-1, 3, scale.shape).float())
        x = torch.randint(-127, 128, (5, columns)).float()
        x[:, 0] = 127
        args = (codes, scale, zero, *rest, None, width, size, "int8")
        assert torch.equal(lowbit.qlinear(x, *args).double(), OPERATORS["qlinear"].reference(x.double(), *args))


def test_shares_cover_the_sum() -> None:
    for summed in (1, 31, 32, 33, 4096, 14336):
        for programs in (1, 64, 600):
            splits, each = product.share(summed, 32, programs)
            tiles = -(-summed // 32)
            assert (splits - 1) * each < tiles <= splits * each
            assert splits == 1 or (each >= 4 and programs * splits <= product.PROGRAMS + programs)


# ------------------------------------------------------------------------------------------------------- plans


def _plan(name: str, *args: Any) -> str:
    """On a GPU that need not be there."""
    with FakeTensorMode():
        made = (torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a for a in args)
        return kernel_for(OPERATORS[name], tuple(made))


def test_plans_say_the_way() -> None:
    def plan(samples: int, width: int, columns: int, group: int, dtype: torch.dtype, activations: str = "exact") -> str:
        w = weight(8, columns, width, group)
        return _plan("qlinear", torch.empty(samples, columns, dtype=dtype), *w, None, width, group, activations)

    half = torch.bfloat16
    assert plan(1, 4, 64, 32, half) == "triton: products of vectors"
    assert plan(5, 4, 64, 32, half) == "triton: decodes tiles of the weight for the tensor cores"
    assert plan(513, 4, 64, 32, half) == ("triton: decodes the weight, then the library's product: more than 512 rows")
    assert plan(65, 4, 64, 32, torch.float32).endswith("more than 64 rows")
    assert plan(1, 3, 33, 33, half).endswith("rows of 33 codes of 3 bits are no whole words")
    assert plan(1, 4, 84, 7, half).endswith("groups of 7 are no tiles")
    assert plan(700, 4, 64, 32, half, "int8") == "triton: multiplies int8 on the tensor cores"
    assert plan(1, 4, 64, 16, half, "int8").endswith("groups of 16 are narrower than a tile of bytes")
    w, grad = weight(8, 64, 4, 32), torch.empty(1, 8)
    assert _plan("dequantize", *w, 4, 32, 64) == "triton: decodes words of codes"
    assert _plan("qlinear_backward", grad, None, *w, 4, 32, 64, "exact", True) == (
        "triton: decodes tiles of the weight for the tensor cores"
    )
    low = (torch.empty(2, 64), torch.empty(8, 2))
    assert _plan("qlora_linear", torch.empty(3, 64), *w, None, *low, 1.0, 4, 32) == "triton: products of vectors"
    backward = (grad, None, None, None, *w, *low, 1.0, 4, 32, True)
    assert _plan("qlora_linear_backward", *backward).endswith("for the tensor cores")
    assert _plan("dequantize", w[0], w[1], torch.ones(1, 1).double(), None, None, 4, 32, 64).endswith("a part in fp64")
    scale = torch.ones(1)
    assert _plan("fake_quantize_lsq", torch.empty(8), scale, 1, -8, 7, None) == "triton: one pass over memory"
    assert _plan("fake_quantize_lsq", torch.empty(8), scale.double(), 1, -8, 7, None).endswith("an argument in fp64")
    for size, expected in ((256, "one program per group"), (16384, "torch operators: groups of more than 8192")):
        args = (torch.empty(1, size), "int4", size, 2, False, 0)
        assert _plan("fake_quantize_group", *args) == f"triton: {expected}"


@pytest.mark.parametrize("name", ["qlinear", "qlinear_backward", "qlora_linear", "dequantize"])
def test_no_host_synchronisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor is looked at, whatever way a call takes."""
    calls: list[Args] = []
    for width, group, samples in ((4, 32, 1), (4, 32, 9), (3, 32, 2), (4, 4, 2), (4, 64, 600)):
        w = weight(8, 64, width, group, zero="floats")
        x, low = torch.randn(samples, 64), (torch.randn(2, 64), torch.randn(8, 2))
        calls += {
            "qlinear": [(x, *w, None, width, group, a) for a in ("exact", "int8")],
            "qlinear_backward": [(torch.randn(samples, 8), None, *w, width, group, 64, "exact", True)],
            "qlora_linear": [(x, *w, None, *low, 0.5, width, group)],
            "dequantize": [(*w, width, group, 64)],
        }[name]

    def refuse(*args: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    for module in (product, decode):
        for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, _Silent())
    for method in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, method, refuse)
    for args in calls:
        getattr(lowbit, name)(*args)


class _Silent:
    """A kernel that is launched and does nothing: the interpreter itself reads tensors."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


# ---------------------------------------------------------------------------------------------- large addresses


@triton.jit
def far_codes_kernel(codes_ptr, out_ptr, first, back, rows, row_units, BITS: tl.constexpr, K: tl.constexpr):
    row = first + tl.arange(0, 1).to(tl.int64)
    q = decode.tile_codes(codes_ptr - back, row, 0, rows, row_units, BITS, K)
    tl.store(out_ptr + tl.arange(0, K)[None, :], q)


def test_addresses_have_64_bits() -> None:
    """Row 3,000,000 of rows of 1,000 words: the pointer is moved back by what the row adds, which 32 bits cannot hold."""
    codes, first = torch.randint(0, 16, (1, 64), dtype=torch.uint8), 3_000_000
    words = torch.nn.functional.pad(pack_bits(codes, 4).view(torch.int32), (0, 1000 - 8))
    out = torch.empty(1, 64, dtype=torch.int32)
    far_codes_kernel[(1,)](words, out, first, 1000 * first, first + 1, 1000, BITS=4, K=64)
    assert torch.equal(out, codes.int())


# ------------------------------------------------------------------------------------------- fake quantisation


def test_an_argument_in_fp64_is_computed_in_fp64() -> None:
    w = list(weight(5, 64, 4, 32, zero="floats"))
    w[2] = w[2].double()
    found = lowbit.dequantize(*w, 4, 32, 64)
    assert found.dtype == torch.float64
    assert torch.equal(found, OPERATORS["dequantize"].reference(*w, 4, 32, 64))
    x, scale = torch.randn(8), torch.full((1,), 0.1, dtype=torch.float64)
    launch("fake_quantize_lsq", x, scale, 1, -8, 7, None)
    assert len(lowbit.fake_quantize_lsq_backward(x, x, scale, 1, -8, 7, None)) == 2


@triton.jit
def nearest_kernel(x_ptr, y_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(y_ptr + place, nearest(tl.load(x_ptr + place)))


def test_rounding_is_that_of_torch() -> None:
    x = torch.cat([torch.arange(-64, 64) / 4, 2.0 ** torch.arange(0, 64) + 0.5, -(2.0 ** torch.arange(0, 64)) - 0.5])
    x[-1], x[-2], x[-3] = torch.inf, -torch.inf, 8388607.5
    y = torch.empty_like(x)
    nearest_kernel[(1,)](x, y, N=256)
    assert torch.equal(y, x.round())


@triton.jit
def random_kernel(out_ptr, first, seed_low, seed_high, WHOLE: tl.constexpr, N: tl.constexpr):
    element = tl.zeros([1, 1], tl.int64) + first
    words = random_words(element, seed_low, seed_high, WHOLE, N)
    tl.store(out_ptr + tl.arange(0, N)[None, :], (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1])
def test_random_numbers_are_those_of_the_reference(seed: int) -> None:
    expected = philox_uniform(seed, 80)
    low = seed & 0xFFFFFFFF
    low = low - 2**32 if low >> 31 else low
    for first, whole in ((0, True), (8, True), (0, False), (7, False), (13, False)):
        out = torch.empty(1, 64)
        random_kernel[(1,)](out, first, low, seed >> 32, WHOLE=whole, N=64)
        assert torch.equal(out[0], expected[first : first + 64])


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows are read in pieces, and parameters' gradients are sums of many programs."""
    monkeypatch.setattr(fake_quantize_module, "WIDEST", 16)
    configs.forced["fake_quantize"] = {"ELEMENTS": 16, "num_warps": 1}
    yield
    configs.forced.clear()


def test_pieces_of_rows_and_columns(small_pieces: None) -> None:
    x, g = torch.randn(6, 40), torch.randn(6, 40)
    sums = {"output 0": 16, "scale_grad": 64, "range_grad": 64, "minimum_grad": 64}
    for scales, inner in ((1, 1), (6, 40), (40, 1), (12, 20), (3, 40), (20, 1)):
        scale, low = torch.rand(scales) * 0.4 + 0.05, -torch.rand(scales)
        launch("fake_quantize_lsq", x, scale, inner, -4, 3, None)
        launch("fake_quantize_lsq_backward", g, x, scale, inner, -4, 3, None, **sums)
        launch("fake_quantize_affine", x, scale * 8, low, inner, 3)
        launch("fake_quantize_affine_backward", g, x, scale * 8, low, inner, 3, **sums)
    launch("fake_quantize_minmax", x, 3, 40)
    launch("fake_quantize_minmax_backward", g, x, 3, 40, **sums)
    launch("fake_quantize_statsq", x, 3)
    launch("fake_quantize_group", x, "e2m1", 40, 2, True, 7)
