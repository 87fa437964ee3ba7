# SPDX-License-Identifier: Apache-2.0
"""The digits of the families that need images, loaded once, and how networks are scored on them."""

from __future__ import annotations

import functools

from torch import Tensor

from cofire import data

DATA = "handwritten digits of scikit-learn"
KIND = "digits right, %"


@functools.lru_cache(maxsize=4)
def load(size: int | None = None, images: int | None = None) -> data.Images:
    """The digits at ``size`` pixels a side, with all or so many images for training."""
    return data.load("digits", size=size).subset(images)


def first(n: int, size: int | None = None) -> Tensor:
    """So many of the test images, normalised."""
    found = load(size)
    return found.normalize(found.test[:n])
