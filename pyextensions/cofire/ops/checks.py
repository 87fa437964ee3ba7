# SPDX-License-Identifier: Apache-2.0
"""Checks that the validation functions of the operators share.

Each raises a sentence that names the operator, the argument, what was expected and what came.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor


def shape_of(x: Tensor) -> str:
    return str(list(x.shape))


def refuse(operator: str, message: str) -> NoReturn:
    raise ValueError(f"{operator}: {message}")


def check_float(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{operator}: {name} must be a floating-point tensor, got {x.dtype}")


def check_finite(where: str, **tensors: Tensor | None) -> None:
    """No NaN and no infinity. It reads the values, so it is for layers and methods: operators are traced."""
    for name, x in tensors.items():
        found = 0 if x is None else int((~x.isfinite()).sum())
        if x is not None and found:
            refuse(where, f"{name} must be finite, got {found} NaN or infinite of {x.numel()}")


def check_device(operator: str, first: str, a: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.device != a.device:
            refuse(operator, f"{name} must be on the device of {first} ({a.device}), got {x.device}")


def check_same(operator: str, first: str, a: Tensor, **others: Tensor | None) -> None:
    """Same dtype, where both are floats, and same device."""
    for name, x in others.items():
        if x is not None and x.is_floating_point() and a.is_floating_point() and x.dtype != a.dtype:
            raise TypeError(f"{operator}: {name} must have the dtype of {first} ({a.dtype}), got {x.dtype}")
    check_device(operator, first, a, **others)


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def check_integer(operator: str, **values: Any) -> None:
    for name, value in values.items():
        if not is_integer(value):
            raise TypeError(f"{operator}: {name} must be an integer, got {value!r}")


def check_number(operator: str, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, Real)):
            raise TypeError(f"{operator}: {name} must be a number, got {value!r}")


def check_module(operator: str, model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{operator}: model must be a torch.nn.Module, got {type(model).__name__}")


def check_pair(operator: str, name: str, value: Any) -> list[int]:
    """An integer for both directions, or a sequence of integers."""
    if is_integer(value):
        return [value, value]
    if not (isinstance(value, (tuple, list)) and all(map(is_integer, value))):
        raise TypeError(f"{operator}: {name} must be an integer or a sequence of integers, got {value!r}")
    return list(value)


def check_choice(operator: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        refuse(operator, f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_map(operator: str, name: str, x: Tensor) -> None:
    if x.dim() != 4:
        refuse(operator, f"{name} must have shape [N, C, H, W], got {shape_of(x)}")


def check_selection(operator: str, prefix: str, index: Tensor, count: Tensor, rows: int, columns: int) -> None:
    for name, x, shape in ((f"{prefix}_index", index, [rows, columns]), (f"{prefix}_count", count, [rows])):
        if x.dtype != torch.int32:
            raise TypeError(f"{operator}: {name} must be int32 (as compact returns it), got {x.dtype}")
        if list(x.shape) != shape:
            refuse(operator, f"{name} must have shape {shape}, got {shape_of(x)}")
