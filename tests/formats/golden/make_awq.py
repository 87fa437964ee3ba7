# SPDX-License-Identifier: Apache-2.0
"""Writes ``awq.safetensors``: layers that AutoAWQ packed, in both layouts, and what it decodes the first to.

python tests/formats/golden/make_awq.py    # autoawq 0.2.7.post3 (--no-deps), accelerate, transformers, torch 2.13
"""

import sys
import types
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

# The package as a whole needs other versions of its friends; these modules do not.
spec = find_spec("awq")
assert spec is not None and spec.submodule_search_locations
for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
    module = types.ModuleType(name)
    module.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")[1:]))]
    sys.modules[name] = module
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402

ROWS, COLUMNS = 32, 256


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for group in (64, 128):
        groups = COLUMNS // group
        scale = (torch.rand(ROWS, groups) + 0.5).half()
        zero = torch.randint(0, 16, (ROWS, groups))
        codes = torch.randint(0, 16, (ROWS, COLUMNS))
        spread = [x.repeat_interleave(group, 1).float() for x in (scale, zero)]
        linear = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float32)
        linear.weight.data = (codes - spread[1]) * spread[0]
        first = WQLinear_GEMM.from_linear(linear, 4, group, scales=scale.t().float(), zeros=zero.t().float())
        decoded = dequantize_gemm(first.qweight, first.qzeros, first.scales, 4, group)
        second = WQLinear_GEMVFast.from_linear(linear, 4, group, scales=scale.float(), zeros=zero.float())
        tensors |= {f"gemm_{group}/{n}": t.clone().contiguous() for n, t in first.state_dict().items()}
        tensors |= {f"fast_{group}/{n}": t.clone().contiguous() for n, t in second.state_dict().items()}
        tensors[f"gemm_{group}/decoded"] = decoded.t()[:8].contiguous()
        tensors[f"fast_{group}/codes"] = codes.to(torch.uint8)
    save_file(tensors, Path(__file__).with_name("awq.safetensors"))


if __name__ == "__main__":
    main()
