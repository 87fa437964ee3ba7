# SPDX-License-Identifier: Apache-2.0
"""What layers with a mask find out by themselves, while they are used.

=================== ================================================================================================
in any forward      a mask that something else than the layer changed, as averages of buffers do, which make numbers of
                    its bits: each mask has a checksum beside it, looked at where the mask was written to. A warning, once:
                    whoever copies a right mask into the buffer looks the same
in training         pruned weights that are not zero (mode "invariant"), in the first forwards after a change of the
                    mask: another optimiser's momentum from before moves them. An error
=================== ================================================================================================

Nothing is left of it in steady training but the comparison of a few integers. What ``torch.compile`` traces, and what a CUDA
graph records, looks at nothing, nor is the checksum looked at where ``DistributedDataParallel`` calls (it writes to buffers
each time) or ``functional_call`` lends other buffers. ``checks = False``, of a layer or of its class, turns all of it off.

Source: the layers'.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cofire.ops.checks import check_module, refuse
from cofire.optim import MOVED, pruned_not_zero

__all__ = ["Watched", "check_masks_agree"]

#: Of the forwards after a change of the mask, how many look at pruned weights: after steps that are seen to have written to
#: the weight, and where none is seen (an optimiser that writes to ``weight.data`` is not).
STEPS, UNSEEN = 3, 3
WIDTH = 1024


def checksum(parts: Sequence[Tensor]) -> Tensor:
    """An int64 scalar on their device, never zero: no linear function of the parts, as averages would keep that."""
    total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for part in parts:
        flat = part.detach().flatten()
        whole = flat.numel() // WIDTH * WIDTH
        for rows in (flat[:whole].view(-1, WIDTH), flat[None, whole:]):
            for dim in (0, 1):
                sums = rows.sum(dim, dtype=torch.int64)
                place = torch.arange(1, sums.numel() + 1, dtype=torch.int64, device=sums.device)
                total = (total + (sums * place).sum()) * 0x1E3779B97F4A7C15  # (int64 wraps around)
                total = total ^ (total >> 29)
    return total | 1


def version(tensor: Tensor) -> int:
    """Counts the writes to a tensor, where they are counted."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass
class Seen:
    """What a layer knows from one forward to the next. A copy of the layer begins anew."""

    place: str = ""  #: the layer's name in the model, where known
    known: list[int] = field(default_factory=list)  #: the stamp of the mask when its checksum was last right
    warned: bool = False
    steps: int = 0  #: how many more forwards look at pruned weights
    unseen: int = 0
    written: int = -1  #: the weight's version when they were looked at


class Watched(nn.Module):
    """A layer with a mask, and what it finds out by itself.

    Attributes:
        checks: whether it looks.
        mask_sum: int64 buffer, no part of the state: the checksum of the mask. Whoever copies all buffers, as DDP and averages do
            that leave them alone, copies it too.
    """

    mask_sum: Tensor
    checks: bool = True
    _seen: Seen

    #: The names of the buffers that say what is kept.
    _mask_names: tuple[str, ...] = ()

    def _mask_parts(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[name] for name in self._mask_names)  # type: ignore[misc]

    def _zeros_promised(self) -> bool:
        return False

    def _label(self) -> str:
        return f"{type(self).__name__} {self._seen.place or list(self._weight_shape())!r}"

    def _weight_shape(self) -> Sequence[int]:
        raise NotImplementedError  # each kind of layer has its own

    def _stamp(self) -> list[int]:
        """Which tensors those are, and how often each was written to. (On the path of each call: no more than it takes.)"""
        stamp: list[int] = []
        buffers = self._buffers
        for name in self._mask_names:
            part: Any = buffers[name]
            stamp += (id(part), -1 if part.is_inference() else part._version)
        return stamp

    @torch.no_grad()
    def _mask_changed(self) -> None:
        """The mask is what it should be from here on."""
        if "_seen" not in self.__dict__:
            self._seen = Seen()
        seen, parts = self._seen, self._mask_parts()
        meta = any(t.is_meta for t in parts)
        self._record(torch.ones((), dtype=torch.int64, device=parts[0].device) if meta else checksum(parts))
        seen.steps, seen.unseen = (STEPS, UNSEEN) if self._zeros_promised() and not meta else (0, 0)
        if seen.steps:
            seen.written = version(self.weight)  # type: ignore[arg-type]

    def _record(self, total: Tensor) -> None:
        own = self._buffers.get("mask_sum")
        if own is None or own.device != total.device or own.is_inference():
            self.register_buffer("mask_sum", total, persistent=False)
        else:
            own.copy_(total)
        self._seen.known = self._stamp()

    # ---------------------------------------------------------------------------------------- copying and moving

    def _unread(self) -> None:
        """The buffers are the layer's own, and the next forward looks at the checksum."""
        self._seen.known = self._stamp()
        self._seen.known[1::2] = [-2] * len(self._mask_names)  # (no count of writes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._unread()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_seen"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = Seen()
        if "mask_sum" in self._buffers:
            self._unread()
        else:  # of a version that had none
            self._mask_changed()

    # ----------------------------------------------------------------------------------------------- looking

    def _guard(self) -> None:
        """Of each forward."""
        if torch.compiler.is_compiling() or not self.checks:
            return
        seen = self._seen
        if (seen.steps and self.training and self._stepped()) or seen.known != self._stamp():
            self._look()

    def _stepped(self) -> bool:
        """Whether pruned weights may have moved since they were looked at."""
        return self._seen.unseen > 0 or version(self.weight) != self._seen.written  # type: ignore[arg-type]

    def _blind(self) -> bool:
        """Whether values cannot be looked at here."""
        parts = (*self._mask_parts(), self.mask_sum)
        return (
            torch.compiler.is_compiling()
            or torch._C._is_tracing()  # of torch.jit
            or torch._C._are_functorch_transforms_active()
            or getattr(torch._C, "_len_torch_dispatch_stack", int)() > 0  # fake tensors, counters of operations
            or getattr(self, "_is_replica", False)  # of nn.DataParallel
            or any(type(t) is not Tensor or t.is_meta for t in parts)
            or (parts[0].is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _look(self) -> None:
        if self._blind():
            return
        seen, stamp = self._seen, self._stamp()
        # (other tensors are not the layer's: functional_call lends them. DDP writes in each forward)
        own = stamp[::2] == seen.known[::2] and DistributedDataParallel._active_ddp_module is None
        if own and stamp != seen.known:
            self._check_sum()
        if self.training and torch.is_grad_enabled() and seen.steps and self._stepped():
            self._check_zeros()

    @torch.no_grad()
    def _check_sum(self) -> None:
        total = checksum(self._mask_parts())
        found, recorded = torch.stack([total, self.mask_sum]).tolist()
        if recorded and found != recorded and not self._seen.warned:
            self._seen.warned = True
            warnings.warn(
                f"{self._label()}: the mask is not the one that update_mask or load_state_dict left: its checksum is another. It "
                "is taken as it is. An average of buffers spoils masks: AveragedModel(model, use_buffers=False) copies them, and "
                "update_mask(mask) says which mask counts (this is said once; checks=False looks at nothing)",
                stacklevel=5,
            )
        self._record(total)

    def _check_zeros(self) -> None:
        weight, seen = self.weight, self._seen
        if type(weight) is not nn.Parameter or not weight.requires_grad:
            seen.steps = 0
            return
        wrong, pruned = pruned_not_zero(weight, self._mask_parts()[0])
        if wrong:
            raise RuntimeError(
                f"{self._label()}: weight must be zero where it is pruned, got {wrong} other entries of {pruned} pruned "
                f"ones. {MOVED}. After a change of the mask reset_moments stops another optimiser's momentum"
            )
        if version(weight) == seen.written:
            seen.unseen -= 1
        else:
            seen.written, seen.steps = version(weight), seen.steps - 1


# ------------------------------------------------------------------------------------------------- processes


@torch.no_grad()
def check_masks_agree(model: nn.Module, process_group: Any = None) -> None:
    """Raise, in every process, unless all processes have the same masks.

    All processes have to call it, at the same point. The methods ``GradualPruning`` and ``RigL`` do so when they prepare a model
    and after each change of its masks; no layer does. Elsewhere call it by hand after a change: before its forward
    ``DistributedDataParallel`` copies the first process's buffers, masks among them, over the others' without a word.

    Args:
        model: with pruned layers, in each process.
        process_group: of ``torch.distributed``; default: all processes.

    Raises:
        ValueError: masks that differ; the sentence names the layers.

    Example:
        >>> from cofire.nn import sparsify_
        >>> check_masks_agree(sparsify_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), density=0.5))  # one process
    """
    import torch.distributed as dist

    check_module("check_masks_agree", model)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) < 2:
        return
    own = {}
    for name, module in model.named_modules():
        if isinstance(module, Watched):
            digest = hashlib.blake2b(digest_size=16)
            for part in module._mask_parts():
                if not part.is_meta:
                    digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            own[name] = digest.hexdigest()
    found: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, own, group=process_group)
    names = {name for one in found for name in one}
    differ = sorted(name for name in names if len({one.get(name) for one in found}) > 1)
    if differ:
        refuse("check_masks_agree", f"all processes must have the same masks, got others for {', '.join(differ)}")
