# SPDX-License-Identifier: Apache-2.0
"""ggml by its C interface: the library that a wheel carries, its blocks of weights, and its way to round activations."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cofire.bench.cases import Run
from cofire.bench.peers._products import Product, _times_weight

BLOCK = 32
KINDS = {4: 2, 8: 8}  #: GGML_TYPE_Q4_0 and GGML_TYPE_Q8_0
POINTER = ctypes.c_void_p


class Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


class Library:
    """Functions by name without their prefix; what a name ends in says what comes back (default: a pointer)."""

    def __init__(self, path: Path) -> None:
        self.found = ctypes.CDLL(str(path))
        self.silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)(lambda *_: None)
        if hasattr(self.found, "ggml_log_set"):
            self("log_set", self.silence, None, returns=None)  # it announces each weight

    def __call__(self, name: str, *args: Any, returns: Any = POINTER) -> Any:
        function = getattr(self.found, f"ggml_{name}")
        function.restype = returns
        return function(*(POINTER(a) if isinstance(a, int) and a >= 1 << 31 else a for a in args))

    def context(self, room: Any) -> Any:
        """Descriptions of tensors are written into ``room``, and outlast the context; their data lie elsewhere."""
        init = self.found.ggml_init
        init.restype, init.argtypes = POINTER, (Parameters,)
        return POINTER(init(Parameters(len(room), ctypes.addressof(room), True)))

    def matrix(self, context: Any, kind: int, rows: int, columns: int) -> Any:
        sizes = ctypes.c_int64(columns), ctypes.c_int64(rows)
        return POINTER(self("new_tensor_2d", context, ctypes.c_int(kind), *sizes))

    def repacking(self) -> Any:
        """The kind of memory in which weights are stored in the order that the products of this CPU want, or None."""
        if not hasattr(self.found, "ggml_backend_cpu_reg"):
            return None
        registry = POINTER(self("backend_cpu_reg"))
        address = self("backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        device = POINTER(self("backend_reg_dev_get", registry, ctypes.c_size_t(0)))
        for kind in ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(device) if address else ():
            if kind is None or self("backend_buft_name", POINTER(kind), returns=ctypes.c_char_p) == b"CPU_REPACK":
                return None if kind is None else POINTER(kind)
        return None

    def free(self, backend: Any, buffers: list[Any], room: Any) -> None:
        for buffer in buffers:
            self("backend_buffer_free", buffer, returns=None)
        self("backend_free", backend, returns=None)


@functools.cache
def library() -> Library:
    spec = importlib.util.find_spec("pywhispercpp")
    assert spec is not None and spec.origin is not None
    found = sorted(Path(spec.origin).parent.parent.glob("pywhispercpp.libs/libggml-cpu-*.so*"))
    if not found:
        raise ImportError("this wheel of pywhispercpp carries no libggml-cpu")
    return Library(found[0])


def blocks(p: Product) -> Tensor:
    """Each 32 codes with their scale before them in fp16; of 4 bits the first half of them is in the low nibbles."""
    scale = p.scale.repeat_interleave(p.group_size // BLOCK, 1).half().contiguous().view(torch.uint8).view(-1, 2)
    if p.bits == 8:
        return torch.cat([scale, p.signed().view(-1, BLOCK).view(torch.uint8)], 1).contiguous()
    codes = p.levels().view(-1, 2, BLOCK // 2).to(torch.uint8)
    return torch.cat([scale, codes[:, 0] | codes[:, 1] << 4], 1).contiguous()


def by_blocks(*args: Any) -> Tensor:
    """With activations rounded to 8 bits by blocks of 32, whose scale is rounded to fp16."""
    p = Product(*args)
    x = p.input.float().unflatten(-1, (-1, BLOCK))
    top = x.abs().amax(-1, keepdim=True)
    codes = (x * (127 / top)).round()
    return _times_weight(p, (codes.double() * (top / 127).half().double()).flatten(-2))


def product(library: Callable[[], Library], repacked: bool, *args: Any) -> Run:
    """The product as a graph of one operator; input and output lie where ggml has them, and are not copied.

    ``repacked``: the weight is in the order that the library's products want, by its place or by a function of its own.
    """
    p, ggml = Product(*args), library()
    (rows, columns), count, data = p.shape, p.input.shape[0], blocks(p)
    backend = POINTER(ggml("backend_cpu_init"))
    ggml("backend_cpu_set_n_threads", backend, torch.get_num_threads(), returns=None)
    room = ctypes.create_string_buffer(1 << 20)
    context = ggml.context(room)
    weight = ggml.matrix(context, KINDS[p.bits], rows, columns)
    kinds = [ggml.repacking() if repacked else None, POINTER(ggml("backend_cpu_buffer_type"))]
    buffers = [POINTER(ggml("backend_alloc_ctx_tensors_from_buft", context, kinds[0] or kinds[1]))]
    x = ggml.matrix(context, 0, count, columns)
    y = POINTER(ggml("mul_mat", context, weight, x))
    graph = POINTER(ggml("new_graph", context))
    ggml("build_forward_expand", graph, y, returns=None)
    buffers.append(POINTER(ggml("backend_alloc_ctx_tensors_from_buft", context, kinds[1])))
    ggml("free", context, returns=None)  # some versions have 64 of them for all
    for tensor, values in ((weight, data), (x, p.input.contiguous())):
        sizes = ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes)
        ggml("backend_tensor_set", tensor, POINTER(values.data_ptr()), *sizes, returns=None)
    if repacked and hasattr(ggml.found, "iqk_repack_tensor"):
        ggml.found.iqk_repack_tensor(weight)
    answer = (ctypes.c_float * (count * rows)).from_address(ggml("get_data", y))
    weakref.finalize(answer, ggml.free, backend, buffers, room).atexit = False  # as long as anybody reads it
    output = torch.frombuffer(answer, dtype=torch.float32).view(count, rows)

    def run() -> Tensor:
        ggml("backend_graph_compute", backend, graph, returns=ctypes.c_int)
        return output

    return run
