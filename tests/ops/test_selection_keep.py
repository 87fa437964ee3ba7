# SPDX-License-Identifier: Apache-2.0
"""keep_mask and keep_masks: exactly so many of the largest scores, ties to the lower index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cofire import ops
from cofire.ops.selection import SCORES
from cofire.registry import OPERATORS
from helpers import Random, Refusal, Sample, check_op, refusals, threads
from laws import given, settings, st

Values = Callable[[Random, int, int], Tensor]


def normal(rand: Random, rows: int, columns: int) -> Tensor:
    return rand.normal(rows, columns)


def levels(rand: Random, rows: int, columns: int) -> Tensor:
    """Many ties, zeros of both signs among them."""
    return (2 * rand.normal(rows, columns)).round() * 0.5


def infinities(rand: Random, rows: int, columns: int) -> Tensor:
    x = rand.normal(rows, columns)
    x[rand.mask(rows, columns, density=0.2)] = torch.inf
    return x * torch.where(rand.mask(rows, columns), 1.0, -1.0)


def pruned(rand: Random, rows: int, columns: int) -> Tensor:
    return torch.where(rand.mask(rows, columns, density=0.3), rand.normal(rows, columns), 0.0)


def other_of(rand: Random, score: str, rows: int, columns: int) -> Tensor | None:
    wanted = SCORES[score]
    if wanted is None:
        return None
    return rand.uniform(columns) if wanted == "[K]" else rand.normal(rows, columns)


def call(
    rows: int,
    columns: int,
    keep: int,
    scope: str = "row",
    score: str = "magnitude",
    block: tuple[int, int] = (1, 1),
    values: Values = normal,
    per_row: bool = False,
) -> Callable[[Random], tuple[Any, ...]]:
    def make(rand: Random) -> tuple[Any, ...]:
        weight, other = values(rand, rows, columns), other_of(rand, score, rows, columns)
        counts = torch.arange(rows) * columns // max(rows - 1, 1) if per_row else None
        return weight, other, counts, 0 if per_row else keep, scope, score, *block, 0.3

    return make


KEEP = [
    Sample("odd", call(3, 17, 5, values=levels)),
    Sample("per_row", call(5, 65, 0, score="wanda", per_row=True)),
    Sample("one", call(1, 1, 1)),
    Sample("none", call(3, 17, 0)),
    Sample("all", call(3, 17, 17, values=infinities)),
    Sample("value", call(3, 63, 30, score="value", values=infinities)),
    Sample("taylor", call(3, 64, 30, score="taylor")),
    Sample("fisher", call(3, 65, 1, score="fisher", values=levels)),
    Sample("gradient", call(2, 129, 64, score="magnitude_gradient")),
    Sample("sampled", call(3, 1030, 400)),  # from 512 on a sample narrows the search
    Sample("pruned", call(3, 1030, 500, values=pruned)),
    Sample("long_rows", call(2, 5000, 77, score="magnitude_gradient"), full=True),
    Sample("tensor", call(7, 17, 40, "tensor", values=levels)),
    Sample("groups_2_4", call(3, 132, 2, "block", block=(1, 4), values=levels)),
    Sample("groups_1_2", call(2, 34, 1, "block", "taylor", block=(1, 2))),
    Sample("groups_4_8", call(2, 136, 4, "block", "value", block=(1, 8), values=infinities)),
    Sample("groups_of_3", call(5, 33, 1, "block", block=(1, 3), values=levels)),
    Sample("groups_of_32", call(2, 96, 9, "block", "wanda", block=(1, 32))),
    Sample("blocks_of_rows", call(4, 48, 17, "block", block=(2, 16), values=levels)),
    Sample("blocks_apart", call(6, 15, 4, "block", block=(3, 5), values=levels)),
    Sample("columns_16", call(32, 21, 5, "block", block=(16, 1), values=levels)),
    Sample("no_rows", call(0, 7, 3)),
    Sample("no_columns", call(3, 0, 0)),
]
# More than 65,536 entries: by a sample and one pass, or, where many scores are equal, by histograms.
TENSORS = [
    Sample("tensor_large", call(70, 1100, 30000, "tensor")),
    Sample("tensor_few", call(70, 1100, 70, "tensor", "taylor"), full=True),
    Sample("tensor_pruned", call(70, 1100, 40000, "tensor", values=pruned)),
    Sample("tensor_pruned_none", call(70, 1100, 0, "tensor", values=lambda rand, n, k: torch.zeros(n, k))),
    Sample("tensor_one_row", call(1, 300000, 1000, "tensor"), full=True),
    Sample("tensor_short_rows", call(30000, 3, 33000, "tensor", values=levels), full=True),
]


def same_dtype(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """A score is defined in the dtype of the arguments: rounding makes ties that fp64 does not have."""
    return {"output 0": OPERATORS["keep_mask"].reference(*args)}


def several(keep: int, score: str = "magnitude", values: Values = normal, scale: int = 1) -> Any:
    def make(rand: Random) -> tuple[Any, ...]:
        shapes = [(3, 17), (5 * scale, 64), (2, 9)]
        weights = [values(rand, *shape) for shape in shapes]
        others = [other_of(rand, score, *shape) for shape in shapes]
        return weights, [] if SCORES[score] is None else others, keep, score, 0.3

    return make


def of_all(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"output 0[{i}]": bits for i, bits in enumerate(OPERATORS["keep_masks"].reference(*args))}


MASKS = [
    Sample("levels", several(100, values=levels)),
    Sample("wanda", several(20, "wanda")),
    Sample("gradient", several(350, "magnitude_gradient")),
    Sample("large", several(30000, values=pruned, scale=300)),
    Sample("larger", several(30000, "fisher", scale=400), full=True),
]
CHECKS = [
    *check_op(
        "keep_mask",
        KEEP,
        tiny=[Sample("tiny", call(2, 13, 2)), Sample("tiny_resized", call(3, 26, 2))],
        decided_by=same_dtype,
    ),
    # in the interpreter these are the reference
    *[p for p in check_op("keep_mask", TENSORS, tiny=(), decided_by=same_dtype) if "-triton-" not in str(p.id)],
    *check_op(
        "keep_masks",
        MASKS,
        tiny=[Sample("tiny", several(7)), Sample("tiny_resized", several(7, scale=2))],
        decided_by=of_all,
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_operator(check: Callable[[], None]) -> None:
    check()


NAN = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])


def keep(**options: Any) -> Callable[[], Any]:
    arguments = {"weight": lambda: torch.ones(3, 4), "keep": lambda: 2} | {
        k: v if callable(v) else lambda v=v: v for k, v in options.items()
    }
    return lambda: ops.keep_mask(**{name: value() for name, value in arguments.items()})


def refused(
    name: str, sentence: str, error: type[Exception] = ValueError, data: bool = False, **options: Any
) -> Refusal:
    return Refusal(name, keep(**options), error, f"keep_mask: {sentence}", data)


NAMES = "value, magnitude, wanda, taylor, fisher, magnitude_gradient"
FITS = "block must be positive and divide weight [3, 4] (otherwise pad weight with zeros to a multiple, "
SHORTER = (
    "block must be positive and divide weight [3, 4] (pad=True lets the last block of a row be shorter), got (1, 3)"
)
REFUSALS = [
    refused("weight", "weight must be a tensor, got list", TypeError, weight=[1.0]),
    refused("rank", "weight must have shape [N, K] or [N, ...], got [4]", weight=lambda: torch.ones(4)),
    refused(
        "dtype",
        "weight must be a floating-point tensor, got torch.int64",
        TypeError,
        weight=lambda: torch.ones(3, 4).long(),
    ),
    refused("scope", "scope must be one of row, tensor, block, got 'column'", scope="column"),
    refused("score", f"score must be one of {NAMES}, got 'random'", score="random"),
    refused("too_many", "keep must be between 0 and the 4 columns of a row, got 5", keep=5),
    refused("negative", "keep must be between 0 and the 4 columns of a row, got -1", keep=-1),
    refused("too_many_of_all", "keep must be between 0 and the 12 entries of weight, got 13", keep=13, scope="tensor"),
    refused(
        "n_above_m", "keep must be between 0 and the 2 entries of a block, got 3", keep=3, scope="block", block=(1, 2)
    ),
    refused("keep", "keep must be an integer or an int64 tensor, got 0.5", TypeError, keep=0.5),
    refused(
        "counts_dtype",
        "keep must be an integer or an int64 tensor, got torch.int32",
        TypeError,
        keep=lambda: torch.ones(3, dtype=torch.int32),
    ),
    refused(
        "counts_shape",
        "keep must have shape [3] (an entry per row of weight), got [4]",
        keep=lambda: torch.ones(4, dtype=torch.int64),
    ),
    refused(
        "counts_scope",
        "keep must be an integer where scope is 'tensor', got a tensor of shape [3]",
        keep=lambda: torch.ones(3, dtype=torch.int64),
        scope="tensor",
    ),
    refused(
        "counts_value",
        "keep must be between 0 and the 4 columns of a row, got 0 to 5",
        keep=lambda: torch.tensor([0, 5, 1]),
        data=True,
    ),
    refused(
        "no_block",
        "block must be given exactly where scope is 'block', got scope='block' and block=None",
        scope="block",
    ),
    refused(
        "block_of_rows",
        "block must be given exactly where scope is 'block', got scope='row' and block=(1, 4)",
        block=(1, 4),
    ),
    refused("block_three", "block must be two integers (R, C), got (1, 2, 2)", scope="block", block=(1, 2, 2)),
    refused("columns_left", SHORTER, scope="block", block=(1, 3)),
    refused("rows_left", FITS + "torch.nn.functional.pad), got (2, 2)", scope="block", block=(2, 2)),
    refused("block_zero", FITS + "torch.nn.functional.pad), got (0, 2)", scope="block", block=(0, 2)),
    refused("pad", "pad must be True or False, got 1", TypeError, scope="block", block=(1, 3), pad=1),
    refused("pad_rows", "pad must be False but for blocks of one row, got scope='row' and block=None", pad=True),
    refused(
        "pad_blocks",
        "pad must be False but for blocks of one row, got scope='block' and block=(2, 3)",
        scope="block",
        block=(2, 3),
        pad=True,
    ),
    refused(
        "pad_too_many",
        "keep must be between 0 and the 3 entries of a block, got 4",
        keep=4,
        scope="block",
        block=(1, 3),
        pad=True,
    ),
    refused(
        "pad_other",
        "other must have shape [4] where score is 'wanda', got [5]",
        score="wanda",
        other=lambda: torch.ones(5),
        scope="block",
        block=(1, 3),
        pad=True,
    ),
    refused("no_other", "other must be a tensor of shape [K] where score is 'wanda', got None", score="wanda"),
    refused(
        "other_shape",
        "other must have shape [3, 4] where score is 'taylor', got [4]",
        score="taylor",
        other=lambda: torch.ones(4),
    ),
    refused(
        "other_unused",
        "other must be None where score is 'magnitude', got a tensor of shape [4]",
        other=lambda: torch.ones(4),
    ),
    refused("factor", "factor must be finite, got inf", factor=float("inf")),
    refused("nan", "scores must not be NaN, got 3 NaN among 4 scores", weight=NAN, keep=1, data=True),
    refused(
        "nan_of_all", "scores must not be NaN, got 3 NaN among 4 scores", weight=NAN, keep=1, scope="tensor", data=True
    ),
    refused(
        "nan_of_groups",
        "scores must not be NaN, got 3 NaN among 4 scores",
        weight=NAN,
        keep=1,
        scope="block",
        block=(1, 2),
        data=True,
    ),
    refused(
        "nan_by_product",  # neither argument is NaN
        "scores must not be NaN, got 1 NaN among 2 scores",
        weight=torch.tensor([[0.0, 1.0]]),
        other=torch.tensor([torch.inf, torch.inf]),
        score="wanda",
        keep=1,
        data=True,
    ),
    refused(
        "nan_in_many",
        "scores must not be NaN, got 1 NaN among 70000 scores",
        weight=lambda: torch.ones(70, 1000).index_put_((torch.tensor(69), torch.tensor(999)), torch.tensor(torch.nan)),
        scope="tensor",
        data=True,
    ),
    Refusal(
        "masks_keep",
        lambda: ops.keep_masks([torch.ones(2, 2), torch.ones(1, 3)], 8),
        ValueError,
        "keep_masks: keep must be between 0 and the 7 entries of all weights, got 8",
    ),
    Refusal(
        "masks_others",
        lambda: ops.keep_masks([torch.ones(2, 2)], 1, score="taylor", others=[]),
        ValueError,
        "keep_masks: other must be a tensor of shape [N, K] where score is 'taylor', got None",
    ),
    Refusal(
        "masks_length",
        lambda: ops.keep_masks([torch.ones(2, 2)], 1, score="taylor", others=[torch.ones(2, 2)] * 2),
        ValueError,
        "keep_masks: others must have 1 entries, one for each weight, got 2",
    ),
    Refusal(
        "masks_nan",
        lambda: ops.keep_masks([torch.ones(2, 2), NAN], 1),
        ValueError,
        "keep_masks: scores must not be NaN, got 3 NaN among 8 scores",
        data=True,
    ),
]


@pytest.mark.parametrize("check", refusals(REFUSALS))
def test_refusal(check: Callable[[], None]) -> None:
    check()


# --------------------------------------------------------------------------------------------------------- laws

problems = st.tuples(
    st.integers(1, 6),
    st.sampled_from([1, 7, 40, 64, 200, 600]),
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.sampled_from([0.25, 3.0, 1e30]),
)


def drawn(rows: int, columns: int, seed: int, spread: float) -> Tensor:
    """From a few levels to all different."""
    x = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    return (x * spread).round() if spread < 1e30 else x


@given(problems)
@settings(max_examples=60, deadline=None)
def test_it_is_a_stable_sort_cut_off(problem: tuple[int, int, int, float, float]) -> None:
    rows, columns, seed, share, spread = problem
    weight, count = drawn(rows, columns, seed, spread), round(share * columns)
    mask = ops.unpack_mask(ops.keep_mask(weight, count), columns)
    assert mask.sum(1).tolist() == [count] * rows
    for row, kept in zip(weight.abs().tolist(), mask.tolist(), strict=True):
        best = sorted(range(columns), key=lambda i: (-row[i], i))[:count]
        assert [i for i in range(columns) if kept[i]] == sorted(best)


@given(problems)
@settings(max_examples=30, deadline=None)
def test_scopes_agree(problem: tuple[int, int, int, float, float]) -> None:
    """A row is a tensor of its own; rows one after the other are one list; a block is a row folded."""
    rows, columns, seed, share, spread = problem
    weight = drawn(rows, columns, seed, spread)
    count, total = round(share * columns), round(share * rows * columns)
    by_row = ops.keep_mask(weight, count)
    each = [ops.keep_mask(row[None], count, scope="tensor") for row in weight]
    assert torch.equal(by_row, torch.cat(each))
    assert torch.equal(by_row, ops.keep_mask(weight, torch.full((rows,), count)))
    assert torch.equal(by_row, ops.keep_mask(weight, count, scope="block", block=(1, columns)))
    whole = ops.keep_mask(weight, total, scope="tensor")
    assert torch.equal(whole, torch.cat(ops.keep_masks([row[None] for row in weight], total)))
    assert torch.equal(whole, ops.keep_mask(weight, total, scope="block", block=(rows, columns)))
    assert int(ops.mask_offsets(whole)[-1]) == total


@given(st.integers(0, 2**31), st.integers(0, 150))
@settings(max_examples=30, deadline=None)
def test_distinct_scores_move_with_their_columns(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.stack([torch.randperm(150, generator=generator) + 1.0 for _ in range(3)])
    order = torch.randperm(150, generator=generator)
    moved = ops.unpack_mask(ops.keep_mask(weight[:, order], count), 150)
    assert torch.equal(moved, ops.unpack_mask(ops.keep_mask(weight, count), 150)[:, order])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (8, 16), (16, 48)])
def test_each_group_keeps_n_of_m(n: int, m: int) -> None:
    weight = (torch.randn(5, 7 * m) * 2).round()
    groups = ops.unpack_mask(ops.keep_mask(weight, n, scope="block", block=(1, m)), 7 * m).view(5, 7, m)
    assert (groups.sum(2) == n).all()
    magnitude = weight.abs().view(5, 7, m)
    least = torch.where(groups, magnitude, torch.inf).amin(2)
    assert (least >= torch.where(groups, -torch.inf, magnitude).amax(2)).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5), (8, 16), (4, 4)])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 17, 65, 130])
@pytest.mark.parametrize("score", ["value", "magnitude", "wanda", "magnitude_gradient"])
def test_the_last_group_may_be_shorter(n: int, m: int, columns: int, score: str) -> None:
    """Whole groups are chosen as if the others were not there, and of r weights behind them the min(N, r) best are kept."""
    rand = Random(f"pad {n} {m} {columns} {score}")
    weight, other = levels(rand, 5, columns), other_of(rand, score, 5, columns)
    weight[0] = -torch.inf  # no padding comes before it
    options: dict[str, Any] = {"score": score, "factor": -0.5 if score == "magnitude_gradient" else 1.0}
    found = ops.keep_mask(weight, n, scope="block", block=(1, m), pad=True, other=other, **options)
    assert found.shape == (5, -(-columns // 8))
    expected = []
    for start in range(0, columns, m):
        group = slice(start, start + m)
        of_group = None if other is None else other[..., group].contiguous()
        part = weight[:, group].contiguous()
        width = part.shape[1]
        expected.append(ops.unpack_mask(ops.keep_mask(part, min(n, width), other=of_group, **options), width))
    assert torch.equal(found, ops.pack_mask(torch.cat(expected, 1)))
    if columns % m == 0:
        assert torch.equal(found, ops.keep_mask(weight, n, scope="block", block=(1, m), other=other, **options))


def test_a_shorter_group_compiles() -> None:
    torch._dynamo.reset()

    def choose(x: Tensor) -> Tensor:
        return ops.keep_mask(x, 2, scope="block", block=(1, 4), pad=True)

    compiled = torch.compile(choose, fullgraph=True)
    for columns in (19, 22):
        x = torch.randn(3, columns)
        assert torch.equal(compiled(x), choose(x))


def test_infinite_scores_are_in_order() -> None:
    """What the operator promises; layers and methods refuse them."""
    weight = torch.tensor([[1.0, -torch.inf, torch.inf, 2.0, torch.inf]])
    for scope in ("row", "tensor"):
        assert ops.keep_mask(weight, 3, scope=scope, score="value").tolist() == [[0b11100]]
        assert ops.keep_mask(weight, 2, scope=scope).tolist() == [[0b00110]]
    assert ops.keep_masks([weight, weight], 4)[1].tolist() == [[0b00010]]


def test_the_signs_of_zero_are_equal() -> None:
    weight = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, -0.0, 0.0, -2.0]])
    for scope, block in (("row", None), ("tensor", None), ("block", (1, 8))):
        bits = ops.keep_mask(weight, 3, scope=scope, score="value", block=block)
        assert bits.tolist() == [[0b111]]
    products = ops.keep_mask(torch.tensor([[-1e-30, 1e-30]]), 1, score="wanda", other=torch.tensor([-1e-30, 0.0]))
    assert products.tolist() == [[1]]  # an underflow to -0


def test_a_kernel_of_four_dimensions_is_read_by_rows() -> None:
    weight, gradient = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    flat = ops.keep_mask(weight.flatten(1), 9, score="taylor", other=gradient.flatten(1))
    assert torch.equal(ops.keep_mask(weight, 9, score="taylor", other=gradient), flat)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.keep_mask(last, 9, score="taylor", other=gradient), flat)


def test_wide_statistics_of_narrow_weights() -> None:
    """fp32 norms are not rounded to the dtype of the weights; fp64 ones make the scores fp64."""
    weight = torch.ones(1, 3, dtype=torch.bfloat16)
    assert ops.keep_mask(weight, 1, score="wanda", other=torch.tensor([1.0, 1.0001, 1.0])).tolist() == [[2]]
    close = torch.tensor([1.0, 1.0, 1 + 1e-12], dtype=torch.float64)
    assert ops.keep_mask(weight, 1, score="wanda", other=close).tolist() == [[4]]


def test_no_tensors() -> None:
    assert ops.keep_masks([], 0) == []
    with pytest.raises(ValueError, match="between 0 and the 0 entries of all weights, got 1"):
        ops.keep_masks([], 1)


def test_threads_do_not_matter_to_a_large_tensor() -> None:
    weight = torch.randn(300, 1000).bfloat16()  # many ties
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(ops.keep_mask(weight, 100001, scope="tensor"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert int(ops.mask_offsets(found[0])[-1]) == 100001
