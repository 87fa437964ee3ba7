# SPDX-License-Identifier: Apache-2.0
"""Writes ``bitsandbytes.safetensors``: weights that bitsandbytes quantised on a CPU, and what it decodes them to.

python tests/formats/golden/make_bitsandbytes.py    # bitsandbytes 0.50.2, torch 2.13
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

CASES = {  # name: shape, type, blocksize, nested, dtype
    "nf4": ((8, 128), "nf4", 64, False, torch.float32),
    "fp4": ((8, 128), "fp4", 64, False, torch.float32),
    "nf4_half": ((4, 128), "nf4", 128, False, torch.float16),
    "nf4_nested": ((130, 128), "nf4", 64, True, torch.bfloat16),  # 260 blocks: more than one nested block
    "fp4_nested": ((6, 64), "fp4", 64, True, torch.float16),
    "across_rows": ((6, 96), "nf4", 64, False, torch.float32),
    "across_rows_nested": ((5, 32), "fp4", 64, True, torch.float32),
}


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, (shape, kind, blocksize, nested, dtype) in CASES.items():
        weight = (torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]).to(dtype)
        data, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
        tensors[f"{name}/data"] = data
        tensors |= {f"{name}/state/{k}": v.contiguous() for k, v in state.as_dict(packed=True).items()}
        tensors[f"{name}/decoded"] = bnb.dequantize_4bit(data, state)[-8:].clone()  # the last rows
    save_file(tensors, Path(__file__).with_name("bitsandbytes.safetensors"))


if __name__ == "__main__":
    main()
