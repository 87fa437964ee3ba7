# SPDX-License-Identifier: Apache-2.0
"""Writes ``gptq.safetensors``: layers that AutoGPTQ packed, and the weights that it multiplies with.

python tests/formats/golden/make_gptq.py    # auto-gptq 0.7.1 (--no-deps), transformers, torch 2.13
"""

import sys
import types
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

# The package as a whole needs other versions of its friends; the one module does not.
spec = find_spec("auto_gptq")
assert spec is not None and spec.submodule_search_locations
for name, folder in (
    ("auto_gptq", ""),
    ("auto_gptq.nn_modules", "nn_modules"),
    ("auto_gptq.nn_modules.qlinear", "nn_modules/qlinear"),
):
    module = types.ModuleType(name)
    module.__path__ = [str(Path(spec.submodule_search_locations[0]) / folder)]
    sys.modules[name] = module
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear  # noqa: E402

ROWS, COLUMNS, GROUP = 32, 96, 32


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for bits in (2, 3, 4, 8):
        for order in (False, True):
            groups, top = COLUMNS // GROUP, (1 << bits) - 1
            g_idx = (torch.arange(COLUMNS) // GROUP).int()
            g_idx = g_idx[torch.randperm(COLUMNS)] if order else g_idx
            scale = (torch.rand(ROWS, groups) + 0.5).half().float()
            zero = torch.randint(1, top + 1, (ROWS, groups)).float()
            codes = torch.randint(0, top + 1, (ROWS, COLUMNS))
            linear = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float16)
            linear.weight.data = ((codes - zero[:, g_idx]) * scale[:, g_idx]).half()
            layer = QuantLinear(bits, GROUP, COLUMNS, ROWS, False)
            layer.pack(linear, scale, zero, g_idx)
            start = f"{bits}{'_ordered' if order else ''}"
            tensors |= {f"{start}/{n}": t.clone() for n, t in layer.state_dict().items()}
            # The product with one-hot rows is the decoded weight; its first rows.
            tensors[f"{start}/decoded"] = layer(torch.eye(COLUMNS, dtype=torch.float16)).t()[:8].contiguous()
    save_file(tensors, Path(__file__).with_name("gptq.safetensors"))


if __name__ == "__main__":
    main()
