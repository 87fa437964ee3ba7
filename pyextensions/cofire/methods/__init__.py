# SPDX-License-Identifier: Apache-2.0
"""Training methods, one paper each, with one protocol: :mod:`cofire.methods.base`."""

from cofire.methods.base import METHODS, Method, Report
from cofire.methods.dsnot import DSnoT
from cofire.methods.dynamic_llava import DynamicLLaVA
from cofire.methods.edkm import EDKM
from cofire.methods.ftwt import FTWT
from cofire.methods.gradual_pruning import GradualPruning
from cofire.methods.lococo import LoCoCo
from cofire.methods.ofq import OFQ
from cofire.methods.qlora import QLoRA
from cofire.methods.rigl import RigL
from cofire.methods.shift_add_vit import ShiftAddViT

__all__ = [
    "EDKM",
    "FTWT",
    "METHODS",
    "OFQ",
    "DSnoT",
    "DynamicLLaVA",
    "GradualPruning",
    "LoCoCo",
    "Method",
    "QLoRA",
    "Report",
    "RigL",
    "ShiftAddViT",
]
