# SPDX-License-Identifier: Apache-2.0
"""What the inputs of linear layers look like on calibration data, and walking through a model layer by layer.

Methods that change a trained model look at what its layers are given. Some look once (:func:`input_statistics`); better
ones look at each layer behind the layers that were changed before (:func:`in_order`).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["InputStatistics", "in_order", "input_statistics"]


@dataclasses.dataclass
class InputStatistics:
    """Sums over the inputs ``x [K]`` of one layer.

    Attributes:
        count: inputs seen.
        samples: sequences that they came from; a batch without sequences ``[T, K]`` counts as one.
        gram: fp32 ``[K, K]``, the sum of ``x x^T``.
        shift: fp64 ``[K]``, the first input. The sums below are about it, so that what is constant has no variance at all.
        total, squares: fp64 ``[K]``, the sums of ``x - shift`` and of its squares.

    Example:
        >>> found = InputStatistics.of(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> found.mean.tolist(), found.variance.tolist(), found.gram.tolist()
        ([2.0, 2.0], [1.0, 0.0], [[10.0, 8.0], [8.0, 8.0]])
    """

    count: int
    samples: int
    gram: Tensor
    shift: Tensor
    total: Tensor
    squares: Tensor

    @staticmethod
    def of(x: Tensor) -> InputStatistics:
        """Those of inputs ``[..., K]``, at least one."""
        size = x.shape[-1]
        empty = torch.zeros(size, dtype=torch.float64, device=x.device)
        gram = torch.zeros(size, size, dtype=torch.float32, device=x.device)
        made = InputStatistics(0, 0, gram, x.reshape(-1, size)[0].double(), empty, empty.clone())
        made.add(x)
        return made

    def add(self, x: Tensor) -> None:
        """More inputs ``[..., K]``; with three dimensions or more the first counts sequences."""
        self.samples += len(x) if x.dim() > 2 else 1
        x = x.reshape(-1, x.shape[-1])
        d, wide = x.double() - self.shift, x.float()
        self.count += len(x)
        self.gram += wide.t() @ wide
        self.total += d.sum(0)
        self.squares += d.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """fp64 ``[K]``."""
        return self.shift + self.total / self.count

    @property
    def variance(self) -> Tensor:
        """fp64 ``[K]``, with ``count`` in the denominator; exactly 0 where all inputs are the same."""
        return (self.squares / self.count - (self.total / self.count).square()).clamp(min=0)

    @property
    def norm(self) -> Tensor:
        """fp64 ``[K]``: Euclidean, of each feature over all inputs."""
        return ((self.variance + self.mean.square()) * self.count).sqrt()

    @property
    def second_moment(self) -> Tensor:
        """fp64 ``[K, K]``: mean of ``x x^T``."""
        return self.gram.double() / self.count

    @property
    def covariance(self) -> Tensor:
        """fp64 ``[K, K]``."""
        mean = self.mean
        return self.second_moment - torch.outer(mean, mean)

    @property
    def finite(self) -> bool:
        return bool(self.gram.isfinite().all() and self.squares.isfinite().all())


Found = dict[str, InputStatistics]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within the context ``model`` is in evaluation mode; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recording(layers: Mapping[str, nn.Module], found: Found) -> Any:
    """Within the context ``found`` takes in the inputs of the layers."""

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            if x.numel() == 0:
                return
            if name in found:
                found[name].add(x)
            else:
                found[name] = InputStatistics.of(x)

        return add

    return _hooks([m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in layers.items()])


def run(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(batch[0])`` for a tuple or list (inputs, targets), else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@torch.no_grad()
def input_statistics(model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]) -> Found:
    """Statistics of the inputs of some layers, in one pass over the data.

    Args:
        model: called in evaluation mode, without gradients: ``model(**batch)`` for a mapping, ``model(batch[0])`` for a
            tuple or list, else ``model(batch)``.
        batches: calibration inputs.
        layers: modules of the model, each with an input ``[..., K]``, by any name.

    Returns:
        By name; layers that had no input are not in it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> input_statistics(model, [torch.ones(5, 4)], {"first": model[0]})["first"].mean.tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    found: Found = {}
    with evaluation(model), _recording(layers, found):
        for batch in batches:
            run(model, batch)
    return found


# ------------------------------------------------------------------------------------------------- layer by layer


class _StopForward(Exception):  # noqa: N818 (it is no error)
    """The rest of a forward is not needed."""


@dataclasses.dataclass
class _Call:
    """How a block was called, without the state that it was given."""

    args: list[Any]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, key: int | str, state: Any) -> Any:
        args, kwargs = list(self.args), dict(self.kwargs)
        (args if isinstance(key, int) else kwargs)[key] = state  # type: ignore[call-overload,index]
        return _state(block(*args, **kwargs))


def _state(output: Any) -> Any:
    """What a block hands on: its output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


@dataclasses.dataclass
class _Chain:
    """Blocks of which each is given what the one before returned, as the argument ``key``."""

    blocks: Sequence[nn.Module]
    key: int | str


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Blocks of Hugging Face's models are called more than once: no keys and values must be kept."""
    configs: list[Any] = [c for c in (getattr(m, "config", None) for m in model.modules()) if hasattr(c, "use_cache")]
    before = [c.use_cache for c in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, was in zip(configs, before, strict=True):
            config.use_cache = was


def _chain(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> tuple[_Chain | None, list[str]]:
    """The container whose children hold the most layers and run as a chain, and the order in which layers run."""
    order: list[str] = []
    containers = [m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 1]
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = {}
    children = {child for container in containers for child in container}

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(module, []).append((args, kwargs, _state(output)))

    def entered(name: str) -> Callable[..., None]:
        return lambda *_: None if name in order else order.append(name)

    handles = [m.register_forward_hook(called, with_kwargs=True) for m in children]
    handles += [m.register_forward_pre_hook(entered(name)) for name, m in layers.items()]
    with _hooks(handles):
        run(model, batch)

    def key_of(blocks: Sequence[nn.Module]) -> int | str | None:
        """Where each block has the output of the one before; None: it is no chain."""
        if any(len(calls.get(block, ())) != 1 for block in blocks):
            return None
        keys: set[int | str] = set()
        for before, block in itertools.pairwise(blocks):
            ((_, _, output),), ((args, kwargs, _),) = calls[before], calls[block]
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            keys.add(next((k for k, value in given if value is output), ""))
        key = keys.pop()
        return None if keys or key == "" else key

    best, most = None, 0
    for container in containers:
        blocks = list(container)
        key = key_of(blocks) if len(set(blocks)) == len(blocks) else None
        inside = {m for block in blocks for m in block.modules()}
        held = sum(m in inside for m in layers.values())
        if key is not None and held > most:
            best, most = _Chain(blocks, key), held
    return best, order


@torch.no_grad()
def in_order(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module], visit: Callable[[Found], None]
) -> None:
    """Visit layers as data reaches them; each is looked at behind the layers that were changed before it.

    Where the model has a chain of blocks (the layers of an ``nn.Sequential``, the decoder blocks of Hugging Face's
    models), their states are kept: every block runs twice on the data, once to look at the layers in it, which are visited
    together, and once to hand on what it then computes. For a layer outside the chain the whole model runs.

    Args:
        model: called as in :func:`input_statistics`; it is the caller who changes it.
        batches: calibration inputs; all are kept.
        layers: modules of the model by name, each with an input ``[..., K]``.
        visit: called with the statistics of some of the layers by name, each layer once; may change their parameters.

    Raises:
        ValueError: no batches, or a layer that none of them reaches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> def clear(found):
        ...     print({name: statistics.norm.tolist() for name, statistics in found.items()})
        ...     for name in found:
        ...         _ = model[int(name)].weight.data.zero_(), model[int(name)].bias.data.fill_(2)
        >>> in_order(model, [torch.ones(1, 2)], {"0": model[0], "2": model[2]}, clear)
        {'0': [1.0, 1.0]}
        {'2': [2.0, 2.0]}

    Source: the order of Frantar, Alistarh, "SparseGPT", ICML 2023, and of what followed it.
    """
    data = list(batches)
    if not data:
        raise ValueError("in_order: batches must hold calibration inputs, got none")
    with evaluation(model), _without_cache(model):
        chain, order = _chain(model, data[0], layers)
        order += [name for name in layers if name not in order]
        blocks = list(chain.blocks) if chain is not None else []
        home = {m: i for i, block in enumerate(blocks) for m in block.modules()}
        walked = False
        for name in order:
            if layers[name] not in home:
                found: Found = {}
                with _recording({name: layers[name]}, found):
                    for batch in data:
                        run(model, batch)
                _visit(found, [name], visit)
            elif not walked:
                walked = True
                assert chain is not None
                inside = [
                    {n: m for n, m in layers.items() if home.get(m) == i} for i in range(len(blocks))
                ]  # of each block
                _walk(model, data, chain, inside, visit)


def _visit(found: Found, names: Iterable[str], visit: Callable[[Found], None]) -> None:
    for name in names:
        if name not in found:
            raise ValueError(f"in_order: batches must reach every layer, got none that reaches {name!r}")
    visit({name: found[name] for name in names})


def _walk(
    model: nn.Module, data: Sequence[Any], chain: _Chain, inside: Sequence[Mapping[str, nn.Module]],
    visit: Callable[[Found], None],
) -> None:  # fmt: skip
    calls: list[list[_Call]] = []  # of each batch and block
    states = []
    for batch in data:
        taken = _calls(model, batch, chain)
        states.append(taken[0])
        calls.append(taken[1])
    last = max(i for i, layers in enumerate(inside) if layers)
    for i, block in enumerate(chain.blocks[: last + 1]):
        if inside[i]:
            found: Found = {}
            with _recording(inside[i], found):
                for call, state in zip(calls, states, strict=True):
                    call[i](block, chain.key, state)
            _visit(found, inside[i], visit)
        if i < last:
            states = [call[i](block, chain.key, state) for call, state in zip(calls, states, strict=True)]


def _calls(model: nn.Module, batch: Any, chain: _Chain) -> tuple[Any, list[_Call]]:
    """The state that the first block is given, and how each block is called."""
    first: list[Any] = []
    calls: list[_Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own, named = list(args), dict(kwargs)
        place: Any = own if isinstance(chain.key, int) else named
        if not first:
            first.append(place[chain.key])
        place[chain.key] = None
        calls.append(_Call(own, named))
        if len(calls) == len(chain.blocks):
            raise _StopForward

    handles = [b.register_forward_pre_hook(hook, with_kwargs=True) for b in chain.blocks]
    with _hooks(handles), suppress(_StopForward):
        run(model, batch)
    state = first[0]
    # a block may write into its input: what came first is looked at more than once
    return (state.clone() if isinstance(state, Tensor) else copy.copy(state)), calls
