# SPDX-License-Identifier: Apache-2.0
"""spmm of few rows with a bitmap, in CUDA C++ (``csrc/cuda/sparse.cu``): an alternative to decoding the weight.

The kernels read layouts of their own, made from the weight by torch operators at the first call and kept as long as the
tensor of its values lives unchanged. Where no group of four columns has more than two values (2:4, and sparser) that is
the operand of the sparse tensor cores, 1.125 bytes a weight and nothing to decode; else bits and values in the order of
the dense tensor cores' operand, 0.133 bytes a weight and 2 a value.

Lane ``4 g + t`` of a warp has rows ``g`` and ``g + 8`` of a panel of 16, and of a slab of 64 columns:

* bitmap: the columns ``16 t + 4 i + c`` of tile ``i``, ``c`` from 0 to 3. Its word has bit
  ``8 i + 4 (c / 2) + 2 h + c % 2`` for row ``g + 8 h``. Values stand by slab (rounded up to eight), tile, lane, bit.
* 2:4: two products of 32 columns, of which product ``s`` takes the groups of four ``8 u + 2 s + r % 2 + 4 (r / 2)`` as
  its groups ``2 r + u``. Register ``q`` has the two values of group ``t + 4 (q / 2)``, row ``g + 8 (q % 2)``. Their
  places, two bits each, the lower first: of product ``s`` in the threads ``t = 2 s`` and ``2 s + 1`` of a quad, groups
  0 to 3 and 4 to 7, row ``g`` in the lower 16 bits and ``g + 8`` in the upper. (PTX ISA, "Matrix fragments for
  sparse mma.m16n8k32 with .f16 and .bf16 types".)

Whether they are faster than the library's product of the decoded weight has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cofire_kernels import nvrtc
from cofire_kernels.lowbit.product import _rows, _samples, _target, sum_splits
from cofire_kernels.lowbit.product_cuda import _aligned
from cofire_kernels.sparse.decode import PANEL, dense
from cofire_kernels.sparse.product import spmm, spmm_plan

SLAB = 64  # columns
THREADS = 256
WARPS = THREADS // 32
BLOCKS = 264  # thread blocks that keep a GPU busy: two for each of 132 multiprocessors
PANELS = {8: 2, 16: 4, 32: 8, 64: 8}  # of a thread block, by the rows of the input that its kernel takes

KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


# ------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """What the kernels read: ``kind`` "bitmap" (places, masks, values) or "24" (metadata, values)."""

    kind: str
    tensors: tuple[Tensor, ...]


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % SLAB, 0, -x.shape[0] % PANEL))


def _as_words(bits: Tensor) -> Tensor:
    """int64 below 2^32 as the int32 of the same bits."""
    return (bits - ((bits >> 31) << 32)).to(torch.int32)


def bitmap_layout(weight: Tensor, kept: Tensor) -> Layout:
    """Of a dense weight ``[N, K]`` and where it is kept.

    int32 places ``[panels, slabs + 1, 2]`` (where a slab's values begin, in units of eight; ten bits each for how many
    stand before its tiles 1, 2 and 3), int32 masks ``[panels, slabs, 32]``, both flat and with three (two) slabs
    behind the last, and the values.
    """
    panels, slabs = -(-weight.shape[0] // PANEL), -(-weight.shape[1] // SLAB)

    def by_lane(x: Tensor) -> Tensor:
        """[panels, slabs, tile, lane, bit] from rows (h, g) and columns (t, tile, q, z)."""
        x = _padded(x).view(panels, 2, 8, slabs, 4, 4, 2, 2)
        return x.permute(0, 3, 5, 2, 4, 6, 1, 7).reshape(panels, slabs, 4, 32, 8)

    w, k = by_lane(weight), by_lane(kept)
    bit = torch.arange(32, device=weight.device).view(4, 1, 8)
    masks = _as_words((k.long() << bit).sum((2, 4)))
    count = k.long().sum((3, 4))  # of each tile
    units = (count.sum(2) + 7) // 8
    starts = F.pad(units.flatten().cumsum(0), (1, 0))
    if int(starts[-1]) >= 1 << 31:
        raise ValueError(f"spmm: the CUDA C++ kernel takes fewer than 2^34 values, got {8 * int(starts[-1])}")
    before = count.cumsum(2)
    packed = before[..., 0] | before[..., 1] << 10 | before[..., 2] << 20
    first = starts[:-1].view(panels, slabs)
    last = starts[slabs::slabs, None] if slabs else starts[:1].expand(panels, 1)
    places = torch.stack([torch.cat([first, last], 1), F.pad(packed, (0, 1))], 2).to(torch.int32)
    flat = k.flatten(2)
    rank = flat.long().cumsum(2) - 1 + 8 * first[..., None]
    values = torch.zeros(8 * int(starts[-1]), dtype=weight.dtype, device=weight.device)
    values[rank[flat]] = w.flatten(2)[flat]
    # The kernel reads some places and masks in vain that are behind the last ones.
    behind = places.new_zeros(3 * 2), masks.new_zeros(2 * 32)
    places, masks = (torch.cat([x.flatten(), more]) for x, more in zip((places, masks), behind, strict=True))
    return Layout("bitmap", (places, masks, values))


def two_four_layout(weight: Tensor, kept: Tensor) -> Layout | None:
    """Of a dense weight and where it is kept; None where some group of four has three values.

    int32 metadata ``[panels, slabs, 32]``, values ``[panels, slabs, 2, 32, 8]``.
    """
    panels, slabs = -(-weight.shape[0] // PANEL), -(-weight.shape[1] // SLAB)
    k = _padded(kept).view(-1, slabs, 16, 4)
    count = k.sum(3)
    if bool((count > 2).any()):
        return None
    place = torch.arange(4, device=weight.device)
    lower = torch.where(k, place, 3).amin(3)
    upper = torch.where(k, place, 0).amax(3)
    single = count == 1  # with a zero before it, or behind it where there is no place before
    lower = torch.where((single & (upper > 0)) | (count == 0), 0, lower)
    upper = torch.where((single & (upper == 0)) | (count == 0), 1, upper)
    both = torch.stack([lower, upper], 3)
    w = torch.where(k, _padded(weight).view(-1, slabs, 16, 4), 0.0).gather(3, both)
    group = [[8 * (j % 2) + 2 * s + j // 2 % 2 + 4 * (j // 4) for j in range(8)] for s in range(2)]
    order = torch.tensor(group, device=weight.device).flatten()
    # rows (h, g); groups (s, hi, t): thread t has the groups t and t + 4
    values = w[:, :, order].view(panels, 2, 8, slabs, 2, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)
    codes = (lower | upper << 2)[:, :, order].view(panels, 2, 8, slabs, 2, 2, 4).permute(0, 3, 2, 4, 5, 1, 6)
    shift = 16 * torch.arange(2, device=weight.device)[:, None] + 4 * place
    metadata = _as_words((codes << shift).sum((5, 6)))  # [panels, slabs, g, s, column]: lane 4 g + 2 s + column
    return Layout("24", (metadata.view(panels, slabs, 32), values.reshape(panels, slabs, 2, 32, 8)))


_LAYOUTS = WeakIdKeyDictionary()


def _version(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version


def layout_of(values: Tensor, index: Tensor, offsets: Tensor, rows: int, columns: int) -> Layout:
    """The layout of a bitmap, made once: as long as none of its tensors is changed or replaced."""
    state = (*map(_version, (values, index, offsets)), rows, columns)
    known = _LAYOUTS.get(values)
    if known is not None and known[0] == state:
        found: Layout = known[1]
        return found
    with torch.no_grad():
        weight = dense(values, index, offsets, "bitmap", rows, columns, 1, 1, values.dtype)
        row = torch.arange(PANEL, device=index.device, dtype=torch.int32)[:, None]
        kept = (index.to(torch.int32)[:, None, :] >> row & 1).bool().flatten(0, 1)[:rows]
        layout = two_four_layout(weight, kept) or bitmap_layout(weight, kept)
    _LAYOUTS[values] = (state, layout)
    return layout


# ----------------------------------------------------------------------------------------------------- launching


def refused(
    samples: int, dtype: torch.dtype, values: torch.dtype, format: str, rows: int, columns: int
) -> str:  # fmt: skip
    """Why there is no kernel for such a call; empty where there is one."""
    if format != "bitmap":
        return f"the format {format}"
    if dtype not in KINDS or values != dtype:
        return f"values of {values} and an input of {dtype}"
    if not 1 <= samples <= max(PANELS):
        return f"{samples} rows, of at most {max(PANELS)}"
    return "" if rows and columns else "an empty weight"


def too_old(device: torch.device) -> str:
    """Why a GPU lacks the products that the kernels are made of, those of sparse tensor cores; empty where it has them."""
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_capability(device)
    return "" if found >= (8, 0) else f"compute capability {found[0]}.{found[1]}, of at least 8.0"


def _refused(*args: Any) -> str:
    input, values = args[0], args[2]
    return too_old(input.device) or refused(_samples(input), input.dtype, values.dtype, *args[6:9])


def spmm_cuda_plan(*args: Any) -> str:
    """What :func:`spmm_cuda` does with these arguments."""
    why = _refused(*args)
    return f"Triton: {spmm_plan(*args)} ({why})" if why else "CUDA C++: bits, or 2:4, to the tensor cores"


def shares(rows: int, columns: int, width: int) -> tuple[int, int, int]:
    """Thread blocks over the rows, over the slabs, and the slabs of each."""
    panels, slabs = PANELS[width], -(-columns // SLAB)
    blocks = -(-rows // (PANEL * panels))
    smallest = 4 * WARPS // panels  # slabs of a block: four for each warp
    splits = max(1, min(slabs // smallest, BLOCKS // blocks))
    part = -(-slabs // splits)
    return blocks, -(-slabs // part), part


def spmm_cuda(
    input: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, offsets: Tensor, scale: Tensor | None,
    format: str, rows: int, columns: int, block_rows: int, block_columns: int,
) -> Tensor:  # fmt: skip
    args = (input, bias, values, index, offsets, scale, format, rows, columns, block_rows, block_columns)
    if _refused(*args):
        return spmm(*args)
    layout = layout_of(values, index, offsets, rows, columns)
    x = _rows(input)
    if columns % SLAB:
        x = F.pad(x, (0, -columns % SLAB))
    samples = x.shape[0]
    width = next(w for w in PANELS if samples <= w)
    blocks, splits, part = shares(rows, columns, width)
    y = torch.empty((*input.shape[:-1], rows), dtype=input.dtype, device=input.device)
    to = _target(y, splits)
    pointers = (*layout.tensors, _aligned(x), None if bias is None else bias.float().contiguous())
    pointers += (None, y) if to is y else (to, None)
    name = f"spmm_{layout.kind}_{KINDS[input.dtype]}_{width}_kernel"
    numbers = (samples, rows, x.shape[1], part)
    nvrtc.launch("sparse", name, blocks * splits, THREADS, (*(0 if p is None else p for p in pointers), *numbers))
    with torch.cuda.device_of(y):
        sum_splits(to, y)
    return y
