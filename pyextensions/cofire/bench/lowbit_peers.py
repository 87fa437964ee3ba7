# SPDX-License-Identifier: Apache-2.0
"""Products with quantised weights as other libraries compute them, from the very codes and scales of ``qlinear``.

Each function takes the operator's arguments, packs as its library wants it and returns the call to time. A library that
rounds activations to 8 bits does so in its own way: each way has its maths here in plain torch, and the answer is checked
against that.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cofire.bench.cases import Provider, Run, installed
from cofire.ops.lowbit import _dequantize_reference, int8_activations
from cofire.ops.qtensor import QTensor
from cofire.ops.quantizers import quantize_weight
from cofire.registry import OPERATORS

HALF, WIDE = torch.bfloat16, torch.float64


class Product(NamedTuple):
    """The arguments of ``qlinear``."""

    input: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    lut: Tensor | None
    bias: Tensor | None
    bits: int
    group_size: int
    activations: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.input.shape[-1]


# ----------------------------------------------------------------------------------------- references

#: Decoded weights by their codes, the last few: a case asks for one again and again, and decoding costs seconds.
_DECODED: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


def decoded(p: Product) -> Tensor:
    """The weight by the operator's reference, fp64 where a part of it is, else fp32."""
    key = (id(p.codes), p.bits, p.group_size, *(None if t is None else t.dtype for t in p[2:6]))
    if key not in _DECODED:
        # outside inference mode, whatever the caller is in: autograd may meet it later
        with torch.inference_mode(False), torch.no_grad():
            w = _dequantize_reference(*p[1:6], p.bits, p.group_size, p.shape[1])
        _DECODED[key] = (p.codes, w)  # with the codes, so that their id stays theirs
        while len(_DECODED) > 4:
            _DECODED.popitem(last=False)
    return _DECODED[key][1]


def _times_weight(p: Product, x: Tensor, factor: Tensor | None = None) -> Tensor:
    w = decoded(p)
    y = x.to(w.dtype) @ w.t()
    if factor is not None:
        y = y * factor.to(w.dtype)
    return y.to(p.input.dtype)


def reference(*args: Any) -> Tensor:
    """:func:`cofire.ops.qlinear` with activations as the case has them, and the decoded weight kept."""
    p = Product(*args)
    if p.activations == "int8":
        return _times_weight(p, *int8_activations(p.input))
    return _times_weight(p, p.input)


def exact(*args: Any) -> Tensor:
    """With the activations as they are."""
    p = Product(*args)
    return _times_weight(p, p.input)


def half(*args: Any) -> Tensor:
    """With input and weight rounded to bfloat16, and so is the result."""
    p = Product(*args)
    y = p.input.to(HALF).double() @ decoded(p).to(HALF).double().t()
    return y if p.input.dtype == WIDE else y.to(HALF)


def by_group(*args: Any) -> Tensor:
    """With activations rounded to 8 bits by groups as long as the weight's."""
    p = Product(*args)
    codes, scale = int8_activations(p.input.unflatten(-1, (-1, p.group_size)))
    return _times_weight(p, (codes.double() * scale.double()).flatten(-2))


def seven_bits(*args: Any) -> Tensor:
    """With activations rounded to 7 bits between the smallest and the largest of all."""
    p = Product(*args)
    scale, zero = torch._choose_qparams_per_tensor(p.input.float(), True)
    codes = ((p.input.float() / scale).round() + zero).clamp(0, 127) - zero
    return _times_weight(p, codes.double() * scale)


def of_255(*args: Any) -> Tensor:
    """With each row rounded to 8 bits of the scale 2 absmax / 255."""
    p = Product(*args)
    scale = p.input.float().abs().amax(-1, keepdim=True) / 127.5
    return _times_weight(p, (p.input.float() * (1 / scale)).round().clamp(-128, 127), scale)


def clear_of_halves(x: Tensor, group_sizes: tuple[int, ...]) -> Tensor:
    """Moves values that some rounding to 8 bits would find halfway: to which side is nobody's mistake."""
    for _ in range(100):
        grids = [x.unflatten(-1, (-1, size)).abs().amax(-1, keepdim=True) / 127 for size in group_sizes]
        grids += [x.abs().amax(-1, keepdim=True) / n for n in (127, 127.5)]
        ratios = [(x.unflatten(-1, (s.shape[-2], -1)) / s).flatten(-2) if s.dim() > x.dim() else x / s for s in grids]
        ratios.append(x / torch._choose_qparams_per_tensor(x, True)[0])
        # not the largest, which are halfway by definition where 255 steps part the two ends
        near = (((r - r.floor() - 0.5).abs() < 1e-3) & (r.abs() < 127.4) for r in ratios)
        halfway = functools.reduce(torch.logical_or, near)
        if not halfway.any():
            break
        x = torch.where(halfway, x * (1 - 2**-6), x)
    return x


def _of_four_bits(p: Product) -> QTensor:
    return quantize_weight(decoded(p).float(), "absmax", bits=4, group_size=min(128, p.shape[1]))


def of_four_bits(*args: Any) -> Tensor:
    """With the weight rounded to our own 4 bits, by groups of 128."""
    p = Product(*args)
    w = _of_four_bits(p).dequantize().to(decoded(p).dtype)
    return (p.input.to(w.dtype) @ w.t()).to(p.input.dtype)


# --------------------------------------------------------------------------------------- torch and ourselves


def four_bits(*args: Any) -> Run:
    """Our own product with 4 bits, for formats that claim to be as fast."""
    p = Product(*args)
    q = _of_four_bits(p)
    parts = (q.codes, q.scale, q.zero, q.offset, q.lut, p.bias, q.bits, q.group_size, p.activations)
    return functools.partial(OPERATORS["qlinear"], p.input, *parts)


def _levels(p: Product) -> Tensor:
    """The codes ``[N, K]`` as unsigned integers."""
    from cofire.ops.packing import unpack_bits

    return unpack_bits(p.codes, p.bits, p.shape[1])


def _signed(p: Product) -> Tensor:
    """int8 ``[N, K]``: what the scales multiply, an entry of the table or a code minus the middle of all."""
    if p.lut is not None:
        return p.lut[0][_levels(p).long()]
    return (_levels(p).short() - (1 << (p.bits - 1))).to(torch.int8)


def int4pack(*args: Any) -> Run:
    """torch's 4-bit product; scale and zero point in the dtype of the input."""
    p = Product(*args)
    scales = torch.stack((p.scale, torch.zeros_like(p.scale)), 2).transpose(0, 1).contiguous().to(p.input.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_levels(p).int(), 1)
    return functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, p.input, packed, p.group_size, scales)


def int8pack(*args: Any) -> Run:
    """torch's 8-bit product, one scale for each row."""
    p = Product(*args)
    scales = p.scale[:, 0].to(p.input.dtype)
    return functools.partial(torch.ops.aten._weight_int8pack_mm, p.input, _signed(p), scales)


def int_mm(*args: Any) -> Run:
    """Rows rounded in plain torch, then its product of bytes: the same maths as ours."""
    p = Product(*args)
    weight, scale = _signed(p).t(), p.scale[:, 0].float()

    def run() -> Tensor:
        top = p.input.abs().amax(1, keepdim=True).float() / 127
        codes = (p.input / top).round_().to(torch.int8)
        return torch._int_mm(codes, weight).float().mul_(top).mul_(scale).to(p.input.dtype)

    return run


def dynamic(*args: Any) -> Run:
    """torch's dynamically quantised layer: activations of 7 bits, one scale and zero point for all."""
    p = Product(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(p.shape[0], dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(_signed(p), p.scale[:, 0].double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return functools.partial(torch.ops.quantized.linear_dynamic, p.input, packed, True)


# ---------------------------------------------------------------------------------------- other packages


def onnx_model(p: Product, accuracy_level: int) -> bytes:
    """A model that is one MatMulNBits, whose blob is rows of bits like ours."""
    onnx = importlib.import_module("onnx")
    make, kinds = onnx.helper, onnx.TensorProto
    rows, columns = p.shape
    groups = columns // p.group_size
    blob, scale = p.codes.numpy(), p.scale.float().contiguous().numpy()
    node = make.make_node(
        "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft", K=columns, N=rows, bits=p.bits,
        block_size=p.group_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    constants = [
        make.make_tensor("B", kinds.UINT8, [rows, groups, p.group_size * p.bits // 8], blob.tobytes(), raw=True),
        make.make_tensor("scales", kinds.FLOAT, [rows * groups], scale.tobytes(), raw=True),
    ]
    values = [make.make_tensor_value_info(n, kinds.FLOAT, ["M", k]) for n, k in (("A", columns), ("Y", rows))]
    graph = make.make_graph([node], "product", values[:1], values[1:], constants)
    opsets = [make.make_opsetid("", 20), make.make_opsetid("com.microsoft", 1)]
    model: bytes = make.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


@functools.cache
def _onnxruntime() -> Any:
    """With one set of threads for all sessions: each session's own would spin against those of the next."""
    module = importlib.import_module("onnxruntime")
    module.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    return module


def onnxruntime(accuracy_level: int, *args: Any) -> Run:
    """MatMulNBits: exact activations at accuracy level 0, at 4 rounded to 8 bits by groups. Nothing is copied."""
    p = Product(*args)
    module = _onnxruntime()
    options = module.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = False
    session = module.InferenceSession(onnx_model(p, accuracy_level), options, providers=["CPUExecutionProvider"])
    binding, x = session.io_binding(), p.input.contiguous()
    y = torch.empty(x.shape[0], p.shape[0])
    kind = importlib.import_module("numpy").float32
    binding.bind_input("A", "cpu", 0, kind, list(x.shape), x.data_ptr())
    binding.bind_output("Y", "cpu", 0, kind, list(y.shape), y.data_ptr())

    def run(_: Tensor = x) -> Tensor:  # holds the input, as the binding does not
        session.run_with_iobinding(binding)
        return y

    return run


def zentorch_dynamic(*args: Any) -> Run:
    """8-bit rows times 8-bit rows."""
    p = Product(*args)
    importlib.import_module("zentorch")
    weight, scale = _signed(p), p.scale.t().float().contiguous()
    return functools.partial(torch.ops.zentorch.zentorch_dynamic_qlinear, p.input, weight, scale, None)


def zentorch_woq(*args: Any) -> Run:
    """4-bit weights times bfloat16."""
    p = Product(*args)
    importlib.import_module("zentorch")
    packed = torch.ops.zentorch.zentorch_woq_repack_weight(_signed(p)).t()
    scale = p.scale.to(HALF).t()
    return functools.partial(torch.ops.zentorch.zentorch_woq_linear, p.input, packed, scale, None, None)


def torchao(*args: Any) -> Run:
    """8-bit weights, one scale for each row; activations as they are or rounded by rows."""
    p = Product(*args)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    module = importlib.import_module("torchao.quantization.quantize_.workflows.int8.int8_tensor")
    rounding = module.QuantizeTensorToInt8Kwargs(granularity=module.PerRow()) if p.activations == "int8" else None
    weight = module.Int8Tensor(
        _signed(p), p.scale.to(p.input.dtype), [1, p.shape[1]], p.input.dtype, act_quant_kwargs=rounding
    )
    return functools.partial(torch.nn.functional.linear, p.input, weight)


def bitsandbytes(*args: Any) -> Run:
    """nf4, quantised anew by the library from the decoded weight, which gives back the same codes."""
    p = Product(*args)
    module = importlib.import_module("bitsandbytes")
    weight = _dequantize_reference(*p[1:6], p.bits, p.group_size, p.shape[1]).to(p.input.dtype)
    codes, state = module.functional.quantize_4bit(weight, blocksize=p.group_size, quant_type="nf4")
    return functools.partial(module.matmul_4bit, p.input, codes.t(), state)


def quanto(*args: Any) -> Run:
    """qint2 and qint4; the latter is torch's own product where groups are of 128 and the input bfloat16."""
    p = Product(*args)
    module = importlib.import_module("optimum.quanto")
    kind = importlib.import_module("optimum.quanto.tensor.weights.qbits").WeightQBitsTensor
    rows, columns = p.shape
    scale = p.scale.to(p.input.dtype).reshape(-1, 1)
    middle = scale * (1 << (p.bits - 1))
    weight = kind.create(
        {2: module.qint2, 4: module.qint4}[p.bits], 0, p.group_size, torch.Size((rows, columns)), (columns, 1),
        _levels(p).view(-1, p.group_size), scale, middle,
    )  # fmt: skip
    return functools.partial(torch.nn.functional.linear, p.input, weight)


def peers(
    bits: int, group_size: int | None, dtype: torch.dtype, activations: str, format: str, rows: int
) -> dict[str, Provider]:
    """Those that are installed and compute this product; ``group_size`` None is one scale for each row."""
    here: dict[str, Any] = {"devices": ("cpu",), "differentiable": False}
    found: dict[str, Provider] = {}

    def add(name: str, setup: Any, *packages: str, **options: Any) -> None:
        if all(map(installed, packages)):
            found[f"peer:{name}"] = Provider(setup, **here, **options)

    own = ("onnxruntime", "onnx")
    vectors = torch.backends.cpu.get_cpu_capability() == "AVX512"  # elsewhere zentorch's products end the process
    if format == "nf4":
        if activations == "exact":
            add("bitsandbytes", bitsandbytes, "bitsandbytes")
        return found
    if format in ("S4", "S5"):
        if activations == "int8" and dtype == torch.float32:
            add("torch-dynamic", dynamic, reference=seven_bits)
        if activations == "exact" and rows == 1:
            add("cofire 4 bits", four_bits, reference=of_four_bits)
        return found
    if format != "uniform":
        return found
    if activations == "int8":
        if dtype == torch.float32 and group_size is not None and bits in (2, 4, 8):
            add("onnxruntime", functools.partial(onnxruntime, 4), *own, reference=by_group, own_threads=True)
        if group_size is None and bits == 8:
            if dtype == torch.float32:
                add("torch-dynamic", dynamic, reference=seven_bits)
            add("torchao", torchao, "torchao", reference=of_255)
            if vectors:
                add("zentorch", zentorch_dynamic, "zentorch")
        return found
    if dtype == torch.float32 and group_size is not None and bits in (2, 4, 8):
        add("onnxruntime", functools.partial(onnxruntime, 0), *own, own_threads=True)
    # in fp32 it takes half a second for 32 rows
    if bits == 4 and group_size in (32, 64, 128) and (dtype == HALF or rows <= 16):
        add("torch-int4pack", int4pack)
    if bits == 8 and group_size is None:
        add("torch-int8pack", int8pack)
        add("torchao", torchao, "torchao")
    if dtype == HALF and bits == 4 and group_size is not None and vectors:
        add("zentorch", zentorch_woq, "zentorch")
    if bits in (2, 4) and group_size is not None:
        add("quanto", quanto, "optimum.quanto")
    return found
