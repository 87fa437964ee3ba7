# SPDX-License-Identifier: Apache-2.0
"""Layers that store the kept weights alone, and the rule by which they compute.

A product with a compressed weight reads less than a dense one and computes less of it per cycle: it wins where there are
few rows, or few weights. ``dispatch.json`` holds, for each instruction set, dtype and format, the largest density at which
the sparse product is taken, by the number of rows; ``cofire tune --device cpu`` measures it. A layer can measure its own
(:meth:`Compressed.prepare`), and says what it does (:meth:`Compressed.explain`).

Source: compressed rows: Saad, "Iterative methods for sparse linear systems" (2003), section 3.4; a layer is sparse only where
it was measured to be faster: Nikdan et al. 2023 (SparseProp, 2302.04852), section 4.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import native
from cofire.info import kernel_for
from cofire.nn.mask_checks import Watched
from cofire.nn.palettes import PackedPalettizedConv2d, PaddingMode
from cofire.ops import SparseWeight, apply_mask, pack_mask, sparse_conv2d, spmm
from cofire.ops.checks import check_choice, check_device, check_integer, is_integer, refuse, shape_of
from cofire.ops.sparse_weight import FORMATS, PANEL, panels_of
from cofire.registry import OPERATORS
from cofire.timing import medians

__all__ = ["Compressed", "CompressedConv2d", "CompressedLinear"]

#: Of the state of sparse and compressed layers: written into it, and compared.
VERSION = 1
PARTS = ("values", "index", "offsets", "scale")
TRAINABLE = ("csr", "block")
#: Rows of the input, in buckets: up to 1, 4, ... and beyond.
ROWS = (1, 4, 16, 64, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLE = Path(__file__).parent / "dispatch.json"
GAIN = 1.05  #: what is not faster by so much stays dense
#: Why a mask of as many weights may need more values, or fewer.
BRIDGES = (
    " (with the zeros that the format 'delta' needs: one for each 255 columns that are skipped, and one for a kept zero, as all "
    "are that are kept newly, at a multiple of 255 columns from the one before)"
)


# ----------------------------------------------------------------------------------------------------- dispatch


def bucket(rows: int) -> int:
    """The number of the bucket of so many rows."""
    for i, most in enumerate(ROWS):
        if rows <= most:
            return i
    return len(ROWS)


def bucket_name(number: int) -> str:
    low = 1 if number == 0 else ROWS[number - 1] + 1
    high = ROWS[number] if number < len(ROWS) else None
    return f">{low - 1}" if high is None else str(low) if low == high else f"{low}-{high}"


@functools.cache
def table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def machine_of(device: str) -> str:
    """What the table calls a device: of a CPU, its instruction set. Tiles that nothing was measured on count as AVX-512."""
    if device != "cpu":
        return device
    machine = instruction_set()
    return "avx512" if machine == "amx" and machine not in table()["densities"] else machine


def instruction_set() -> str:
    """What the table calls this CPU once it is measured: of two with AVX-512, that with tiles has other dense products."""
    return "amx" if native.STATUS.variant == "avx512" and native.has_tiles() else str(native.STATUS.variant)


def known_densities(device: str, dtype: torch.dtype, format: str, against: str) -> list[float] | None:
    """The table's entry, None where there is none. Arguments as of :func:`largest_density`."""
    machine = table()["densities"].get(machine_of(device), {})
    found: list[float] | None = machine.get(str(dtype).removeprefix("torch."), {}).get(against, {}).get(format)
    return found


def largest_density(device: str, dtype: torch.dtype, format: str, against: str) -> list[float]:
    """The largest density at which the sparse product is taken, by bucket of rows; zeros where nothing is known.

    ``against``: "kept" (a dense copy of the weight is there), "decoded" (it is decoded anew), "training", or "convolution".
    """
    return known_densities(device, dtype, format, against) or [0.0] * (len(ROWS) + 1)


def trains_faster(mask: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """The format in which training a weight with this mask pays on its device, or None."""
    format = trainable_format(mask, block)
    rows = mask.shape[0]
    where = torch.empty(0, mask.shape[1], dtype=dtype, device=mask.device)
    weight = empty_weight(rows, mask.shape[1], format, block, dtype, mask.device)
    if kernel_for(OPERATORS["spmm"], (where, None, *weight.arguments())).startswith("reference"):
        return None
    most = largest_density(mask.device.type, dtype, format, "training")[-2]
    return format if mask.numel() and float(mask.float().mean()) <= most else None


def trainable_format(mask: Tensor, block: tuple[int, int]) -> str:
    """ "block" if the mask consists of whole blocks, else "csr"."""
    rows, columns = mask.shape
    if block == (1, 1) or rows % block[0] or columns % block[1] or not mask.numel():
        return "csr"
    tiles = mask.view(rows // block[0], block[0], columns // block[1], block[1])
    return "block" if bool((tiles == tiles[:, :1, :, :1]).all()) else "csr"


def empty_weight(
    rows: int, columns: int, format: str, block: tuple[int, int], dtype: torch.dtype, device: Any
) -> SparseWeight:
    """A weight of nothing but zeros."""
    size = {"bitmap": PANEL, "block": block[0]}.get(format, 1)
    kinds = {"csr": torch.uint16 if columns <= 1 << 16 else torch.int32, "delta": torch.uint8, "bitmap": torch.uint16}
    values = (0, block[1], block[0]) if format == "block" else (0,)
    index = (panels_of(rows, PANEL), columns) if format == "bitmap" else (0,)
    return SparseWeight(
        torch.zeros(values, dtype=dtype, device=device),
        torch.zeros(index, dtype=kinds.get(format, torch.int32), device=device),
        torch.zeros(panels_of(rows, size) + 1, dtype=torch.int64, device=device),
        (rows, columns),
        format,
        block if format == "block" else (1, 1),
    )


# ------------------------------------------------------------------------------------------------------- layers


class Compressed(Watched):
    """What the compressed layers share: the kept weights, and where they stand.

    Attributes:
        values: parameter, the kept weights: ``[nnz]``, of blocks ``[blocks, C, R]``. Trained if the format can be (``csr`` and
            ``block`` with floats) and the layer it was made of was.
        index, offsets, scale: buffers, as in :class:`cofire.ops.SparseWeight`; scale is None for floats. What is uint16 there
            and in the state is twice as many bytes here: torch's processes exchange no uint16, and its pickle has none.
        geometry: int64 buffer: version of the format, its number, the block, and the weight's shape.
        cache_dense: whether a dense copy is kept, from the first time that it is needed, where dense products are
            faster. Else the weight is decoded each time they are.
        checks: as of :class:`Sparse`: for places that averages of buffers spoiled.
    """

    values: nn.Parameter
    index: Tensor
    offsets: Tensor
    scale: Tensor | None
    geometry: Tensor
    bias: nn.Parameter | None
    shape: tuple[int, ...]
    cache_dense: bool
    product = "linear"  #: torch's, where the dense one is taken

    # -------------------------------------------------------------------------------------------- its weight

    def _take(self, weight: SparseWeight, shape: tuple[int, ...], dtype: torch.dtype, trained: bool) -> None:
        self.shape, self.format, self.block = shape, weight.format, weight.block
        self.values = nn.Parameter(weight.values.detach(), trained and weight.trainable)
        self.register_buffer("index", as_bytes(weight.index))
        self.register_buffer("offsets", weight.offsets)
        self.register_buffer("scale", weight.scale)
        numbers = [VERSION, FORMATS.index(weight.format), *weight.block, *shape]
        self.register_buffer("geometry", torch.tensor(numbers, device=weight.device))
        self._mask_changed()
        #: Of the weight that this one stands for; follows the layer wherever it is cast to.
        self.dtype = dtype
        self._forget()

    def _forget(self) -> None:
        """What was derived from the weight, or measured with it."""
        self._copy: tuple[Any, Tensor] | None = None
        self._prepared: set[int] | None = None
        self._measured: dict[tuple[torch.dtype, int], tuple[float, float]] = {}
        self._replan()

    @property
    def sparse_weight(self) -> SparseWeight:
        """The weight as ``[N, K]``, around the layer's own tensors."""
        shape = (self.shape[0], math.prod(self.shape[1:]))
        index = from_bytes(self.index, self.format)
        return SparseWeight(self.values, index, self.offsets, shape, self.format, self.block, self.scale)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, anew with each call."""
        return self.sparse_weight.to_dense().to(self.dtype).view(self.shape)

    @property
    def mask(self) -> Tensor:
        """bool, of the weight's shape: what is kept."""
        return self.sparse_weight.mask().view(self.shape)

    _mask_names = ("index", "offsets", "geometry")

    def _weight_shape(self) -> Sequence[int]:
        return self.shape

    @property
    def mode(self) -> str:
        return "compressed"

    def density(self) -> float:
        """The share of the weights that is stored (of ``delta`` with the zeros that bridge a distance)."""
        return self.values.numel() / max(1, math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and of the bias."""
        return self.sparse_weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def _operands(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.values, self.index, self.offsets, self.scale) if t is not None)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[N, K]`` in this dtype, kept as long as none of its parts changes."""
        if not self.cache_dense or torch.compiler.is_compiling() or any(t.is_inference() for t in self._operands()):
            return self._decode(dtype)
        key = (dtype, torch.is_inference_mode_enabled(), *((t.data_ptr(), t._version) for t in self._operands()))
        if self._copy is None or self._copy[0] != key:
            self._copy = (key, self._decode(dtype))
        return self._copy[1]

    def _decode(self, dtype: torch.dtype) -> Tensor:
        return self.sparse_weight.to_dense().to(dtype)

    # ------------------------------------------------------------------------------------------- which product

    def _replan(self) -> None:
        """Whether the sparse product is taken, by dtype and bucket; looked up here so that nothing is on the call path."""
        self._plans: dict[tuple[torch.dtype, bool], tuple[bool, ...]] = {}
        for dtype in DTYPES:
            for kept in (False, True):
                self._plans[dtype, kept] = tuple(self._sparse(dtype, kept, i)[0] for i in range(len(ROWS) + 1))

    def _against(self, kept: bool) -> str:
        """Which densities of the table count."""
        return "kept" if kept else "decoded"

    def _kernel(self, dtype: torch.dtype) -> str:
        x = torch.empty(0, self.sparse_weight.shape[1], dtype=dtype, device=self.values.device)
        return kernel_for(OPERATORS["spmm"], (x, None, *self.sparse_weight.arguments()))

    def _sparse(self, dtype: torch.dtype, kept: bool, number: int) -> tuple[bool, str]:
        """Whether the sparse product is taken, and why."""
        if self.values.is_meta:
            return True, "nothing is computed on meta"
        times = self._measured.get((dtype, number))
        if times is not None:
            return times[0] * GAIN <= times[1], f"measured here: sparse {times[0]:.4g} ms, dense {times[1]:.4g} ms"
        kernel = self._kernel(dtype)
        if kernel.startswith("reference"):
            return False, f"no kernel for the sparse product ({kernel})"
        against = self._against(kept)
        device = self.values.device.type
        most = largest_density(device, dtype, self.format, against)[number]
        if most == 0 and known_densities(device, dtype, self.format, against) is None:
            name = str(dtype).removeprefix("torch.")
            return False, (
                f"the table has no entry for {self.format} {against} in {name} on {machine_of(device)}: "
                "prepare(..., tune=True) measures"
            )
        density = self.density()
        sign = "at most" if density <= most else "above"
        return density <= most, f"density {density:.3g} is {sign} {most:.3g}, the table's for {self.format} {against}"

    def _takes_sparse(self, input: Tensor, rows: int) -> bool:
        if torch.is_grad_enabled() and (self.values.requires_grad or input.requires_grad):
            return True  # gradients are those of the stored values
        return self._planned(input.dtype, rows)

    def _planned(self, dtype: torch.dtype, rows: int) -> bool:
        """What the table, or what was measured, says."""
        plan = self._plans.get((dtype, self.cache_dense))
        if self._prepared is not None and not torch.compiler.is_compiling() and bucket(rows) not in self._prepared:
            self._prepared.add(bucket(rows))
            warnings.warn(
                f"{type(self).__name__}: prepared for other numbers of rows than {rows}; prepare({rows}) includes them "
                "(this is said once)",
                stacklevel=4,
            )
        if plan is None or all(plan):
            return plan is not None
        return any(plan) and plan[bucket(rows)]

    def prepare(
        self, rows: int | Iterable[int] = (1, 16, 256), *, tune: bool = False, dtype: torch.dtype | None = None
    ) -> Any:
        """Say for which numbers of rows the layer is used, and if asked to, measure what is faster there.

        Args:
            rows: of the inputs. Another bucket's number warns once.
            tune: measure the sparse product and the dense one (from a kept copy or decoded, as ``cache_dense`` says), with the
                present number of threads; the sparse one is taken where it is faster by 5 %, in the mean of what is measured
                for a bucket. Else the shipped table decides.
            dtype: of the inputs; default: the weight's.

        Returns:
            The layer.
        """
        name = f"{type(self).__name__}.prepare"
        counts = [rows] if isinstance(rows, int) else list(rows)
        check_integer(name, **{f"rows[{i}]": n for i, n in enumerate(counts)})
        if not counts or min(counts) < 1:
            refuse(name, f"rows must be positive, got {rows!r}")
        return self._prepare({n: n for n in counts}, tune, self.dtype if dtype is None else dtype)

    def _prepare(self, inputs: Mapping[Any, int], tune: bool, dtype: torch.dtype) -> Any:
        """``inputs``: the number of rows of each that :meth:`_time` measures. Those of a bucket count together."""
        self._prepared = {bucket(n) for n in inputs.values()} | (self._prepared or set())
        found: dict[int, list[tuple[float, float]]] = {}
        for size, n in inputs.items() if tune else ():
            found.setdefault(bucket(n), []).append(self._time(size, dtype))
        for number, times in found.items():
            sparse, dense = zip(*times, strict=True)
            self._measured[dtype, number] = (fmean(sparse), fmean(dense))
        self._replan()
        return self

    @torch.no_grad()
    def _time(self, size: Any, dtype: torch.dtype) -> tuple[float, float]:
        """Milliseconds of the sparse product and of the dense one. ``size``: the rows of an input; of a convolution its shape."""
        weight = self.sparse_weight
        x = torch.randn(size, weight.shape[1], dtype=dtype, device=self.values.device)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return milliseconds(lambda x: spmm(x, weight, bias), lambda x: F.linear(x, self._dense(dtype), bias), x)

    def explain(
        self, rows: int | Iterable[int] | None = None, dtype: torch.dtype | None = None
    ) -> list[dict[str, Any]]:
        """What runs for so many rows (default: every bucket), and why.

        Returns:
            One entry a bucket: ``rows``, ``path`` ("sparse" or "dense"), ``kernel``, ``why``, and ``bytes``, those of
            the weight that one forward moves.
        """
        dtype = self.dtype if dtype is None else dtype
        numbers: Iterable[int] = range(len(ROWS) + 1)
        if rows is not None:
            numbers = sorted({bucket(n) for n in ([rows] if isinstance(rows, int) else rows)})
        stored = self.sparse_weight.nbytes
        dense = math.prod(self.shape) * torch.empty(0, dtype=dtype).element_size()
        entries = []
        for number in numbers:
            sparse, why = self._sparse(dtype, self.cache_dense, number)
            entry: dict[str, Any] = {
                "rows": bucket_name(number),
                "path": "sparse",
                "kernel": self._kernel(dtype),
                "why": why,
            }
            entry["bytes"] = stored
            if not sparse:
                how = "from a kept copy" if self.cache_dense else "decoded with each forward (cache_dense keeps a copy)"
                entry |= {"path": "dense", "kernel": f"torch {self.product}, {how}"}
                entry["bytes"] = dense if self.cache_dense else stored + 2 * dense
            entry["why"] += self._in_training(entry["path"])
            entries.append(entry)
        return entries

    def _in_training(self, path: str) -> str:
        """What :meth:`explain` says of forwards whose gradients are wanted."""
        return "; while it is trained, sparse" if self.values.requires_grad else ""

    # ----------------------------------------------------------------------------------- changing, casting, loading

    @torch.no_grad()
    def update_mask(self, mask: Tensor) -> None:
        """Store other places, as many as before, in place; what is stored newly is zero.

        Args:
            mask: bool, of the weight's shape.

        Raises:
            TypeError: ``mask`` is not bool.
            ValueError: another shape, another number of values (or blocks; of ``delta`` with the zeros that bridge a distance,
                and those that a kept zero needs), or a mask that does not consist of whole blocks.
        """
        name = f"{type(self).__name__}.update_mask"
        check_mask(name, mask, self.shape, self.values.device)
        old = self.sparse_weight
        dense = torch.where(mask, self.weight, 0.0).flatten(1)
        new = SparseWeight.from_dense(dense, mask.flatten(1), self.format, block=self.block, values=self.values.dtype)
        for part in PARTS:
            a, b = getattr(old, part), getattr(new, part)
            if a is not None and a.shape != b.shape:
                more = BRIDGES if self.format == "delta" else ""
                refuse(
                    name, f"mask must keep as many values as are stored{more}, {shape_of(a)} {part}, got {shape_of(b)}"
                )
        check_blocks(name, mask.flatten(1), new)
        for part, tensor in new.tensors().items():
            getattr(self, part).copy_(as_bytes(tensor))
        if self.values.grad is not None:
            self.values.grad = None  # of other places
        self._copy = None
        self._mask_changed()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copy": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}index"] = from_bytes(destination[f"{prefix}index"], self.format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale, values = self.scale, self.values
        old = self.sparse_weight.replace(values=values.detach()) if self.format == "delta" else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if scale is not None and self.scale is not None:
            self.scale = scale.to(self.values.device)  # of few bits, it would round every weight
        if old is not None:
            self._keep_zeros(old)
        if values.device != self.values.device:
            self._forget()
        self._copy = None
        return self

    @torch.no_grad()
    def _keep_zeros(self, old: SparseWeight) -> None:
        """After a cast of ``delta``: what became zero is kept as it was, with an entry more where it needs one."""
        dtype, device = self.values.dtype, self.values.device
        if dtype == old.values.dtype or self.values.is_meta or old.values.is_meta:
            return
        new = old.cast(dtype)
        if new.values.shape != self.values.shape:
            self.values.data = new.values.to(device)
            self.index, self.offsets = new.index.to(device), new.offsets.to(device)
            self._mask_changed()
            self._forget()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = prefix.removesuffix(".") or type(self).__name__
        state = dict(state_dict)
        if f"{prefix}weight" in state and f"{prefix}values" not in state:
            trouble = self._compress_state(state, prefix)
            if trouble:
                error_msgs.append(f"{name}: {trouble}")
                return
        stored, values = state.get(f"{prefix}geometry"), state.get(f"{prefix}values")
        if isinstance(stored, Tensor) and isinstance(values, Tensor) and not stored.is_meta:
            version, number, *rest = stored.tolist() if stored.dim() == 1 and len(stored) > 4 else [0, 0, 0, 0]
            if version != VERSION or not 0 <= number < len(FORMATS):
                error_msgs.append(f"{name}: the format of the state must have the version {VERSION}, got {version}")
                return
            if tuple(rest[2:]) != self.shape:
                error_msgs.append(f"{name}: the state must be of a weight {list(self.shape)}, got one of {rest[2:]}")
                return
            trained = self.values.requires_grad or self.format not in TRAINABLE or self.scale is not None
            self.format, self.block = FORMATS[number], (rest[0], rest[1])
            if isinstance(state.get(f"{prefix}index"), Tensor):
                state[f"{prefix}index"] = as_bytes(state[f"{prefix}index"])
            device = self.values.device
            for part in PARTS:  # of the shapes and dtypes of what comes
                there, own = state.get(prefix + part), getattr(self, part)
                if there is None or (own is not None and own.shape == there.shape and own.dtype == there.dtype):
                    if there is None and part == "scale":
                        self.scale = None
                    continue
                fresh = torch.empty_like(there, device=device)
                if part == "values":
                    able = fresh.is_floating_point() and self.format in TRAINABLE
                    self.values = nn.Parameter(fresh, trained and able)
                else:
                    self._buffers[part] = fresh
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._mask_changed()
        self._forget()

    def _compress_state(self, state: dict[str, Any], prefix: str) -> str | None:
        """Replace a dense weight and its mask by what this layer stores; or say why not."""
        weight, bits = state[f"{prefix}weight"], state.get(f"{prefix}mask_bits")
        if bits is None:
            return "a dense weight needs its mask beside it (mask_bits), or say from_dense(module, mask).pack()"
        if tuple(weight.shape) != self.shape:
            return f"the state must be of a weight {list(self.shape)}, got one of {shape_of(weight)}"
        mask = unpack(bits, weight)
        values = self.values.dtype if self.scale is not None else None
        packed = SparseWeight.from_dense(
            weight.flatten(1), mask.flatten(1), self.format, block=self.block, values=values
        )
        try:
            check_blocks("its mask", mask.flatten(1), packed)
        except ValueError as error:
            return str(error)
        for key in ("weight", "mask_bits", "mask_format"):
            state.pop(prefix + key, None)
        state.update({prefix + part: t for part, t in packed.tensors().items()})
        state[f"{prefix}geometry"] = self.geometry.clone()
        return None


def milliseconds(
    sparse: Callable[[Tensor], Any], dense: Callable[[Tensor], Any], x: Tensor, train: bool = False
) -> tuple[float, float]:
    """The median times of a call of each, taken in turns."""
    times = medians({"sparse": (sparse, x), "dense": (dense, x)}, train=train)
    return 1e3 * times["sparse"], 1e3 * times["dense"]


def check_mask(where: str, mask: Any, shape: Iterable[int], device: torch.device) -> None:
    """The sentences of a mask that is not packed."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        grad = " that requires a gradient" if isinstance(mask, Tensor) and mask.requires_grad else ""
        hint = "; a mask that is learned is a gate (cofire.nn.Gate)" if grad else "; mask != 0 makes one"
        raise TypeError(f"{where}: mask must be a bool tensor, got {got}{grad}{hint}")
    if list(mask.shape) != list(shape):
        refuse(where, f"mask must have the shape of the weight {list(shape)}, got {shape_of(mask)}")
    check_device(where, "the weight", torch.empty(0, device=device), mask=mask)


def check_blocks(where: str, mask: Tensor, packed: SparseWeight) -> None:
    """Blocks are stored whole: a mask ``[N, K]`` that keeps parts of them would keep more than it says."""
    if packed.format == "block" and (stored := int(packed.mask().sum())) != (kept := int(mask.sum())):
        size = "x".join(map(str, packed.block))
        refuse(
            where,
            f"mask must consist of whole blocks of {size} in the format 'block', got one of {kept} weights in blocks of "
            f"{stored}; take another format, or pattern={size!r} when pruning",
        )


def pack(mask: Tensor) -> Tensor:
    return pack_mask(mask.flatten(1))


def unpack(bits: Tensor, weight: Tensor) -> Tensor:
    """The packed mask as bool, of the weight's shape."""
    return apply_mask(torch.ones(weight.shape, dtype=torch.float32, device=bits.device), bits) != 0


def as_bytes(index: Tensor) -> Tensor:
    """As buffers hold it: what is uint16, byte by byte."""
    return index.contiguous().view(torch.uint8) if index.dtype == torch.uint16 else index


def from_bytes(index: Tensor, format: str) -> Tensor:
    return index.view(torch.uint16) if index.dtype == torch.uint8 and format != "delta" else index


class CompressedLinear(Compressed):
    """A linear layer of which only the kept weights are stored; :meth:`SparseLinear.pack` makes it.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``. A new layer is all zeros; it loads the
            state of any other of its size, whatever its format.
        format, block: as in :class:`cofire.ops.SparseWeight`. ``csr`` and ``block`` can be trained.
        cache_dense: keep a dense copy where dense products are faster; see :class:`Compressed`.

    Shape: as ``nn.Linear``.

    Example:
        >>> from cofire.nn import SparseLinear
        >>> packed = SparseLinear.from_dense(nn.Linear(64, 8), density=0.25).pack()
        >>> packed(torch.rand(3, 64)).shape, packed.values.shape
        (torch.Size([3, 8]), torch.Size([128]))

    Source: as the module.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "csr",
        block: tuple[int, int] = (16, 1),
        cache_dense: bool = False,
    ) -> None:
        super().__init__()
        check_integer("CompressedLinear", in_features=in_features, out_features=out_features)
        check_choice("CompressedLinear", "format", format, FORMATS)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.cache_dense = cache_dense
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        weight = empty_weight(out_features, in_features, format, block, dtype, device)
        self._take(weight, (out_features, in_features), dtype, True)

    @classmethod
    def _around(
        cls, weight: SparseWeight, bias: nn.Parameter | None, dtype: torch.dtype, trained: bool, cache_dense: bool
    ) -> CompressedLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.cache_dense, layer.bias = cache_dense, bias
        layer._take(weight, weight.shape, dtype, trained)
        return layer

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        self._guard()
        rows = input.numel() // self.in_features if self.in_features else 0
        if self._takes_sparse(input, rows):
            return spmm(input, self.sparse_weight, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self._dense(input.dtype), bias)

    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the same weights, zeros where none is stored."""
        rows, columns = self.shape
        layer = nn.Linear(columns, rows, self.bias is not None, self.values.device, self.dtype)
        _fill(layer, self)
        return layer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.sparse_weight!r}"
        )


class CompressedConv2d(Compressed):
    """A convolution of which only the kept weights are stored; :meth:`SparseConv2d.pack` makes it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``nn.Conv2d``.
        format, block, cache_dense: as in :class:`CompressedLinear`.

    Rows are positions of the output, those of all images of the input together. The table says at which densities the sparse
    convolution is taken, in training too; formats packed for inference are decoded where the input needs a gradient, and so is
    any where the input has no batch. Where the dense convolution is taken, the weight is decoded or kept as in a linear layer.

    Shape: as ``nn.Conv2d``.

    Example:
        >>> from cofire.nn import SparseConv2d
        >>> packed = SparseConv2d.from_dense(nn.Conv2d(4, 8, 3), density=0.25).pack()
        >>> packed(torch.rand(1, 4, 5, 5)).shape, packed.values.shape
        (torch.Size([1, 8, 3, 3]), torch.Size([72]))

    Source: as the module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "csr",
        block: tuple[int, int] = (16, 1),
        cache_dense: bool = False,
    ) -> None:
        super().__init__()
        check_choice("CompressedConv2d", "format", format, FORMATS)
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta"
        )
        self._follow(conv)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.cache_dense = cache_dense
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        columns = conv.weight[0].numel()
        weight = empty_weight(out_channels, columns, format, block, dtype, device)
        self._take(weight, tuple(conv.weight.shape), dtype, True)

    @classmethod
    def _around(
        cls,
        weight: SparseWeight,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        trained: bool,
        cache_dense: bool,
        conv: nn.Conv2d,
    ) -> CompressedConv2d:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._follow(conv)
        layer.cache_dense, layer.bias = cache_dense, bias
        layer._take(weight, tuple(conv.weight.shape), dtype, trained)
        return layer

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding: tuple[int, int] | str
    padding_mode: PaddingMode
    _reversed_padding_repeated_twice: list[int]

    def _follow(self, conv: Any) -> None:
        for name in PackedPalettizedConv2d.GEOMETRY:
            setattr(self, name, getattr(conv, name))

    product = "convolution"

    def _against(self, kept: bool) -> str:
        return "convolution"

    def _kernel(self, dtype: torch.dtype) -> str:
        kernel, stride, dilation = list(self.kernel_size), list(self.stride), list(self.dilation)
        sizes = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        x = torch.empty(1, self.in_channels, *sizes, dtype=dtype, device=self.values.device)
        weight = self.sparse_weight.arguments()
        return kernel_for(OPERATORS["sparse_conv2d"], (x, None, *weight, kernel, stride, [0, 0], dilation, self.groups))

    def _convolve_sparse(self, input: Tensor) -> Tensor:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        padding = (top, left)
        if self.padding_mode != "zeros" or left != right or top != bottom:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, (left, right, top, bottom), mode), (0, 0)
        return sparse_conv2d(
            input,
            self.sparse_weight,
            self.bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _positions(self, numel: int) -> int:
        """Rows of an input with so many elements."""
        return numel // (self.in_channels * self.stride[0] * self.stride[1])

    def _convolve_dense(self, input: Tensor) -> Tensor:
        train = torch.is_grad_enabled() and self.values.requires_grad
        weight = self.sparse_weight.to_dense().to(input.dtype) if train else self._dense(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        output: Tensor = nn.Conv2d._conv_forward(cast(nn.Conv2d, self), input, weight.view(self.shape), bias)
        return output

    def forward(self, input: Tensor) -> Tensor:
        self._guard()
        frozen = torch.is_grad_enabled() and input.requires_grad and not self.sparse_weight.trainable
        if input.dim() == 4 and not frozen and self._planned(input.dtype, self._positions(input.numel())):
            return self._convolve_sparse(input)
        return self._convolve_dense(input)

    def to_dense(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` with the same weights, zeros where none is stored."""
        names = (n for n in PackedPalettizedConv2d.GEOMETRY if not n.startswith("_"))
        layer = nn.Conv2d(
            **{n: getattr(self, n) for n in names},
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.dtype,
        )
        _fill(layer, self)
        return layer

    def prepare(
        self,
        rows: int | Iterable[int] | None = None,
        *,
        tune: bool = False,
        dtype: torch.dtype | None = None,
        shape: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> Any:
        """Say for which inputs the layer is used, and if asked to, measure what is faster there.

        Args:
            rows: positions of the output, all images together; default: 1, 16 and 256. Another bucket's number warns once.
            tune: measure the sparse convolution and the dense one, for inputs of ``shape``; what is found, in the mean of the
                shapes of a bucket of rows, counts for all inputs in it. Else the shipped table decides, after a warning where
                there is no ``shape`` to measure.
            dtype: of the inputs; default: the weight's.
            shape: of an input, ``[batch, channels, height, width]``, or several such; in place of ``rows``.

        Returns:
            The layer.

        Raises:
            ValueError: both ``rows`` and ``shape``, or sizes that do not fit.
        """
        name = "CompressedConv2d.prepare"
        if shape is None:
            if tune:
                warnings.warn(
                    f"{name}: nothing is measured without shape, [batch, {self.in_channels}, height, width] of an input; the "
                    "shipped table decides",
                    stacklevel=2,
                )
            return super().prepare((1, 16, 256) if rows is None else rows, dtype=dtype)
        if rows is not None:
            refuse(
                name,
                f"rows and shape must not both be given: the shape says how many rows there are, got rows={rows!r}",
            )
        several = list(cast(Any, shape))
        shapes = [several] if not several or is_integer(several[0]) else [list(one) for one in several]
        for one in shapes:
            fits = len(one) == 4 and all(is_integer(n) and n > 0 for n in one) and one[1] == self.in_channels
            if not fits:
                refuse(name, f"shape must be [batch, {self.in_channels}, height, width], got {one}")
        inputs = {tuple(one): max(1, self._positions(math.prod(one))) for one in shapes}
        return self._prepare(inputs, tune, self.dtype if dtype is None else dtype)

    @torch.no_grad()
    def _time(self, size: Any, dtype: torch.dtype) -> tuple[float, float]:
        x = torch.randn(size, dtype=dtype, device=self.values.device)
        return milliseconds(self._convolve_sparse, self._convolve_dense, x)

    def _in_training(self, path: str) -> str:
        if self.values.requires_grad:
            return "; the same while it is trained"
        frozen = path == "sparse" and not self.sparse_weight.trainable
        return "; dense where the input needs a gradient" if frozen else ""

    def extra_repr(self) -> str:
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{shape}, padding={self.padding}, groups={self.groups}, bias={self.bias is not None}, {self.sparse_weight!r}"


def _fill(layer: nn.Linear | nn.Conv2d, source: Compressed) -> None:
    with torch.no_grad():
        layer.weight.copy_(source.weight)
        if source.bias is not None and layer.bias is not None:
            layer.bias.copy_(source.bias)
    layer.train(source.training)
