# SPDX-License-Identifier: Apache-2.0
"""Writes ``coremltools.safetensors``: linear layers that coremltools' PyTorch tools palettized and finalized.

python tests/formats/golden/make_coremltools.py    # coremltools 9.0, torch 2.13
"""

from pathlib import Path

import torch
from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig
from safetensors.torch import save_file
from torch import nn

CASES = {  # name: settings
    "tensor": {"n_bits": 3, "granularity": "per_tensor"},
    "groups": {"n_bits": 2, "granularity": "per_grouped_channel", "group_size": 4},
    "scaled": {"n_bits": 4, "granularity": "per_tensor", "enable_per_channel_scale": True},
}


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, settings in CASES.items():
        model = nn.Sequential(nn.Linear(24, 12))
        config = PostTrainingPalettizerConfig.from_dict({"global_config": settings})
        final = PostTrainingPalettizer(model, config).compress(num_kmeans_workers=1)
        tensors |= {f"{name}/{key}": value.detach().clone() for key, value in final.state_dict().items()}
    save_file(tensors, Path(__file__).with_name("coremltools.safetensors"))


if __name__ == "__main__":
    main()
