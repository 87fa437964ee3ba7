# SPDX-License-Identifier: Apache-2.0
"""The layout that products read: it holds the very weight, it takes the bytes that are stated, and integers that fill 32 bits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import explain, native, ops
from cofire.nn import QuantLinear
from cofire.ops import QTensor
from cofire.ops.lowbit import drop_layouts, int8_columns, layout_nbytes
from helpers import Random, Refusal, refusals, threads

ROWS = 47  # not a whole number of blocks
compiled = pytest.mark.skipif(native.STATUS.variant is None, reason="no compiled kernels")


# ------------------------------------------------------------------------------------------------- there and back


def quantised(bits: int, group: int, columns: int, *, powers: bool = True, **parts: Any) -> QTensor:
    """With scales that are powers of two every sum of scale, zero and offset is exact, in whatever order it is taken."""
    rand = Random(f"{bits} {group} {columns}")
    codes = (rand.uniform(ROWS, columns) * (1 << bits)).floor().long()
    scale = rand.uniform(ROWS, columns // group) + 0.5
    scale = torch.exp2((scale * 8).floor() - 12) if powers else scale
    return QTensor.from_codes(codes, scale, bits=bits, group_size=group, **parts)


def integers(bits: int, *shape: int) -> Tensor:
    return (Random("zero").uniform(*shape) * (1 << bits)).floor()


#: What stands beside the codes; each exact in fp32, so that a product with one column of an identity is the weight to the bit.
KINDS: dict[str, Callable[[int, int, int], QTensor]] = {
    "scales": lambda b, g, k: quantised(b, g, k, powers=False),
    "zeros": lambda b, g, k: quantised(b, g, k, zero=integers(b, ROWS, k // g).to(torch.uint8)),
    "one zero": lambda b, g, k: quantised(b, g, k, zero=torch.full((1, 1), float(1 << (b - 1)))),
    "offsets": lambda b, g, k: quantised(
        b, g, k, zero=integers(b, ROWS, k // g), offset=integers(4, ROWS, k // g) / 2**6
    ),
    "table": lambda b, g, k: quantised(b, g, k, powers=False, lut=Random("lut").normal(1, 1 << b)),
    "table of bytes": lambda b, g, k: quantised(b, g, k, lut=(integers(8, 1, 1 << b) - 128).to(torch.int8)),
    "tables of rows": lambda b, g, k: quantised(b, g, k, powers=False, lut=Random("lut").normal(3, 1 << b)),
    "ordered": lambda b, g, k: quantised(
        b, g, k, powers=False, perm=torch.randperm(k, generator=torch.Generator().manual_seed(0))
    ),
}
SIZES = [(bits, 32, 96) for bits in range(1, 9)] + [(3, 77, 77), (4, 77, 77), (4, 64, 512)]


def turned_back(q: QTensor, together: int, dtype: torch.dtype, factor: float = 1, **how: Any) -> Tensor:
    """What the product reads, column by column: that many rows of an identity at a time."""
    identity = factor * torch.eye(q.shape[1], dtype=dtype)
    return torch.cat([ops.qlinear(part, q, **how) for part in identity.split(together)]).t()


@pytest.mark.parametrize("together", [1, 4, 20, 96, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_turns_back_to_the_weight(kind: str, together: int) -> None:
    """By every loop: codes decoded in registers, tiles, and the slabs of the library's product."""
    for bits, group, columns in SIZES:
        q = KINDS[kind](bits, group, columns)
        if native.STATUS.variant is not None:
            assert layout_nbytes(q) > 0 and "stored codes" not in way(q, together)
        w = q.dequantize()
        assert torch.equal(turned_back(q, together, torch.float32), w), (bits, group)
        for dtype in (torch.bfloat16, torch.float16):  # the sum is exact, so it is rounded once
            assert torch.equal(turned_back(q, together, dtype), w.to(dtype)), (bits, group, dtype)


@pytest.mark.parametrize("together", [1, 4, 20, 96])
@pytest.mark.parametrize("kind", ["zeros", "one zero", "offsets", "table of bytes"])
def test_the_layout_of_bytes_turns_back_to_the_weight(kind: str, together: int) -> None:
    """With 127 in the place of 1 the scale of each row of the input is 1; products with powers of two are exact."""
    for bits, group, columns in SIZES:
        q = KINDS[kind](bits, group, columns)
        found = turned_back(q, together, torch.float32, 127, activations="int8")
        assert torch.equal(found, 127 * q.dequantize()), (bits, group)


def way(q: QTensor, rows: int) -> str:
    (call,) = explain("qlinear", torch.ones(rows, q.shape[1]), q)
    return str(call["kernel"])


# ------------------------------------------------------------------------------------------------------ its bytes


def kept(call: Callable[[], object]) -> int:
    """Bytes of torch's that a call has asked for and not given back, its result among them."""
    with (
        threads(1),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        result = call()
    del result
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_the_bytes_of_the_layout_are_those_that_are_kept(kind: str, bits: int) -> None:
    q, another = KINDS[kind](bits, 32, 96), KINDS["scales"](4, 32, 96)
    x = torch.randn(3, 96)
    ops.qlinear(x, another)  # drops the layouts of weights that are gone, which would count as given back
    first, second = (kept(lambda: ops.qlinear(x, q)) for _ in range(2))
    assert second == 4 * 3 * ROWS  # the result
    assert first - second == layout_nbytes(q) == q.resident_nbytes - q.nbytes


@compiled
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_bytes_of_every_combination_are_those_that_are_kept(bits: int) -> None:
    alive = [quantised(4, 32, 96)]  # a layout that goes while another is made would count as given back
    ops.qlinear(torch.randn(3, 96), alive[0])
    for group, columns in ((32, 96), (77, 77), (64, 128)):
        zeros = {
            "none": None,
            "one": torch.full((1, 1), 1.0),
            "one of nothing": torch.zeros(1, 1),
            "bytes": integers(bits, ROWS, columns // group).to(torch.uint8),
            "floats": integers(bits, ROWS, columns // group),
        }
        offsets = {"none": None, "offsets": integers(4, ROWS, columns // group)}
        tables = {
            "none": None,
            "floats": Random("lut").normal(1, 1 << bits),
            "bytes": (integers(8, 1, 1 << bits) - 128).to(torch.int8),
            "floats of rows": Random("lut").normal(3, 1 << bits),
            "bytes of rows": (integers(8, 3, 1 << bits) - 128).to(torch.int8),
        }
        x = torch.randn(3, columns)
        for names in itertools.product(zeros, offsets, tables):
            zero, offset, lut = zeros[names[0]], offsets[names[1]], tables[names[2]]
            q = quantised(bits, group, columns, zero=zero, offset=offset, lut=lut)
            alive.append(q)
            result = 4 * 3 * ROWS
            assert kept(lambda x=x, q=q: ops.qlinear(x, q)) - result == layout_nbytes(q) > 0, (group, *names)


@compiled
@pytest.mark.parametrize(
    "q",
    [
        lambda: quantised(4, 20, 40),
        lambda: quantised(4, 32, 64, lut=torch.randn(5, 16)),
        lambda: quantised(4, 32, 64).replace(scale=torch.ones(ROWS, 2, dtype=torch.float64)),
    ],
    ids=["narrow_groups", "tables_within_blocks", "fp64"],
)
def test_where_there_is_no_layout_nothing_is_kept(q: Callable[[], QTensor]) -> None:
    weight = q()
    x = torch.randn(3, weight.shape[1])
    assert kept(lambda: ops.qlinear(x, weight)) == 4 * 3 * ROWS and layout_nbytes(weight) == 0
    assert weight.resident_nbytes == weight.nbytes


def test_a_weight_elsewhere_has_no_layout_here() -> None:
    assert layout_nbytes(quantised(4, 32, 64).to("meta")) == 0


@compiled
def test_the_layout_is_freed_on_request() -> None:
    x = torch.randn(3, 512)

    def run(free: bool, hold: bool = False) -> tuple[object, ...]:
        layer = QuantLinear.from_qtensor(quantised(4, 32, 512), torch.randn(ROWS))
        y = layer(x)
        held = layer.qweight if hold else None
        if free:
            assert torch.equal(layer.free_layout().weight, quantised(4, 32, 512).dequantize())
            again = copy.deepcopy(layer)  # whose product does not make this one's layout again
            assert torch.equal(again(x), y)
            del again
            drop_layouts()
        return layer, held

    size, codes = layout_nbytes(quantised(4, 32, 512)), ROWS * 512 // 2
    assert size > 10_000
    results = []
    for how in ({"free": False}, {"free": True}, {"free": True, "hold": True}):
        # Watched: of a block that was made unwatched, and is given back in the call, the profiler may report the size that
        # another had at its address.
        kept(drop_layouts)
        results.append(kept(lambda how=how: run(**how)))  # type: ignore[misc]
    with_layout, freed, held = results
    assert abs(with_layout - freed - size) <= 1024  # a tiny weight has one in its place
    assert abs(held - freed - size - codes) <= 1024  # who holds the codes holds their layout


# ---------------------------------------------------------------------------------------------- full of integers


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(
    ("bits", "code", "zero"),
    [(8, 255, None), (8, 0, 255.0), (8, 255, 128.0), (4, 15, None), (4, 0, 8.0), (7, 127, 64.0)],
)
def test_the_widest_group_of_integers_does_not_overflow(bits: int, code: int, zero: float | None, rows: int) -> None:
    """The largest codes by the largest activations, all of one sign: the largest sums that there can be."""
    columns = int8_columns(bits, None)
    parts = {} if zero is None else {"zero": torch.full((1, 1), zero)}
    q = QTensor.from_codes(torch.full((3, columns), code), torch.ones(3, 1), bits=bits, group_size=columns, **parts)
    x = torch.full((rows, columns), 127.0)
    x[-1] = -127
    expected = torch.full((rows, 3), 127.0 * columns * (code - int(zero or 0)))
    expected[-1] *= -1
    assert expected.abs().max() < 1 << 31
    # a sum that is taken in parts, or by the reference, is rounded by fp32; one that overflows has the wrong sign
    torch.testing.assert_close(ops.qlinear(x, q, activations="int8"), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [1, 20])
def test_many_columns_in_narrow_groups_are_products_of_integers(rows: int) -> None:
    """The limit is that of a group: rows may be as long as they like."""
    rand = Random("many columns")
    columns, group = 1 << 17, 4096
    codes = (rand.uniform(3, columns) * 256).floor().long()
    q = QTensor.from_codes(codes, torch.ones(3, columns // group), bits=8, zero=torch.full((1, 1), 128.0))
    x = (rand.uniform(rows, columns) * 255).floor() - 127
    x[:, 0] = 127
    expected = x.long() @ (codes - 128).t()
    y = ops.qlinear(x, q, activations="int8").double()
    # each group's sum is an integer; what is rounded is the sum of 32 of them, in fp32
    assert (y - expected).abs().max() <= 32 * 2**-24 * 127 * 128 * group


def wide(bits: int, columns: int, *, group: int | None = None, lut: bool = False) -> Callable[[], object]:
    def call() -> object:
        codes = torch.zeros(1, -(-columns * bits // 8), dtype=torch.uint8, device="meta")
        table = torch.zeros(1, 1 << bits, dtype=torch.int8, device="meta") if lut else None
        groups = columns // (group or columns)
        scale = torch.ones(1, groups, device="meta")
        q = QTensor(codes, scale, (1, columns), bits, group or columns, lut=table)
        return ops.qlinear(torch.zeros(2, columns, device="meta"), q, activations="int8")

    return call


REFUSALS = [
    Refusal(
        f"{bits}_bits{'_table' if lut else ''}", wide(bits, most + 1, lut=lut), ValueError,
        f"qlinear: int8 activations take groups of at most {most} columns with {codes} (sums stay in 32 bits), got {most + 1}",
    )
    for bits, lut, most, codes in (
        (8, False, 66311, "bits=8"), (7, False, 131072, "bits=7"), (4, False, 131072, "bits=4"),
        (4, True, 66311, "an int8 lut"), (1, False, 131072, "bits=1"),
    )
]  # fmt: skip


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("call", [wide(8, 66311), wide(4, 131072), wide(8, 1 << 20, group=1 << 16)])
def test_what_fits_is_taken(call: Callable[[], Any]) -> None:
    assert call().shape == (2, 1)
