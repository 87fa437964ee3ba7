# SPDX-License-Identifier: Apache-2.0
"""Models for ONNX Runtime."""

from __future__ import annotations

import importlib

import torch

from cofire.bench.peers._products import Product


def model(p: Product, accuracy_level: int) -> bytes:
    """One MatMulNBits, which multiplies by the codes and scales of ``p``, in the dtype of its input."""
    onnx = importlib.import_module("onnx")
    make, kinds = onnx.helper, onnx.TensorProto
    number = {torch.float32: kinds.FLOAT, torch.float16: kinds.FLOAT16}[p.input.dtype]
    rows, columns = p.shape
    groups = columns // p.group_size
    blob, scale = p.codes.numpy(), p.scale.to(p.input.dtype).contiguous().numpy()
    node = make.make_node(
        "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft", K=columns, N=rows, bits=p.bits,
        block_size=p.group_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    constants = [
        make.make_tensor("B", kinds.UINT8, [rows, groups, p.group_size * p.bits // 8], blob.tobytes(), raw=True),
        make.make_tensor("scales", number, [rows * groups], scale.tobytes(), raw=True),
    ]
    values = [make.make_tensor_value_info(n, number, ["M", k]) for n, k in (("A", columns), ("Y", rows))]
    graph = make.make_graph([node], "product", values[:1], values[1:], constants)
    opsets = [make.make_opsetid("", 20), make.make_opsetid("com.microsoft", 1)]
    found: bytes = make.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return found
