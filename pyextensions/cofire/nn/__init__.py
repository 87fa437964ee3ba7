# SPDX-License-Identifier: Apache-2.0
"""Modules, constructed like their ``torch.nn`` counterparts, one file per family."""

from cofire.nn.clustering import (
    Palette,
    Palettized,
    PalettizedConv2d,
    PalettizedEmbedding,
    PalettizedLinear,
)
from cofire.nn.compressed import Compressed, CompressedConv2d, CompressedLinear
from cofire.nn.fake_quantize import FakeQuantize, LSQConv2d, LSQLinear
from cofire.nn.gating import (
    DeployedGatedConv2d,
    DeployedGatedLinear,
    Gate,
    Gated,
    GatedConv2d,
    GatedLinear,
    GateHead,
)
from cofire.nn.kv_cache import (
    FullCache,
    HeavyHitterCache,
    KVCache,
    LoCoCoCache,
    SlidingWindowCache,
    SnapKVCache,
)
from cofire.nn.kv_fusion import KVFusion
from cofire.nn.lowbit import LoRALinear, QLoRALinear, QuantLinear, hessians, quantize_
from cofire.nn.palettes import (
    PackedPalette,
    PackedPalettized,
    PackedPalettizedConv2d,
    PackedPalettizedEmbedding,
    PackedPalettizedLinear,
)
from cofire.nn.shift_add import BinaryLinearAttention, MixtureOfPrimitives, PackedMixture, ShiftLinear
from cofire.nn.sparse import Sparse, SparseConv2d, SparseLinear, check_masks_agree, masks, sparsify_
from cofire.nn.statsq import (
    LSQActivation,
    QueryKey,
    ReparameterizedAttention,
    StatsQConv2d,
    StatsQLinear,
    WeightQuantizer,
)
from cofire.nn.statsq_deployed import IntegerLinear, QuantConv2d

__all__ = [
    "BinaryLinearAttention",
    "Compressed",
    "CompressedConv2d",
    "CompressedLinear",
    "DeployedGatedConv2d",
    "DeployedGatedLinear",
    "FakeQuantize",
    "FullCache",
    "Gate",
    "GateHead",
    "Gated",
    "GatedConv2d",
    "GatedLinear",
    "HeavyHitterCache",
    "IntegerLinear",
    "KVCache",
    "KVFusion",
    "LSQActivation",
    "LSQConv2d",
    "LSQLinear",
    "LoCoCoCache",
    "LoRALinear",
    "MixtureOfPrimitives",
    "PackedMixture",
    "PackedPalette",
    "PackedPalettized",
    "PackedPalettizedConv2d",
    "PackedPalettizedEmbedding",
    "PackedPalettizedLinear",
    "Palette",
    "Palettized",
    "PalettizedConv2d",
    "PalettizedEmbedding",
    "PalettizedLinear",
    "QLoRALinear",
    "QuantConv2d",
    "QuantLinear",
    "QueryKey",
    "ReparameterizedAttention",
    "ShiftLinear",
    "SlidingWindowCache",
    "SnapKVCache",
    "Sparse",
    "SparseConv2d",
    "SparseLinear",
    "StatsQConv2d",
    "StatsQLinear",
    "WeightQuantizer",
    "check_masks_agree",
    "hessians",
    "masks",
    "quantize_",
    "sparsify_",
]
