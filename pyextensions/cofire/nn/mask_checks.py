# SPDX-License-Identifier: Apache-2.0
"""What layers with a mask find out by themselves, while they are used.

=================== ================================================================================================
in any forward      a mask that something else than the layer changed, as averages of buffers do, which make numbers of
                    its bits: each mask has a checksum beside it, looked at where the mask was written to
in training         pruned weights that are not zero (mode "invariant"), in the first forwards after a change of the
                    mask: another optimiser's momentum from before moves them
under DDP           masks that differ between the processes, in the first forward, and after a change of a mask
=================== ================================================================================================

Nothing is left of it in steady training but the comparison of a few integers. What ``torch.compile`` traces, and what a CUDA
graph records, looks at nothing. ``checks = False``, of a layer or of its class, turns all of it off.

Source: the layers'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

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


class Watched(nn.Module):
    """A layer with a mask, and what it finds out by itself.

    Attributes:
        checks: whether it looks.
        mask_sum: int64 buffer, no part of the state: the checksum of the mask. Whoever copies all buffers, as DDP and averages do
            that leave them alone, copies it too.
    """

    mask_sum: Tensor
    checks: bool = True
    _place: str = ""  # its name in the model, where known
    _known: list[int] | None = None  # the stamp of the mask when a forward last noticed a write
    _sure: list[int] | None = None  # and when its checksum was last right
    _outside: int = 0  # forwards that found the mask written to by others
    _unsure: bool = False  # whether other processes may have another mask
    _steps: int = 0
    _unseen: int = 0
    _written: int = -1

    #: The names of the buffers that say what is kept.
    _mask_names: tuple[str, ...] = ()

    def _mask_parts(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[name] for name in self._mask_names)  # type: ignore[misc]

    def _traces(self) -> tuple[Tensor, ...]:
        """What else differs between processes that had different masks: small tensors."""
        return ()

    def _zeros_promised(self) -> bool:
        return False

    def _label(self) -> str:
        return f"{type(self).__name__} {self._place or list(self._weight_shape())!r}"

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
        parts = self._mask_parts()
        if any(t.is_meta for t in parts):
            self.register_buffer("mask_sum", torch.ones((), dtype=torch.int64, device=parts[0].device), False)
            return
        total, own = checksum(parts), self._buffers.get("mask_sum")
        if own is None or own.device != total.device or own.is_inference():
            self.register_buffer("mask_sum", total, persistent=False)
        else:
            own.copy_(total)
        self._known = self._sure = self._stamp()
        self._outside, self._unsure = 0, True
        self._steps, self._unseen = (STEPS, UNSEEN) if self._zeros_promised() else (0, 0)
        if self._steps:
            self._written = version(self.weight)  # type: ignore[arg-type]

    # ----------------------------------------------------------------------------------------------- looking

    def _guard(self) -> None:
        """Of each forward."""
        if torch.compiler.is_compiling() or not self.checks:
            return
        if (
            (self._steps and self.training and self._stepped())
            or self._known != self._stamp()
            or DistributedDataParallel._active_ddp_module is not None
        ):
            self._look()

    def _stepped(self) -> bool:
        """Whether pruned weights may have moved since they were looked at."""
        return self._unseen > 0 or version(self.weight) != self._written  # type: ignore[arg-type]

    def _blind(self) -> bool:
        """Whether values cannot be looked at here."""
        parts = (*self._mask_parts(), self.mask_sum)
        return (
            torch.compiler.is_compiling()
            or torch._C._is_tracing()  # of torch.jit
            or torch._C._are_functorch_transforms_active()
            or getattr(self, "_is_replica", False)  # of nn.DataParallel
            or any(type(t) is not Tensor or t.is_meta for t in parts)
            or (parts[0].is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _look(self) -> None:
        if self._blind():
            return
        training = self.training and torch.is_grad_enabled()
        if training:
            _agree(DistributedDataParallel._active_ddp_module, self._unsure)
        stamp = self._stamp()
        if stamp != self._known:
            # (DDP writes in each forward: the value is asked for less and less often)
            if not (self._outside + 1) & self._outside:
                self._check_sum()
            self._known, self._outside = stamp, self._outside + 1
        if training and self._steps and self._stepped():
            self._check_zeros()

    @torch.no_grad()
    def _check_sum(self) -> None:
        found, recorded = torch.stack([checksum(self._mask_parts()), self.mask_sum]).tolist()
        if recorded and found != recorded:
            raise RuntimeError(
                f"{self._label()}: the mask must be changed by update_mask or load_state_dict alone, got one with another "
                "checksum than theirs. An average of buffers makes such ones: take AveragedModel(model, use_buffers=False), "
                "which copies them. update_mask(mask) says which mask counts (checks=False looks at nothing)"
            )
        self._sure = self._stamp()

    def _check_saved(self) -> None:
        """Of what leaves the layer: its state, and what is made of it."""
        if self.checks and self._sure != self._stamp() and not self._blind():
            self._check_sum()

    def _check_zeros(self) -> None:
        weight = self.weight
        if type(weight) is not nn.Parameter or not weight.requires_grad:
            return
        wrong, pruned = pruned_not_zero(weight, self._mask_parts()[0])
        if wrong:
            raise RuntimeError(
                f"{self._label()}: weight must be zero where it is pruned, got {wrong} other entries of {pruned} pruned "
                f"ones. {MOVED}. After a change of the mask reset_moments stops another optimiser's momentum"
            )
        if version(weight) == self._written:
            self._unseen -= 1
        else:
            self._written, self._steps = version(weight), self._steps - 1


# ------------------------------------------------------------------------------------------------- processes

#: Of each model under DDP the group for comparing its masks, and those whose masks were the same.
_GROUPS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_AGREED: WeakSet[nn.Module] = WeakSet()


def _agree(ddp: Any, unsure: bool) -> None:
    """Compare the masks of a model in the first forward under DDP, and after a change: there all processes pass."""
    if ddp is None or (not unsure and ddp in _AGREED):
        return
    import torch.distributed as dist

    if dist.get_world_size(ddp.process_group) > 1:
        if ddp not in _GROUPS and not dist.is_gloo_available():
            _GROUPS[ddp] = ddp.process_group
        elif ddp not in _GROUPS:
            # one of its own, so that a process that waits here in vain takes no gradients of the others for masks
            ranks = dist.get_process_group_ranks(ddp.process_group)
            _GROUPS[ddp] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        try:
            _compare(ddp.module, _GROUPS[ddp], zeros=True)
        except RuntimeError as error:
            raise RuntimeError(
                "DistributedDataParallel: all processes must change their masks before the same forward, got no answer from "
                "some in one after a change here"
            ) from error
    _AGREED.add(ddp)
    for module in ddp.module.modules():
        if isinstance(module, Watched):
            module._unsure = False


def check_masks_agree(model: nn.Module, process_group: Any = None) -> None:
    """Raise, in every process, unless all processes have the same masks.

    In the forward of ``DistributedDataParallel`` the layers call it by themselves, the first time and after each change of a mask;
    every process has to change its masks in the same steps then. ``layer.checks = False`` turns that off. A model that is
    compiled, or that shares gradients in another way, calls it by hand after changes. (``DistributedDataParallel`` spreads the
    first process's masks over the others before its forward, and does not prune their weights: so there the layers compare the
    zeros too.)

    Args:
        model: with pruned layers, in each process.
        process_group: of ``torch.distributed``; default: all processes.

    Raises:
        ValueError: masks that differ; the sentence names the layers.
    """
    import torch.distributed as dist

    check_module("check_masks_agree", model)
    if dist.is_available() and dist.is_initialized():
        _compare(model, process_group, zeros=False)


@torch.no_grad()
def _compare(model: nn.Module, process_group: Any, zeros: bool) -> None:
    import torch.distributed as dist

    own = {}
    for name, module in model.named_modules():
        if isinstance(module, Watched):
            digest = hashlib.blake2b(digest_size=16)
            for part in (*module._mask_parts(), *(module._traces() if zeros else ())):
                digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            own[name] = digest.hexdigest()
    found: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, own, group=process_group)
    names = {name for one in found for name in one}
    differ = sorted(name for name in names if len({one.get(name) for one in found}) > 1)
    if differ:
        refuse("check_masks_agree", f"all processes must have the same masks, got others for {', '.join(differ)}")
