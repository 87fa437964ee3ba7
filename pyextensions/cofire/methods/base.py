# SPDX-License-Identifier: Apache-2.0
"""The protocol of the training methods: prepare, train, finalize, report.

.. code-block:: python

    method = cofire.methods.FTWT(mass=0.95)           # hyperparameters, and nothing else
    model = method.prepare(model)
    output = model(x)
    loss = task_loss(output, y) + method.loss(model)
    loss.backward(); optimizer.step(); method.step(model)
    model = method.finalize(model)

A method is a frozen dataclass; whatever changes during training is a parameter or a buffer of the model. So
``state_dict``, ``torch.save``, safetensors, data parallelism, automatic mixed precision, gradient
checkpointing, ``copy.deepcopy`` and ``torch.compile`` work as they do without the method, and training
resumes exactly.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn

from cofire.names import near_matches
from cofire.nn.calibration import evaluation as evaluation


class Methods(dict[str, "type[Method]"]):
    """Methods by name; an unknown name raises a KeyError that lists the near ones."""

    def __missing__(self, name: str) -> type[Method]:
        raise KeyError(f"no method named {name!r}{near_matches(name, self)}")


#: Every method by its name: ``METHODS["ftwt"]`` is :class:`cofire.methods.FTWT`.
METHODS = Methods()


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """Base class of the methods: subclass it as a frozen dataclass of hyperparameters, the paper's values as
    defaults.

    ``class FTWT(Method, name="ftwt")`` enters the class into :data:`METHODS`. :meth:`prepare` and
    :meth:`finalize` return a new model and leave the given one as it was, so that one trained network can be
    prepared with several settings.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        if name:
            METHODS[name] = cls

    @abc.abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` with the method built in, to be trained. Make the optimiser after this call."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, output: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """The method's own loss (a scalar) for the last forward of ``model``, to be added to the task's."""

    def step(self, model: nn.Module) -> None:
        """Advance the method's state, if it has any; call it after each ``optimizer.step()``."""
        return

    @abc.abstractmethod
    def finalize(self, model: nn.Module) -> nn.Module:
        """A deployable copy of the trained ``model``, which runs the fast kernels."""

    @abc.abstractmethod
    def report(self, model: nn.Module, batches: Iterable[Any]) -> Report:
        """What was gained, measured on ``batches``."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A dataclass that also reads like a mapping: ``report["macs"]``, ``dict(report)``."""

    def keys(self) -> Iterator[str]:
        return (f.name for f in dataclasses.fields(self))

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"no entry named {key!r}{near_matches(key, self.keys())}")
        return getattr(self, key)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers all the way down, for JSON."""
        return dataclasses.asdict(self)


def first_input(batch: Any) -> Any:
    """The network's input in a batch of a data loader: the batch itself, or the first of a tuple or list."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and data parallelism."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's; to ask for its class would import the compiler
            model = model.get_submodule("_orig_mod")
        else:
            return model


def matches(names: Iterable[str], pattern: str) -> bool:
    """Whether one of ``names`` is the name or fits the pattern."""
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """``model`` with some of its modules replaced, wherever they stand."""
    if id(model) in new:
        return new[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in new:
                module._modules[name] = new[id(child)]
    return model
