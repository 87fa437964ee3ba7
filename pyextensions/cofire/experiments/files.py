# SPDX-License-Identifier: Apache-2.0
"""Files of an experiment, each whole or not there: results to go on from, and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cofire.files import replacing

Results = dict[str, Any]


def results_file(out: Path, validate: bool = False) -> Path:
    """Where the results go: a validation run has a name of its own, so that it never passes for a test."""
    return out / "validation" / "validation.json" if validate else out / "results.json"


def load_results(path: Path, settings: Results, environment: Results) -> Results:
    """What ``path`` holds of the experiment with these settings, or the start of new results.

    Raises:
        ValueError: the file is another experiment's.
    """
    if not path.is_file():
        return {"environment": environment, "settings": settings, "dense": [], "cells": []}
    found: Results = json.loads(path.read_text(encoding="utf-8"))
    if found.get("settings") != settings:
        raise ValueError(f"experiment: {path} holds another experiment; give an empty folder")
    return found


def save_weights(path: Path, model: nn.Module) -> None:
    """The model's ``state_dict``, atomically."""
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A ``state_dict``, also one that lies under the key ``state_dict`` or was saved from ``DataParallel``.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"read_weights: no file {str(path)!r}")
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    return {name.removeprefix("module."): value for name, value in found.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load, all names and shapes as the model's.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"load_weights: the weights do not fit {type(model).__name__}: {error}") from error
