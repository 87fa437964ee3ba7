# SPDX-License-Identifier: Apache-2.0
"""From a dense weight to a quantised one: each way a function ``[N, K] -> QTensor``, plain torch in fp32.

A group is ``group_size`` neighbouring columns of a row. A group of zeros gets the scale 1, so nothing is divided by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cofire.names import near_matches
from cofire.ops.checks import check_integer, check_number, refuse, shape_of
from cofire.ops.clustering import kmeans1d
from cofire.ops.fake_quantize import statsq_levels
from cofire.ops.lowbit import check_bits, compute_dtype
from cofire.ops.qtensor import QTensor

__all__ = ["FP4", "NF4", "QUANTIZERS", "quantize_weight"]

#: The 4-bit NormalFloat of QLoRA (appendix E): quantiles of the normal distribution, and an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: The 4-bit float E2M1 with one sign bit, divided by its largest value, 6; in the order of its codes.
FP4 = tuple(s * v / 6 for s in (1, -1) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
#: What palettes may be stored in.
LUT_DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32)


def _groups(weight: Tensor, group_size: int) -> Tensor:
    """fp32 ``[N, G, g]``."""
    w = weight.detach().float().contiguous()  # so that sums do not depend on the strides
    return w.view(weight.shape[0], weight.shape[1] // group_size, group_size)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _pack(codes: Tensor, scale: Tensor, weight: Tensor, bits: int, group_size: int, **parts: Any) -> QTensor:
    codes = codes.clamp(0, (1 << bits) - 1).to(torch.uint8).reshape(weight.shape)
    return QTensor.from_codes(codes, scale, bits=bits, group_size=group_size, dtype=weight.dtype, **parts)


def _middle(weight: Tensor, zero: float) -> Tensor:
    return torch.full((1, 1), float(zero), device=weight.device)


def absmax(weight: Tensor, bits: int, group_size: int) -> QTensor:
    """Symmetric, the largest magnitude of a group at the end of the range; one bit: the sign, times the mean magnitude."""
    w = _groups(weight, group_size)
    if bits == 1:
        scale = _positive(2 * w.abs().mean(2))
        return _pack(w >= 0, scale, weight, bits, group_size, zero=_middle(weight, 0.5))
    half = 1 << (bits - 1)
    scale = _positive(w.abs().amax(2) / (half - 1))
    codes = (w / scale[..., None]).round() + half
    return _pack(codes, scale, weight, bits, group_size, zero=_middle(weight, half))


def _range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range that is widened to hold 0."""
    low, high, top = low.clamp(max=0), high.clamp(min=0), (1 << bits) - 1
    scale = _positive(high / top - low / top)  # the difference first might overflow
    return scale, (-low / scale).round().clamp(0, top)


def minmax(weight: Tensor, bits: int, group_size: int) -> QTensor:
    """Asymmetric, from the smallest to the largest value of a group, with an integer zero point."""
    w = _groups(weight, group_size)
    scale, zero = _range(w.amin(2), w.amax(2), bits)
    codes = (w / scale[..., None]).round() + zero[..., None]
    return _pack(codes, scale, weight, bits, group_size, zero=zero.to(torch.uint8))


def mse(weight: Tensor, bits: int, group_size: int, *, symmetric: bool = False, steps: int = 80) -> QTensor:
    """Like ``minmax`` or ``absmax``, with the range of each group cut down to where the squared error is smallest.

    Tried are 100 %, 99 %, ... of the range, ``steps`` of them. Of one symmetric bit the best is known: ``absmax``.
    """
    if steps > 100:
        refuse("quantize_weight", f"steps must be at most 100 (each cuts a hundredth of the range), got {steps}")
    if symmetric and bits == 1:
        return absmax(weight, bits, group_size)
    w = _groups(weight, group_size)
    top = (1 << bits) - 1
    half = 1 << (bits - 1)
    low, high = w.amin(2), w.amax(2)
    magnitude = w.abs().amax(2)
    best = scale = zero = torch.empty(0)
    for i in range(steps):
        keep = 1 - i / 100
        if symmetric:
            s = _positive(keep * magnitude / (half - 1))
            z = torch.full_like(s, half)
        else:
            s, z = _range(keep * low, keep * high, bits)
        error = ((((w / s[..., None] + z[..., None]).round().clamp(0, top)) - z[..., None]) * s[..., None] - w).square()
        error = error.sum(2)
        if i == 0:
            best, scale, zero = error, s, z
        else:
            better = error < best
            best, scale, zero = (torch.where(better, *pair) for pair in ((error, best), (s, scale), (z, zero)))
    codes = (w / scale[..., None] + zero[..., None]).round()
    kept = _middle(weight, half) if symmetric else zero.to(torch.uint8)
    return _pack(codes, scale, weight, bits, group_size, zero=kept)


def hqq(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> QTensor:
    """Half-quadratic quantisation: a zero point that is robust to outliers, by alternating a shrinkage and a mean.

    ``p`` is the norm of the errors that are made small, ``beta`` the weight of the splitting, which grows by ``growth``.
    """
    w = _groups(weight, group_size)
    low, high = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
    scale = _positive((high - low) / ((1 << bits) - 1))
    zero = -low / scale
    top = (1 << bits) - 1
    codes = best = zero
    error = torch.full_like(scale, torch.inf)
    for _ in range(steps):
        codes = (w / scale + zero).round().clamp(0, top)
        residual = w - scale * (codes - zero)
        found = residual.abs().pow(p).mean(2, keepdim=True)
        best = torch.where(found < error, zero, best)
        error = torch.minimum(found, error)
        magnitude = residual.abs()
        shrunk = residual.sign() * (magnitude - magnitude.clamp(min=1e-12).pow(p - 1) / beta).clamp(min=0)
        zero = (codes - (w - shrunk) / scale).mean(2, keepdim=True)
        beta *= growth
    codes = (w / scale + best).round()
    return _pack(codes, scale[..., 0], weight, bits, group_size, zero=best[..., 0].contiguous())


def statsq(weight: Tensor, bits: int, group_size: int) -> QTensor:
    """StatsQ of OFQ: mid-rise levels on twice the mean magnitude."""
    w = _groups(weight, group_size)
    half = 1 << (bits - 1)
    levels, scale = statsq_levels(w, bits)
    return _pack(levels + half, scale[..., 0] / half, weight, bits, group_size, zero=_middle(weight, half - 0.5))


def _check_hessian(hessian: Any, columns: int) -> None:
    name = "quantize_weight"
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        got = hessian.dtype if isinstance(hessian, Tensor) else type(hessian).__name__
        raise TypeError(f"{name}: hessian must be a floating-point tensor, got {got}")
    if list(hessian.shape) != [columns, columns]:
        refuse(name, f"hessian must have shape [{columns}, {columns}], got {shape_of(hessian)}")
    wrong = int((~hessian.isfinite()).sum())
    if wrong:
        refuse(name, f"hessian must be finite, got {wrong} values that are not, of {hessian.numel()}")
    if not bool(hessian.diagonal().any()):  # the whole weight would count for nothing
        refuse(name, "hessian must be of inputs that came, got a diagonal of zeros")


def inverse_factor(operator: str, hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of ``hessian``, fp64 ``[K, K]``, whose diagonal is changed: ``damping`` times
    its mean is added."""
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(hessian)
    if int(info):
        refuse(operator, f"hessian must be positive definite with damping {damping}; it is not: raise damping")
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def gptq(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    hessian: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    block: int = 128,
) -> QTensor:
    """GPTQ: column by column, each column's rounding error is made up for by the columns that follow.

    ``hessian`` is ``[K, K]``, the sum of ``x x^T`` over the layer's inputs. ``act_order`` takes the columns with the largest
    inputs first; groups are then formed in that order, and the result carries it as ``perm``. ``block`` columns pass their
    errors on together.
    """
    rows, columns = weight.shape
    if hessian is None:
        refuse("quantize_weight", "method gptq needs hessian, the sum of x x^T over the inputs of the layer")
    _check_hessian(hessian, columns)
    w, h = weight.detach().float().clone(), hessian.detach().to(weight.device, torch.float64, copy=True)
    dead = h.diagonal() == 0  # an input that never came: its weights do not matter
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    perm = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else None
    if perm is not None:
        w, h = w[:, perm], h[perm][:, perm]
    # Row k tells how to make up for the error of column k.
    upper = inverse_factor("quantize_weight", h, damping).float()
    codes = torch.empty_like(w)
    scales, zeros = [], []
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    scale = zero = torch.empty(0)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros(rows, end - start, device=w.device)
        for k in range(start, end):
            if k % group_size == 0:
                now = w[:, k : k + group_size].clone()
                # what this block has not passed on yet
                ahead = slice(max(end, k), k + group_size)
                if k + group_size > end and k > start:
                    now[:, end - k :] -= errors[:, : k - start] @ upper[start:k, ahead]
                if symmetric:
                    scale = _positive(now.abs().amax(1) / max(half - 1, 0.5))
                    zero = torch.full_like(scale, half if bits > 1 else 0.5)
                else:
                    scale, zero = _range(now.amin(1), now.amax(1), bits)
                scales.append(scale)
                zeros.append(zero)
            q = (w[:, k] / scale + zero).round().clamp(0, top)
            codes[:, k] = q
            error = (w[:, k] - (q - zero) * scale) / upper[k, k]
            w[:, k + 1 : end] -= error[:, None] * upper[k, k + 1 : end]
            errors[:, k - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    all_scales = torch.stack(scales, 1)
    kept = _middle(weight, half if bits > 1 else 0.5)
    if not symmetric:
        kept = torch.stack(zeros, 1).to(torch.uint8)
    return _pack(codes, all_scales, weight, bits, group_size, zero=kept, perm=perm)


def _table(weight: Tensor, bits: int, group_size: int, values: tuple[float, ...], name: str) -> QTensor:
    if bits != 4:
        refuse("quantize_weight", f"method {name} has 4 bits, got bits={bits}")
    w = _groups(weight, group_size)
    table = torch.tensor(values, device=weight.device)
    scale = _positive(w.abs().amax(2))
    ordered, place = table.sort(stable=True)
    nearest = torch.bucketize((w / scale[..., None]), (ordered[1:] + ordered[:-1]) / 2)
    return _pack(place[nearest], scale, weight, bits, group_size, lut=table[None])


def nf4(weight: Tensor, bits: int, group_size: int) -> QTensor:
    """The nearest value of the 4-bit NormalFloat, times the largest magnitude of the group."""
    return _table(weight, bits, group_size, NF4, "nf4")


def fp4(weight: Tensor, bits: int, group_size: int) -> QTensor:
    """The nearest value of the 4-bit float E2M1, times the largest magnitude of the group."""
    return _table(weight, bits, group_size, FP4, "fp4")


def byte_tables(operator: str, lut: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of floats ``[P, K]`` or ``[P, K, d]`` as signed bytes, and the factor of each table, ``[P]``.

    The largest magnitude of a table becomes 127, and no entry moves by more than half a factor. Equal entries stay equal,
    and sorted ones sorted; a table of zeros has the factor 1.
    """
    wrong = int((~lut.isfinite()).sum())
    if wrong:
        refuse(operator, f"lut must be finite to be rounded to int8, got {wrong} values that are not, of {lut.numel()}")
    table = lut.detach().to(compute_dtype(lut))
    factor = _positive(table.flatten(1).abs().amax(1) / 127)
    each = factor.view(-1, *[1] * (table.dim() - 1))
    return (table / each).round().clamp(-127, 127).to(torch.int8), factor


def palette(
    weight: Tensor, bits: int, group_size: int, *, group_rows: int | None = None, lut_dtype: torch.dtype | None = None
) -> QTensor:
    """Optimal k-means: the ``2^bits`` values of least squared error, of all rows or of every ``group_rows`` rows.

    The palettes are then rounded to ``lut_dtype``, int8 with a factor that is the scale of the rows, and each weight takes
    the nearest of the rounded values.
    """
    rows, columns = weight.shape
    if group_size != columns:
        refuse(
            "quantize_weight",
            f"method palette has no groups of columns: group_size must be {columns}, got {group_size}",
        )
    if lut_dtype is not None and lut_dtype not in LUT_DTYPES:
        known = ", ".join(map(str, LUT_DTYPES))
        raise TypeError(f"quantize_weight: lut_dtype must be one of {known}, or None, got {lut_dtype!r}")
    group_rows = max(rows, 1) if group_rows is None else group_rows
    check_integer("quantize_weight", group_rows=group_rows)
    if group_rows < 1:
        refuse("quantize_weight", f"group_rows must be at least 1, got {group_rows}")
    count = -(-rows // group_rows)
    if count > 1 and -(-rows // count) != group_rows:  # a table is found by its row's share of all rows
        refuse(
            "quantize_weight",
            f"group_rows must divide the {rows} rows equally, but for a last short block; {count} palettes have "
            f"{-(-rows // count)} rows each, got {group_rows}",
        )
    w = weight.detach().float().contiguous()
    parts = w.split(group_rows) if rows else ()
    tables = []
    for part in parts:
        centroids = kmeans1d(part.flatten(), 1 << bits)[0].flatten().float().sort().values
        tables.append(torch.cat((centroids, centroids[-1:].expand((1 << bits) - centroids.numel()))))
    lut = values = torch.stack(tables) if tables else w.new_zeros(1, 1 << bits)
    scale: Tensor | None = None
    if lut_dtype == torch.int8:
        lut, factor = byte_tables("quantize_weight", lut)
        values = lut.float() * factor[:, None]
        scale = factor.repeat_interleave(group_rows)[:rows, None].contiguous()
    elif lut_dtype is not None:
        lut = lut.to(lut_dtype)
        values = lut.float()
    codes = [torch.bucketize(part, (v[1:] + v[:-1]) / 2) for part, v in zip(parts, values)]
    found = torch.cat(codes) if codes else w.long()
    return QTensor.from_codes(found, scale, bits=bits, group_size=columns, lut=lut, dtype=weight.dtype)


QUANTIZERS: dict[str, Callable[..., QTensor]] = {
    f.__name__: f for f in (absmax, minmax, mse, hqq, statsq, gptq, nf4, fp4, palette)
}


def check_method(operator: str, method: str) -> None:
    if method not in QUANTIZERS:
        refuse(operator, f"there is no method {method!r}{near_matches(str(method), list(QUANTIZERS))}")


def _check_option(operator: str, option: str, value: Any, default: Any) -> None:
    """As the default is: a switch, a count, or a number that is not negative."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{operator}: {option} must be True or False, got {value!r}")
    elif isinstance(default, int):
        check_integer(operator, **{option: value})
        if value < 1:
            refuse(operator, f"{option} must be at least 1, got {value}")
    elif isinstance(default, float):
        check_number(operator, **{option: value})
        if not 0 <= value < math.inf:
            refuse(operator, f"{option} must be finite and not negative, got {value}")


def quantize_weight(
    weight: Tensor, method: str = "absmax", *, bits: int = 4, group_size: int | None = 128, **options: Any
) -> QTensor:
    """Quantise a dense weight.

    Args:
        weight: any float ``[N, K]``, finite.
        method: its name, and what ``options`` it has:

            - "absmax": symmetric, up to the largest magnitude of a group.
            - "minmax": asymmetric, with an integer zero point.
            - "mse": the range of each group is cut to where the squared error is smallest. ``symmetric`` (False); ``steps``
              (80): how many hundredths of the range are tried.
            - "hqq": a float zero point robust to outliers, found by shrinking errors and taking means in turn. ``p`` (0.7):
              the norm of the errors; ``beta`` (10.0): weight of the splitting, times ``growth`` (1.01) after each of
              ``steps`` (20).
            - "statsq": mid-rise levels on twice the mean magnitude.
            - "gptq": column by column, later columns make up for the error of earlier ones. ``hessian``: ``[K, K]``, the
              sum of ``x x^T`` over the layer's inputs, which it needs; ``damping`` (0.01): how much of its mean diagonal
              is added to it; ``act_order`` (False): columns of the largest inputs first; ``symmetric`` (False); ``block``
              (128): columns whose errors are passed on together, a matter of speed.
            - "nf4", "fp4": the nearest of the 4-bit NormalFloats, or of the floats E2M1.
            - "palette": optimal 1-D k-means. ``group_rows`` (None: all): rows that share a palette; ``lut_dtype`` (None:
              fp32): of the palettes. ``torch.int8`` is what int8 activations of :func:`cofire.ops.qlinear` need; its
              factors become the scales, and weights take the nearest of the rounded values.
        bits: per weight, 1 to 8; 4 for "nf4" and "fp4".
        group_size: columns that share a scale; divides K. None, or -1: whole rows (what "palette" needs).
        options: of the method.

    Returns:
        A :class:`~cofire.ops.QTensor` that stands for a weight of the same shape and dtype.

    Raises:
        TypeError: ``weight`` is no float tensor, or an option that the method does not have, or of another type.
        ValueError: another shape, a weight that is not finite, bits or a group size that do not fit, an unknown method.

    Example:
        >>> q = quantize_weight(torch.tensor([[-1.0, 0.5, 0.1, 1.0]]), "minmax", bits=2, group_size=None)
        >>> [round(v, 3) for v in q.dequantize().flatten().tolist()]
        [-1.333, 0.667, 0.0, 0.667]
        >>> q = quantize_weight(torch.tensor([[-0.5, 0.0, 0.0, 2.0]]), "palette", group_size=None, bits=2, lut_dtype=torch.int8)
        >>> q.lut.tolist(), round(float(q.scale) * 127, 3)
        ([[-32, 0, 127, 127]], 2.0)

    Source:
        absmax, minmax: Jacob et al. 2018 (1712.05877); mse: Nagel et al. 2021 (2106.08295), section 3.1, with the 80
        hundredths of Hu et al. 2025 (OSTQuant, 2501.13987); HQQ: Badri and Shaji 2023; StatsQ: Liu et al. 2023 (OFQ,
        2302.02210), section 4.1; GPTQ: Frantar et al. 2023 (2210.17323), algorithm 1; NF4: Dettmers et al. 2023 (QLoRA,
        2305.14314), section 3; FP4: Rouhani et al. 2023 (2310.10537), the element E2M1 of the OCP Microscaling Formats
        1.0; palettes: Cho et al. 2022 (DKM, 2108.12659), in int8 as ``lut_dtype`` of coremltools.
    """
    name = "quantize_weight"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: weight must be a floating-point tensor, got {got}")
    if weight.dim() != 2:
        refuse(name, f"weight must have shape [N, K], got {shape_of(weight)}")
    check_method(name, method)
    size = check_bits(name, bits, group_size, weight.shape[1])
    wrong = int((~weight.float().isfinite()).sum())  # in fp32, which is what is computed with
    if wrong:
        refuse(name, f"weight must be finite, got {wrong} values that are not, of {weight.numel()}")
    function = QUANTIZERS[method]
    known = function.__kwdefaults__ or {}
    for option, value in options.items():
        if option not in known:
            raise TypeError(f"{name}: method {method} has no option {option!r}{near_matches(option, known)}")
        _check_option(name, option, value, known[option])
    with torch.no_grad():
        return function(weight, int(bits), size, **options)
