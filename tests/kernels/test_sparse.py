# SPDX-License-Identifier: Apache-2.0
"""What the launchers of sparse have of their own: words and bytes of masks, blocks and their tails, splits, plans."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("launchers on CPU tensors need the interpreter", allow_module_level=True)

from cofire.info import kernel_for
from cofire.ops import pack_bits
from cofire.ops.sparse_weight import SparseWeight
from cofire.registry import OPERATORS
from cofire_kernels import configs, sparse
from cofire_kernels.sparse import decode, masked, product
from helpers import Args, Case, Context, bits, check_values

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def launch(name: str, *args: Any) -> tuple[Tensor, ...]:
    """The launcher's result, which is right and the same again."""
    outputs, again = (getattr(sparse, name)(*args) for _ in range(2))
    outputs, again = (o if isinstance(o, tuple) else (o,) for o in (outputs, again))
    sums = dict.fromkeys(("output 0", "input_grad", "weight_grad", "values_grad"), 16)
    check_values(Context(Case(OPERATORS[name], (), (), (), sums, None), "triton", "kernel test"), args, outputs)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outputs, again, strict=True)), f"{name} varies"
    return outputs


@pytest.fixture
def narrow() -> Iterator[None]:
    """Tiles so small that every sum is shared by several programs."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4}
    products = ("masked_linear", "masked_input_gradient", "masked_weight_gradient", "spmm_block", "sddmm_block")
    configs.forced.update(dict.fromkeys(products, tile))
    configs.forced["spmm_block"] = configs.forced["sddmm_block"] = tile | {"BLOCK_K": 16}
    configs.forced.update({"sum_splits": {"BLOCK": 64, "num_warps": 1}, "decode_sparse": {"BLOCK": 16, "num_warps": 1}})
    yield
    configs.forced.clear()


def mask_of(rows: int, columns: int, density: float = 0.4) -> tuple[Tensor, Tensor]:
    kept = torch.rand(rows, columns) < density
    return kept, pack_bits(kept.to(torch.uint8), 1)


# ------------------------------------------------------------------------------------------------------- masked


@pytest.mark.parametrize("columns", [1, 7, 8, 33, 64, 70])
def test_masks_of_every_width(columns: int) -> None:
    """Rows of bits that are whole words, and others; what is pruned may be anything."""
    kept, packed = mask_of(9, columns)
    w = torch.randn(9, columns)
    w[~kept] = torch.tensor([torch.nan, torch.inf])[torch.randint(0, 2, w.shape)][~kept]
    assert torch.equal(sparse.apply_mask(w, packed), torch.where(kept, w, 0.0))
    x, grad = torch.randn(3, columns), torch.randn(3, 9)
    launch("masked_linear", x, w, packed, torch.randn(9), "hard", 0.0)
    launch("masked_linear_backward", grad, x, w, packed, "hard", 0.0, True, True)


def test_masks_anywhere_in_memory() -> None:
    """Bits that do not begin at a word, gaps between the rows, weights of more dimensions, transposed ones."""
    kept, packed = mask_of(6, 72)
    w = torch.randn(6, 2, 4, 9).transpose(1, 2)
    expected = torch.where(kept.view(w.shape), w, 0.0)
    memory = torch.empty(6 * 9 + 1, dtype=torch.uint8)
    memory[1:] = packed.flatten()
    for same in (packed, memory[1:].view(6, 9), torch.cat([packed, packed], 1)[:, :9]):
        assert torch.equal(sparse.apply_mask(w, same), expected)
    kept, packed = mask_of(6, 64)
    memory[1 : 6 * 8 + 1] = packed.flatten()
    w = torch.randn(64, 6).t()
    assert torch.equal(sparse.apply_mask(w, memory[1 : 6 * 8 + 1].view(6, 8)), torch.where(kept, w, 0.0))


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("hard", torch.float32),
        ("hard", torch.bfloat16),
        ("hard", torch.float16),
        ("invariant", torch.float32),
        ("ste", torch.bfloat16),
        ("srste", torch.bfloat16),
        ("srste", torch.float32),
    ],
)
def test_masked_products(narrow: None, mode: str, dtype: torch.dtype) -> None:
    """Few rows, of which several programs share the sum, in every mode."""
    samples = 9 if dtype == torch.float32 else 4
    kept, _ = mask_of(66, 130)
    kept[:16, :32] = False  # a tile without any weight
    packed = pack_bits(kept.to(torch.uint8), 1)
    w, x, grad = torch.randn(66, 130), torch.randn(2, samples, 130), torch.randn(2, samples, 66)
    if mode == "invariant":
        w = torch.where(kept, w, 0.0)
    w, x, grad = w.to(dtype), x.to(dtype), grad.to(dtype)
    launch("masked_linear", x, w, packed, torch.randn(66).to(dtype), mode, 0.1)
    launch("masked_linear_backward", grad, x, w, packed, mode, 0.1, True, True)


def test_many_rows_write_the_masked_weight() -> None:
    kept, packed = mask_of(8, 40)
    w = torch.where(kept, torch.randn(8, 40), torch.nan)
    x, grad = torch.randn(65, 40), torch.randn(65, 8)
    launch("masked_linear", x, w, packed, None, "hard", 0.0)
    launch("masked_linear_backward", grad, x, w, packed, "hard", 0.0, True, True)
    launch("masked_linear_backward", grad, x, w.nan_to_num(2.0), packed, "srste", 0.5, True, True)


def test_nothing_to_multiply() -> None:
    for samples, rows, columns in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        packed = mask_of(rows, columns)[1]
        x, w, grad = torch.randn(samples, columns), torch.randn(rows, columns), torch.randn(samples, rows)
        launch("masked_linear", x, w, packed, torch.randn(rows), "hard", 0.0)
        launch("masked_linear_backward", grad, x, w, packed, "hard", 0.0, True, True)


# ----------------------------------------------------------------------------------------------- compressed


def compressed(rows: int, columns: int, format: str, **options: Any) -> SparseWeight:
    block = options.get("block", (1, 1))
    kept = torch.rand(-(-rows // block[0]), -(-columns // block[1])) < 0.4
    kept[-1] = kept[0, -1] = False
    kept[0, 0] = True
    kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return SparseWeight.from_dense(torch.randn(rows, columns), kept, format, **options)


@pytest.mark.parametrize(
    ("block", "grid", "dtype"),
    [
        ((16, 16), (2, 20), torch.float32),
        ((32, 16), (2, 5), torch.bfloat16),
        ((24, 40), (2, 4), torch.float16),
        ((16, 64), (2, 3), torch.float32),
    ],
)
def test_blocks(narrow: None, block: tuple[int, int], grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Several tiles a block, blocks of no power of two, tails, empty rows of blocks; a sum is shared."""
    w = compressed(grid[0] * block[0] - 3, grid[1] * block[1] - 5, "block", block=block)
    w = w.replace(values=w.values.to(dtype))
    x, grad = torch.randn(2, 9, w.shape[1]).to(dtype), torch.randn(2, 9, w.shape[0]).to(dtype)
    launch("spmm", x, torch.randn(w.shape[0]), *w.arguments())
    launch("spmm_backward", grad, x, *w.arguments(), True, True)
    launch("sddmm", grad, x, w.index, w.offsets, "block", *block)


def test_blocks_as_shipped() -> None:
    w = compressed(70, 100, "block", block=(32, 32))
    for samples in (3, 40):
        x, grad = torch.randn(samples, 100), torch.randn(samples, 70)
        launch("spmm", x, None, *w.arguments())
        launch("spmm_backward", grad, x, *w.arguments(), True, True)


def test_blocks_of_bytes_and_of_mixed_types() -> None:
    w = compressed(40, 50, "block", block=(16, 16), values=torch.int8)
    x = torch.randn(5, 50)
    for dtype in DTYPES:
        launch("spmm", x.to(dtype), torch.randn(40), *w.arguments())
    w = compressed(40, 50, "block", block=(16, 16))
    launch("spmm", x.bfloat16(), None, *w.arguments())  # fp32 weights: multiplied in fp32
    launch("spmm", x, None, *w.replace(values=w.values.bfloat16()).arguments())


@pytest.mark.parametrize("format", ["csr", "delta", "bitmap"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 300), (33, 65)])
def test_weights_come_back(narrow: None, format: str, shape: tuple[int, int]) -> None:
    """Decoded to the last bit, in whatever type; long gaps, empty rows and columns, kept zeros."""
    w = compressed(*shape, format)
    for values in (w.values, w.values.bfloat16(), (w.values * 40).to(torch.int8)):
        found = decode.dense(values, w.index, w.offsets, format, *shape, 1, 1, torch.float32)
        scale = torch.ones(shape[0]) if values.dtype == torch.int8 else None
        assert torch.equal(found, w.replace(values=values, scale=scale).to_dense().float())
    sparse_mask = torch.zeros(shape, dtype=torch.bool)
    sparse_mask[:, -1] = True
    far = SparseWeight.from_dense(torch.randn(shape), sparse_mask, format)
    assert torch.equal(decode.dense(*far.arguments()[:3], format, *shape, 1, 1, torch.float32), far.to_dense())


@pytest.mark.parametrize("format", ["csr", "delta", "bitmap"])
def test_other_formats_take_the_library(format: str) -> None:
    w = compressed(20, 40, format)
    x, grad = torch.randn(3, 40), torch.randn(3, 20)
    for dtype in DTYPES:
        launch("spmm", x.to(dtype), torch.randn(20), *w.replace(values=w.values.to(dtype)).arguments())
    eight = SparseWeight.from_dense(torch.randn(20, 40), torch.rand(20, 40) < 0.5, format, values=torch.int8)
    launch("spmm", x.bfloat16(), None, *eight.arguments())
    if format == "csr":
        launch("spmm_backward", grad, x, *w.arguments(), True, True)
        launch("sddmm", grad, x, w.index, w.offsets, "csr", 1, 1)


def test_small_blocks_take_the_library() -> None:
    w = compressed(20, 41, "block", block=(16, 2))
    x, grad = torch.randn(3, 41), torch.randn(3, 20)
    launch("spmm", x, None, *w.arguments())
    launch("spmm_backward", grad, x, *w.arguments(), True, True)
    launch("sddmm", grad, x, w.index, w.offsets, "block", 16, 2)


def test_no_values() -> None:
    for format, block in (("csr", (1, 1)), ("bitmap", (1, 1)), ("block", (16, 16))):
        w = SparseWeight.from_dense(torch.randn(20, 40), torch.zeros(20, 40, dtype=torch.bool), format, block=block)
        x = torch.randn(3, 40)
        launch("spmm", x, torch.randn(20), *w.arguments())
        if format != "bitmap":
            launch("spmm_backward", torch.randn(3, 20), x, *w.arguments(), True, True)


# ------------------------------------------------------------------------------------------------------- plans


def plan(name: str, args: Args) -> str:
    operator = OPERATORS[name]
    module, _, launcher = operator.triton.launcher.partition(":")
    assert kernel_for(operator, tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)).startswith(
        "reference"
    )
    return str(getattr(__import__(module, fromlist=["_"]), f"{launcher}_plan")(*args))


def test_plans_say_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are true: where no masked weight is announced, none is written."""
    _, packed = mask_of(8, 40)
    w = torch.randn(8, 40)
    written: list[Tensor] = []
    apply = masked.apply_mask
    monkeypatch.setattr(masked, "apply_mask", lambda *args: written.append(args[0]) or apply(*args))
    for samples, mode, words, writes in (
        (64, "hard", "masks tiles of the weight for the tensor cores", False),
        (65, "hard", "writes the masked weight, then the library's product: more than 64 rows", True),
        (64, "invariant", "the library's product: the pruned weights are zero already", False),
    ):
        args = (torch.randn(samples, 40), w, packed, None, mode, 0.0)
        assert plan("masked_linear", args) == words
        written.clear()
        sparse.masked_linear(*args)
        assert bool(written) == writes
    assert masked.LIBRARY_ROWS == {2: 512, 4: 64}
    grad = torch.randn(64, 8)
    said = plan("masked_linear_backward", (grad, torch.randn(64, 40), w, packed, "ste", 0.0, True, True))
    assert said == (
        "input: masks tiles of the weight for the tensor cores; "
        "weight: the library's product: the gradient passes to all weights"
    )


def test_plans_of_compressed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    dense = product.dense
    monkeypatch.setattr(product, "dense", lambda *args: decoded.append(args[3]) or dense(*args))
    for format, block, words in (
        ("block", (16, 16), "multiplies the kept blocks"),
        ("block", (16, 1), "decodes the weight, then the library's product: blocks of 16 x 1 are smaller than a tile"),
        ("bitmap", (1, 1), "decodes the weight, then the library's product: tensor cores multiply dense tiles faster"),
    ):
        w = compressed(32, 40, format, block=block)
        args = (torch.randn(3, 40), None, *w.arguments())
        assert plan("spmm", args).startswith(words)
        decoded.clear()
        sparse.spmm(*args)
        assert bool(decoded) == words.startswith("decodes")
