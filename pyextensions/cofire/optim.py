# SPDX-License-Identifier: Apache-2.0
"""Optimisers that know masks: kept weights are updated as by torch's, pruned ones stay exactly zero.

A module with a parameter ``weight`` and a packed mask ``mask_bits`` (:class:`cofire.nn.SparseLinear`) has a masked weight.
An optimiser is given the model and looks for the masks at each step, so that a mask may change at any time::

    optimizer = cofire.optim.MaskedAdamW(model.parameters(), lr=1e-3, model=model)

What weight decay, momentum and moments do to a pruned weight under another optimiser, the layers find out in the first steps
after a change of the mask, and :func:`check_invariant` at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cofire.ops.checks import check_module
from cofire.ops.lowbit import compute_dtype
from cofire.ops.selection import mask_offsets, unpack_mask
from cofire.ops.sparse import apply_mask
from cofire.ops.sparse_training import masked_adam_, masked_sgd_

__all__ = [
    "MaskedAdam",
    "MaskedAdamW",
    "MaskedSGD",
    "check_invariant",
    "clip_grad_norm_",
    "masked_weights",
    "reset_moments",
]


#: What to do about pruned weights that are not zero.
MOVED = (
    "An optimiser that does not know the mask writes there: take one of cofire.optim with model=, or zero them "
    "(load_state_dict and averages of weights have to, too)"
)


class MaskedWeight(NamedTuple):
    """A weight whose pruned entries are zero, and its packed mask."""

    name: str
    weight: nn.Parameter
    bits: Tensor

    @property
    def kept(self) -> Tensor:
        """bool, of the weight's shape."""
        columns = self.weight[0].numel() if self.weight.shape[0] else 0
        return unpack_mask(self.bits, columns).view(self.weight.shape)


def masked_weights(model: nn.Module) -> Iterator[MaskedWeight]:
    """The masked weights of a model: of its modules with ``weight`` and ``mask_bits``.

    Modules that keep the dense weight alive beneath the mask (``mode="masked"``) are none of them: there the pruned entries
    are trained too. But those of which a method says that it keeps them zero all the same (an attribute
    ``pruned_are_zero``) are.

    Args:
        model: any module, also inside data parallelism or ``torch.compile``.

    Yields:
        ``name``, ``weight`` and ``bits`` of each, a shared weight once.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.register_buffer("mask_bits", torch.tensor([[5], [1]], dtype=torch.uint8))
        >>> [(found.name, int(found.kept.sum())) for found in masked_weights(nn.Sequential(layer))]
        [('0.weight', 3)]
    """
    check_module("masked_weights", model)
    seen: set[int] = set()
    for name, module in model.named_modules():
        bits, weight = getattr(module, "mask_bits", None), getattr(module, "weight", None)
        if not isinstance(bits, Tensor) or not isinstance(weight, nn.Parameter) or id(weight) in seen:
            continue
        alive = getattr(module, "mode", "invariant") != "invariant"
        if not alive or getattr(module, "pruned_are_zero", False):
            seen.add(id(weight))
            yield MaskedWeight(f"{name}.weight" if name else "weight", weight, bits)


class _Packed:
    """Which entries the values of a packed state belong to."""

    def __init__(self, bits: Tensor, shape: torch.Size) -> None:
        self.bits, self.shape = bits, shape

    @property
    def kept(self) -> Tensor:
        rows = max(self.shape[0], 1)
        return unpack_mask(self.bits, self.shape.numel() // rows).view(self.shape)

    def unpack(self, values: Tensor) -> Tensor:
        kept = self.kept
        return torch.zeros(self.shape, dtype=values.dtype, device=values.device).masked_scatter_(kept, values)

    def pack(self, dense: Tensor) -> Tensor:
        return dense[self.kept]


class _Masked(torch.optim.Optimizer):
    """What the optimisers share: masks by parameter, state that follows them, checkpoints."""

    moments: tuple[str, ...] = ()

    def __init__(
        self, params: Any, defaults: dict[str, Any], model: nn.Module | None, sparse_state: bool, skip_pruned: bool
    ) -> None:
        name = type(self).__name__
        if model is not None:
            check_module(name, model)
        if sparse_state and model is None:
            raise ValueError(f"{name}: sparse_state needs a model, whose masks say what is kept, got model None")
        super().__init__(params, defaults)
        self.model, self.sparse_state, self.skip_pruned = model, bool(sparse_state), bool(skip_pruned)
        #: of each parameter the mask of the last step, its version and that of the weight after it
        self._seen: dict[Tensor, tuple[Tensor, int, int]] = {}
        self._offsets: dict[Tensor, Tensor] = {}  # of packed states

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("model", "sparse_state", "skip_pruned")}
        return {**super().__getstate__(), **own}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._offsets, self._seen = {}, {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that the state keeps its dtype: moments of bf16 weights stay fp32, packed masks stay bits.

        A state with values of kept entries alone and one of all entries are read into each other.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    at = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().to(at, copy=True)
        self._offsets, self._seen = {}, {}

    def _follow(self, p: nn.Parameter, bits: Tensor | None) -> tuple[Tensor | None, bool]:
        """Bring the state of a parameter into the form that its mask asks for, moments of what has grown at zero.

        In a dense state they are zero already: the step itself clears whatever is pruned. Returns the offsets of a packed
        state, and whether pruned entries of weight and state are known to be zero.
        """
        state = self.state[p]
        packed = self.sparse_state and bits is not None
        bits_seen, version, weight_version = self._seen.pop(p, (None, -1, -1))
        same = bits is not None and bits is bits_seen and bits._version == version
        clean = self.skip_pruned and same and p._version == weight_version
        if not packed and "mask_bits" not in state:
            return None, clean
        if not same:  # the mask may be another one
            held = state.get("mask_bits")
            if held is None or not packed or not torch.equal(held, bits):  # type: ignore[arg-type]
                self._repack(p, state, held, bits if packed else None)
            self._offsets.pop(p, None)
        if not packed:
            return None, clean
        if p not in self._offsets:
            self._offsets[p] = mask_offsets(state["mask_bits"])
        return self._offsets[p], clean

    def _repack(self, p: nn.Parameter, state: dict[str, Any], held: Tensor | None, bits: Tensor | None) -> None:
        for name in self.moments:
            if state.get(name) is None:
                continue
            dense = state[name] if held is None else _Packed(held, p.shape).unpack(state[name])
            state[name] = dense if bits is None else _Packed(bits, p.shape).pack(dense)
        state.pop("mask_bits", None)
        if bits is not None:
            state["mask_bits"] = bits.clone()

    def _done(self, p: nn.Parameter, bits: Tensor | None) -> None:
        if bits is not None:
            self._seen[p] = (bits, bits._version, p._version)

    def _zeros(self, p: nn.Parameter) -> Tensor:
        return torch.zeros_like(p, dtype=compute_dtype(p), memory_format=torch.preserve_format)

    def _update(
        self, p: nn.Parameter, group: dict[str, Any], bits: Tensor | None, **options: Any
    ) -> None:  # pragma: no cover
        raise NotImplementedError  # each optimiser has its own

    def _begin(self, p: nn.Parameter, group: dict[str, Any]) -> None:  # pragma: no cover
        """Make the state of a parameter that has none."""
        raise NotImplementedError  # each optimiser has its own

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step, by the masks that the model has now.

        Args:
            closure: computes the loss again, as in torch.

        Returns:
            What ``closure`` returns.

        Raises:
            RuntimeError: a gradient is a sparse tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        masks = {} if self.model is None else {id(m.weight): m.bits for m in masked_weights(self.model)}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__}: gradients must be dense tensors, got a sparse one")
                bits = masks.get(id(p))
                if not self.state[p]:
                    self._begin(p, group)
                offsets, clean = self._follow(p, bits)
                self._update(p, group, bits, offsets=offsets, clean=clean)
                self._done(p, bits)
        return loss


def _check(name: str, lr: Any, **least_zero: float) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{name}: lr must be a number or a tensor of one element, got shape {list(lr.shape)}")
    for argument, value in {"lr": float(lr), **least_zero}.items():
        if not value >= 0:
            raise ValueError(f"{name}: {argument} must not be negative, got {value}")


class MaskedSGD(_Masked):
    """Stochastic gradient descent with momentum, for models with masked weights.

    Kept weights are updated as by :class:`torch.optim.SGD`; pruned ones, and their momentum, become zero at each step,
    whatever their gradient. So a weight that grows begins without momentum.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.
        model: where the masks are; None: no weight has one.
        sparse_state: the momentum of a masked weight is stored for kept entries alone.
        skip_pruned: nobody else writes to pruned entries, so that runs of 64 of them need not be read or written while the
            mask stays the same: worth it for blocks. Other writes are seen, but those through ``weight.data``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a negative rate, nesterov without momentum or with dampening, ``sparse_state`` without a model.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> optimizer = MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9, model=layer)
        >>> layer(torch.ones(1, 3)).sum().backward(); optimizer.step()

    Source: Sutskever et al. 2013, as torch computes it.
    """

    moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        sparse_state: bool = False,
        skip_pruned: bool = False,
    ) -> None:
        name = type(self).__name__
        _check(name, lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"{name}: nesterov needs a momentum and no dampening, got {momentum} and {dampening}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, model, sparse_state, skip_pruned)

    def _begin(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        if group["momentum"] != 0:
            self.state[p].update(momentum_buffer=self._zeros(p), started=False)

    def _update(self, p: nn.Parameter, group: dict[str, Any], bits: Tensor | None, **options: Any) -> None:
        state = self.state[p]
        buffer = state.get("momentum_buffer") if group["momentum"] != 0 else None
        masked_sgd_(
            p,
            p.grad,  # type: ignore[arg-type]
            buffer,
            bits,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first=not state.get("started", True),
            **options,
        )
        if buffer is not None:
            state["started"] = True


class MaskedAdam(_Masked):
    """Adam, for models with masked weights.

    Kept weights are updated as by :class:`torch.optim.Adam`; pruned ones, and their moments, become zero at each step,
    whatever their gradient. So a weight that grows begins without moments. State and arithmetic are fp32 (fp64 for fp64)
    whatever the weights are.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in :class:`torch.optim.Adam`.
        model: where the masks are; None: no weight has one.
        sparse_state: the moments of a masked weight are stored for kept entries alone: 8 bytes for each.
        skip_pruned: nobody else writes to pruned entries, so that runs of 64 of them need not be read or written while the
            mask stays the same: worth it for blocks. Other writes are seen, but those through ``weight.data``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a negative rate, a beta out of [0, 1), ``sparse_state`` without a model.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> optimizer = MaskedAdam(layer.parameters(), lr=0.1, model=layer)
        >>> layer(torch.ones(1, 3)).sum().backward(); optimizer.step()

    Source: Kingma and Ba 2015 (1412.6980).
    """

    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        sparse_state: bool = False,
        skip_pruned: bool = False,
    ) -> None:
        name = type(self).__name__
        _check(name, lr, eps=eps, weight_decay=weight_decay)
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: betas[{i}] must be at least 0 and less than 1, got {beta}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults, model, sparse_state, skip_pruned)

    def _begin(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["step"] = torch.tensor(0.0)
        for name in self.moments[: 3 if group["amsgrad"] else 2]:
            state[name] = self._zeros(p)

    def _update(self, p: nn.Parameter, group: dict[str, Any], bits: Tensor | None, **options: Any) -> None:
        state = self.state[p]
        state["step"] += 1
        beta1, beta2 = group["betas"]
        masked_adam_(
            p,
            p.grad,  # type: ignore[arg-type]
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("max_exp_avg_sq") if group["amsgrad"] else None,
            bits,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=self.decoupled,
            maximize=group["maximize"],
            step=int(state["step"]),
            **options,
        )


class MaskedAdamW(MaskedAdam):
    """AdamW, for models with masked weights: :class:`MaskedAdam` with decoupled decay, which is 0.01 by default.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in :class:`torch.optim.AdamW`.
        model, sparse_state, skip_pruned: as in :class:`MaskedAdam`.

    Raises:
        TypeError, ValueError: as :class:`MaskedAdam`.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> optimizer = MaskedAdamW(layer.parameters(), lr=0.1, model=layer)
        >>> layer(torch.ones(1, 3)).sum().backward(); optimizer.step()

    Source: Loshchilov and Hutter 2019 (1711.05101).
    """

    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


def reset_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, changed: Tensor) -> None:
    """Zero the moments of entries that were dropped or have grown, in any optimiser.

    :class:`MaskedSGD` and the others here do it by themselves. The number of steps stays.

    Args:
        optimizer: whose state of ``parameter`` has tensors of its shape.
        parameter: the weight.
        changed: bool, of its shape.

    Raises:
        ValueError: ``changed`` has another shape.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([weight]); weight.sum().backward(); optimizer.step()
        >>> reset_moments(optimizer, weight, torch.tensor([True, False]))
        >>> (optimizer.state[weight]["exp_avg"] != 0).tolist()
        [False, True]
    """
    if changed.shape != parameter.shape:
        raise ValueError(f"reset_moments: changed must have shape {list(parameter.shape)}, got {list(changed.shape)}")
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.is_floating_point() and key != "step" and value.shape == changed.shape:
            value.masked_fill_(changed, 0)


def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    model: nn.Module | None = None,
) -> Tensor:
    """Clip the norm of the gradients, of which that of a pruned weight is no part.

    With the gradients of pruned weights in the norm the step of the kept ones would be cut short. All gradients are scaled,
    those of pruned weights too, so that growth by gradient sees them.

    Args:
        parameters: a model, with its masks; or parameters.
        max_norm, norm_type, error_if_nonfinite: as in :func:`torch.nn.utils.clip_grad_norm_`.
        model: where the masks are, if ``parameters`` is no model.

    Returns:
        The norm before clipping.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.register_buffer("mask_bits", torch.tensor([[1]], dtype=torch.uint8))
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> clip_grad_norm_(layer, 1.0).item()
        3.0
    """
    if isinstance(parameters, nn.Module):
        model = parameters if model is None else model
        given: list[Tensor] = list(parameters.parameters())
    else:
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    masks = {} if model is None else {id(m.weight): m for m in masked_weights(model)}
    given = [p for p in given if p.grad is not None]

    def counted(p: Tensor) -> Tensor:
        assert p.grad is not None
        return apply_mask(p.grad, masks[id(p)].bits) if id(p) in masks else p.grad

    with torch.no_grad():
        total = nn.utils.get_total_norm([counted(p) for p in given], norm_type, error_if_nonfinite)
    nn.utils.clip_grads_with_norm_(given, max_norm, total)
    return total


@torch.no_grad()
def pruned_not_zero(weight: Tensor, bits: Tensor) -> tuple[int, int]:
    """How many pruned entries of a weight are not zero, and how many are pruned; both 0 where all of them are zero.

    Where all are, weight and mask are read once.
    """
    weight = weight.detach()
    if torch.equal(apply_mask(weight, bits), weight):
        return 0, 0
    columns = weight[0].numel() if weight.shape[0] else 0
    pruned = ~unpack_mask(bits, columns).view(weight.shape)
    wrong = int(((weight != 0) & pruned).sum())  # (a kept NaN is not equal to itself)
    return (wrong, int(pruned.sum())) if wrong else (0, 0)


def check_invariant(model: nn.Module) -> None:
    """Raise where a pruned weight is not zero.

    The layers of :mod:`cofire.nn` call for the same by themselves in the first steps after a change of their mask.

    Args:
        model: whose masked weights are looked at, as :func:`masked_weights` finds them.

    Raises:
        RuntimeError: at the first weight that has such entries, with their number and what to do.
        TypeError: ``model`` is no module.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.register_buffer("mask_bits", torch.tensor([[1]], dtype=torch.uint8))
        >>> with torch.no_grad(): _ = layer.weight.fill_(1)
        >>> check_invariant(layer)
        Traceback (most recent call last):
        RuntimeError: check_invariant: weight must be zero where it is pruned, got 1 other entries of 1 pruned ones. An \
optimiser that does not know the mask writes there: take one of cofire.optim with model=, or zero them \
(load_state_dict and averages of weights have to, too)
    """
    for found in masked_weights(model):
        wrong, pruned = pruned_not_zero(found.weight, found.bits)
        if wrong:
            raise RuntimeError(
                f"check_invariant: {found.name} must be zero where it is pruned, got {wrong} other entries of {pruned} "
                f"pruned ones. {MOVED}"
            )
