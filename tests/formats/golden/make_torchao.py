# SPDX-License-Identifier: Apache-2.0
"""Writes ``torchao.safetensors``: weights that torchao quantised on a CPU.

    python tests/formats/golden/make_torchao.py    # torchao 0.18, torch 2.13, on a machine with AVX2

"cpu" is torchao's own tensor, packed by torch. Tiles need a GPU to be packed: of "tiles" there are torchao's codes, scales and
what it decodes them to, of a weight that it fills up.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
)
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros


def main() -> None:
    torch.manual_seed(0)
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    tensors = {}
    for name, rows, columns, group, dtype in (
        ("cpu_a", 48, 64, 32, torch.bfloat16),
        ("cpu_b", 32, 128, 64, torch.float32),
    ):
        weight = torch.randn(rows, columns, dtype=dtype)
        packed = Int4OpaqueTensor.from_hp(weight, [1, group])
        # The product with one-hot rows is the decoded weight.
        decoded = torch.ops.aten._weight_int4pack_mm_for_cpu(
            torch.eye(columns, dtype=dtype), packed.qdata, group, packed.scale_and_zero
        ).t()
        tensors |= {
            f"{name}/qdata": packed.qdata,
            f"{name}/scale_and_zero": packed.scale_and_zero,
            f"{name}/decoded": decoded.contiguous(),
        }
    weight = torch.nn.functional.pad(torch.randn(5, 96, dtype=torch.bfloat16), (0, 1024 - 96, 0, 3))
    scale, zero = _choose_qparams_affine_tinygemm(
        weight, MappingType.ASYMMETRIC, (1, 32), torch.int32, 0, 15,
        scale_dtype=torch.bfloat16, zero_point_dtype=torch.bfloat16,
    )  # fmt: skip
    codes = _quantize_affine_tinygemm(weight, (1, 32), scale, zero, torch.int32, 0, 15)
    decoded = _dequantize_affine_tinygemm(codes, (1, 32), scale, zero, torch.int32, 0, 15, output_dtype=torch.bfloat16)
    tensors |= {
        "tiles/codes": codes.to(torch.uint8),
        "tiles/scale_and_zero": pack_tinygemm_scales_and_zeros(
            scale.reshape(8, -1), zero.reshape(8, -1), torch.bfloat16
        ),
        "tiles/decoded": decoded[:5, :96].contiguous(),
    }
    save_file(tensors, Path(__file__).with_name("torchao.safetensors"))


if __name__ == "__main__":
    main()
