# SPDX-License-Identifier: Apache-2.0
"""Layers of shifts and additions: linear layers of powers of two, attention with binary queries and keys, and a mixture.

In training every layer computes with dense matrices that hold the rounded weights, so that products, their gradients and
``torch.compile`` are those of torch; in evaluation it computes with packed weights, made when they are first needed and
made anew when a parameter has changed.

Source: You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer", NeurIPS 2023;
Elhoushi et al., "DeepShift: Towards Multiplication-Less Neural Networks", CVPR workshops 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cofire import ops
from cofire.nn.lowbit import QuantLinear, dense_weight
from cofire.ops import QTensor
from cofire.ops.checks import check_choice, check_float, check_integer, check_number, refuse, shape_of
from cofire.ops.lowbit import _seen
from cofire.ops.shift_add import FORMATS, LOWEST, powers_of_two
from cofire.ops.shift_add_attention import MOST_BITS, _distances, _normalised, _sigma, attention_rows, bits_of
from cofire.timing import interleaved

__all__ = ["BinaryLinearAttention", "MixtureOfPrimitives", "PackedMixture", "ShiftLinear"]

ACTIVATIONS = ("exact", "int8")
ENCODERS = ("hash", "binary")
#: The least standard deviation of a router's noise.
LEAST_NOISE = 1e-2


# ------------------------------------------------------------------------------------------------ powers of two


class _Derived:
    """What was made of tensors, kept as long as none of them changes."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, Any]] = {}

    def get(self, name: str, of: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling() or any(t.is_inference() for t in of):
            return make()
        key = (torch.is_inference_mode_enabled(), *((t.data_ptr(), t._version) for t in of))
        if name not in self.kept or self.kept[name][0] != key:
            self.kept[name] = (key, make())
        return self.kept[name][1]

    def __deepcopy__(self, memo: Any) -> _Derived:
        return _Derived()

    def __reduce__(self) -> Any:
        return _Derived, ()


class ShiftLinear(nn.Module):
    """A linear layer whose weights are powers of two, ``W = s 2^p`` with s in -1, 0, 1 and p in -14 to 0.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``; it starts as one, rounded.
        format: of the packed weight: "S5" and "S8" hold every such weight, "S4" seven octaves of each row.
        activations: "exact", or "int8" (S4 alone): each row of the input is rounded to 8 bits.

    Attributes:
        shift: parameter ``[out_features, in_features]``; clamped to -14 to 0, then rounded, it is p.
        sign: parameter of the same shape; rounded, its sign is s. Within a half of 0 the weight is *dead*: it is 0, and its
            shift gets no gradient. Neither wants weight decay, which makes weights larger and then dead.
        bias: parameter ``[out_features]``, or None.

    Gradients are straight-through: with ``G = dY^T X``, ``d sign = G`` and ``d shift = ln 2 * G * W``. A shift beyond its
    range goes on receiving them; :meth:`clamp_`, after each step of the optimiser, keeps it inside.

    Shape: as ``nn.Linear``.

    Raises:
        TypeError: an input that is no floating-point tensor.
        ValueError: an unknown format, int8 activations without S4.

    Example:
        >>> layer = ShiftLinear.from_dense(nn.Linear(64, 8))
        >>> layer(torch.rand(3, 64)).shape, layer.dead
        (torch.Size([3, 8]), 0)

    Source: Elhoushi et al. 2021 (DeepShift, 1905.13298), section 3.2; You et al. 2023 (ShiftAddViT, 2306.06446), section 4.2.
    """

    shift: nn.Parameter
    sign: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "S5",
        activations: str = "exact",
    ) -> None:
        super().__init__()
        check_integer("ShiftLinear", in_features=in_features, out_features=out_features)
        check_choice("ShiftLinear", "format", format, FORMATS)
        check_choice("ShiftLinear", "activations", activations, ACTIVATIONS)
        if activations == "int8" and format != "S4":
            refuse("ShiftLinear", f"int8 activations need format S4, got {format!r}")
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activations = format, activations
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.shift = nn.Parameter(torch.empty(out_features, in_features, **where))
        self.sign = nn.Parameter(torch.empty(out_features, in_features, **where))
        self.bias = nn.Parameter(torch.empty(out_features, **where)) if bias else None
        self._derived = _Derived()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The weights of a new ``nn.Linear``, rounded; signs are -1 and 1."""
        if self.shift.is_meta:
            return
        weight = torch.empty_like(self.shift)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        shift, sign = ops.shift_from_weight(weight)
        self.shift.copy_(shift)
        self.sign.copy_(torch.where(sign == 0, 1, sign))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.in_features, 1))
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_dense(
        cls, linear: nn.Module, *, format: str = "S5", activations: str = "exact", octaves: int = 0
    ) -> ShiftLinear:
        """From a dense layer: the nearest exponents, the signs, and a copy of the bias. Weights that are 0 start dead.

        Args:
            linear: an ``nn.Linear``, or GPT-2's ``Conv1D``.
            format, activations: as in the constructor.
            octaves: added to all exponents, and the bias scaled alike.
        """
        weight, bias = dense_weight(linear)
        options: dict[str, Any] = {"format": format, "activations": activations, "dtype": weight.dtype}
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, "meta", **options)
        shift, sign = ops.shift_from_weight(weight * 2.0**octaves)
        layer.shift, layer.sign = nn.Parameter(shift), nn.Parameter(sign)
        layer.bias = None if bias is None else nn.Parameter(bias * 2.0**octaves)
        return layer.train(linear.training)

    # ---------------------------------------------------------------------------------------------- its weight

    @property
    def weight(self) -> Tensor:
        """The weight that the layer applies, ``[out_features, in_features]``, anew with each call; differentiable."""
        return powers_of_two(self.shift, self.sign, self.format == "S4")

    @property
    def qweight(self) -> QTensor:
        """The packed weight, kept as long as neither shift nor sign changes."""
        found: QTensor = self._derived.get("packed", (self.shift, self.sign), self._packed)
        return found

    @torch.no_grad()
    def decoded(self) -> Tensor:
        """:attr:`weight` without a gradient, kept as long as neither shift nor sign changes."""
        found: Tensor = self._derived.get("decoded", (self.shift, self.sign), lambda: self.weight)
        return found

    @torch.no_grad()
    def _packed(self) -> QTensor:
        quantized = ops.shift_quantize(self.shift, self.sign)
        return ops.pack_shift(*quantized, format=self.format, dtype=self.shift.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and of the bias."""
        return self.qweight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def dead(self) -> int:
        """How many weights are 0 because of their sign."""
        return self.statistics()["dead"]

    @torch.no_grad()
    def statistics(self) -> dict[str, int]:
        """``weights``, ``dead`` and ``clipped``: see :func:`cofire.ops.shift_statistics`."""
        return ops.shift_statistics(*ops.shift_quantize(self.shift, self.sign))

    @torch.no_grad()
    def clamp_(self) -> ShiftLinear:
        """Put shifts that an optimiser moved out of -14 to 0 back to its ends."""
        self.shift.clamp_(LOWEST, 0)
        return self

    def pack(self) -> QuantLinear:
        """The form for inference, with the packed weight alone and a copy of the bias."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return QuantLinear.from_qtensor(self._packed(), bias, activations=self.activations).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        check_float("ShiftLinear", input=input)
        if self.training or torch.compiler.is_compiling() or self.shift.is_inference():
            return F.linear(_seen(input, self.activations), self.weight, self.bias)
        latent = (self.shift, self.sign) if self._is_trained() else None
        return ops.shift_linear(input, self.qweight, self.bias, latent=latent, activations=self.activations)

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and (self.shift.requires_grad or self.sign.requires_grad)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, activations={self.activations}"
        )


# ----------------------------------------------------------------------------------------------------- attention


class BinaryLinearAttention(nn.Module):
    """Self-attention with binary codes for queries and keys: sums of values that the codes select, linear in the tokens.

    A head's output is ``t / |t|`` with ``t = V / 2 + Q K^T V / pi``, plus a depthwise convolution of the values along the
    tokens; Q and K are codes of zeros and ones.

    Args:
        embed_dim, num_heads, bias, device, dtype: as in ``nn.MultiheadAttention``.
        encoder: "hash": query and key share a projection ``qk`` and a kernelised Hamming hash, which :meth:`fit` learns
            from a batch. "binary": projections ``q`` and ``k``, whose features are compared with running thresholds, one
            per head, in training and in evaluation: what is computed for a sample depends on no other sample.
        bits: of a code, for "hash"; "binary" has a bit for each feature of a head, at most 64.
        anchors: tokens that the hash compares with.
        topk: so many most and least similar tokens of each token are what the hash is fitted to.
        kernel_size: odd, of the convolution; 0: none.
        momentum: of the running thresholds.
        project: with a projection ``proj`` of the result.
        check: refuse queries, keys, values and sums ``t`` that are not finite, and queries, keys and sums that are 0, which have
            no direction; it computes the sums once more and waits for the device. Without it, what is not finite stays so, a
            query or key of 0 has the code of a direction of zeros, and a sum of 0 stays 0.

    Attributes:
        anchors, center, projection: buffers of the hash, ``[heads, m, d]``, ``[heads, m]``, ``[heads, bits, m]``.
        threshold: buffer ``[2, heads]``, of queries and of keys, for "binary"; :meth:`step` moves it.
        threshold_sum, threshold_count: buffers: the means of the forwards in training since the last step.
        is_fitted: whether :meth:`fit` was called; kept in the buffer ``fitted``.

    Shape: ``[B, N, embed_dim]``, unchanged. Integers and pairs of them behind the input (the sizes of the grid, as pyramid
    transformers give them) are accepted and not needed.

    Raises:
        RuntimeError: a forward before :meth:`fit`.
        TypeError, ValueError: arguments out of range, an input of another type or width, a mask.

    Example:
        >>> layer, x = BinaryLinearAttention(32, 2, bits=8, anchors=6, topk=4), torch.randn(4, 10, 32)
        >>> layer.fit(x)(x).shape
        torch.Size([4, 10, 32])

    Source: You et al. 2023 (ShiftAddViT, 2306.06446), section 4.1; the hash: Liu et al. 2012 (Supervised hashing with
    kernels), section 3.
    """

    fitted: Tensor
    anchors: Tensor
    center: Tensor
    projection: Tensor
    threshold: Tensor
    threshold_sum: Tensor
    threshold_count: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        encoder: str = "hash",
        bits: int = 16,
        anchors: int = 25,
        topk: int = 10,
        kernel_size: int = 9,
        momentum: float = 0.1,
        project: bool = True,
        check: bool = False,
    ) -> None:
        super().__init__()
        check_integer("BinaryLinearAttention", embed_dim=embed_dim, num_heads=num_heads)
        if num_heads < 1 or embed_dim % num_heads:
            refuse("BinaryLinearAttention", f"embed_dim must be a multiple of num_heads ({num_heads}), got {embed_dim}")
        head = embed_dim // num_heads
        check_encoder("BinaryLinearAttention", encoder, bits, anchors, topk, kernel_size, momentum)
        if encoder == "binary" and head > MOST_BITS:
            refuse(
                "BinaryLinearAttention",
                f"encoder 'binary' has a bit for each of the {head} features of a head, at most {MOST_BITS}; "
                "take more heads, or encoder 'hash'",
            )
        self.embed_dim, self.num_heads, self.encoder = embed_dim, num_heads, encoder
        self.bits = bits if encoder == "hash" else head
        self.topk, self.kernel_size, self.momentum, self.check = topk, kernel_size, momentum, check
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if encoder == "hash":
            self.qk = nn.Linear(embed_dim, embed_dim, bias, **where)
        else:
            self.q = nn.Linear(embed_dim, embed_dim, bias, **where)
            self.k = nn.Linear(embed_dim, embed_dim, bias, **where)
        self.v = nn.Linear(embed_dim, embed_dim, bias, **where)
        self.proj = nn.Linear(embed_dim, embed_dim, bias, **where) if project else None
        self.mix = nn.Parameter(torch.empty(num_heads, kernel_size, **where)) if kernel_size else None
        if self.mix is not None:
            bound = 1 / math.sqrt(kernel_size)
            nn.init.uniform_(self.mix, -bound, bound)
        if encoder == "hash":
            self.register_buffer("anchors", torch.zeros(num_heads, anchors, head, **where))
            self.register_buffer("center", torch.zeros(num_heads, anchors, **where))
            self.register_buffer("projection", torch.zeros(num_heads, bits, anchors, **where))
        else:
            self.register_buffer("threshold", torch.zeros(2, num_heads, device=device))
            self.register_buffer("threshold_sum", torch.zeros(2, num_heads, device=device))
            self.register_buffer("threshold_count", torch.zeros((), device=device))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.uint8, device=device))
        self._fitted = False
        #: Set by :meth:`cofire.methods.ShiftAddViT.finalize`.
        self.deployed = False

    # ---------------------------------------------------------------------------------------------- its encoder

    @property
    def is_fitted(self) -> bool:
        return self._fitted

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.fitted.is_meta:
            self._fitted = bool(self.fitted)

    @torch.no_grad()
    def fit(self, input: Tensor, *, tokens: int = 512, iterations: int = 100, seed: int = 0) -> BinaryLinearAttention:
        """Learn the hash (or set the thresholds) by a batch of inputs.

        Anchors are tokens of the batch, drawn without regard to the sample that they are of. Of as many as ``tokens``
        others, each with its ``topk`` most similar ones is to have equal codes, and opposite ones with as many least similar
        ones; bits are found one after the other, from the best direction of the relaxed problem by gradient ascent, kept
        where the code itself improves. In a process group every process has to call it, and gets what the first one found.

        Args:
            input: float ``[B, N, embed_dim]``.
            tokens, iterations: the most tokens to fit to, and the steps of each bit.
            seed: of the choice of tokens.

        Returns:
            The layer.

        Raises:
            ValueError: fewer tokens in the batch than anchors, or than twice ``topk``.
        """
        self._check(input)
        if self.encoder == "hash":
            z = self._heads(self.qk(input)).float()
            self._fit_hash(_normalised(z, 1e-6), tokens, iterations, seed)
            found = [self.anchors, self.center, self.projection]
        else:
            pair = (self._heads(self.q(input)), self._heads(self.k(input)))
            self.threshold.copy_(torch.stack([_normalised(x.float(), 1e-6).mean((0, 2, 3)) for x in pair]))
            found = [self.threshold]
        if dist.is_available() and dist.is_initialized():
            for buffer in found:
                dist.broadcast(buffer, 0)
        self.fitted.fill_(1)
        self._fitted = True
        return self

    def _fit_hash(self, unit: Tensor, tokens: int, iterations: int, seed: int) -> None:
        rows = unit.transpose(0, 1).flatten(1, 2)  # [heads, tokens of the batch, d]
        count, m = rows.shape[1], self.anchors.shape[1]
        for what, needed in ((f"its {m} anchors", m), (f"twice its topk ({self.topk})", 2 * self.topk)):
            if count < needed:
                refuse("BinaryLinearAttention.fit", f"input must have at least as many tokens as {what}, got {count}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(rows.device)
        anchors = rows[:, order[:m]].contiguous()
        sigma = _sigma(unit, anchors)
        kernel = torch.exp(-_distances(unit, anchors) / (2 * sigma[..., None, None])).transpose(0, 1).flatten(1, 2)
        center = kernel.mean(1)
        chosen = order[-min(count, max(tokens, 2 * self.topk)) :]
        projection = supervised_hash(
            rows[:, chosen], kernel[:, chosen] - center[:, None], self.bits, self.topk, iterations
        )
        for buffer, value in ((self.anchors, anchors), (self.center, center), (self.projection, projection)):
            buffer.copy_(value)

    def encode(self, input: Tensor) -> Tensor:
        """The codes of queries (and keys, of the hash) ``[B, heads, N]``.

        Raises:
            RuntimeError: not fitted.
        """
        self._check(input)
        self._require_fitted()
        if self.encoder == "hash":
            return ops.hash_encode(self._heads(self.qk(input)), self.anchors, self.center, self.projection)[0]
        return ops.binary_encode(self._heads(self.q(input)), self.threshold[0])[0]

    @torch.no_grad()
    def step(self) -> None:
        """Move the running thresholds to the means of the forwards in training since the last call.

        Call it after each step of the optimiser (:class:`cofire.methods.ShiftAddViT` does); in a process group every
        process has to.
        """
        if self.encoder == "hash":
            return
        if dist.is_available() and dist.is_initialized():
            for buffer in (self.threshold_sum, self.threshold_count):
                dist.all_reduce(buffer)
        seen = self.threshold_count > 0
        mean = self.threshold_sum / self.threshold_count.clamp(min=1)
        self.threshold.copy_(torch.where(seen, self.threshold.lerp(mean, self.momentum), self.threshold))
        self.threshold_sum.zero_()
        self.threshold_count.zero_()

    # --------------------------------------------------------------------------------------------- attention

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return heads

    def _check(self, input: Tensor) -> None:
        check_float("BinaryLinearAttention", input=input)
        if input.dim() != 3 or input.shape[2] != self.embed_dim:
            refuse("BinaryLinearAttention", f"input must have shape [B, N, {self.embed_dim}], got {shape_of(input)}")

    def _require_fitted(self) -> None:
        if not self._fitted:
            raise RuntimeError(
                "BinaryLinearAttention: the encoder knows no data yet: call fit(x) with a batch of inputs, or load the state "
                "of a layer that was fitted"
            )

    def _codes(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and links of queries and keys."""
        if self.encoder == "hash":
            z = self._heads(self.qk(x))
            self._examine(z, "queries and keys")
            codes, link = ops.hash_encode(z, self.anchors, self.center, self.projection)
            link = link.to(dtype)
            return codes, codes, link, link
        query, key = self._heads(self.q(x)), self._heads(self.k(x))
        self._examine(query, "queries")
        self._examine(key, "keys")
        q, q_mean, q_link = ops.binary_encode(query, self.threshold[0])
        k, k_mean, k_link = ops.binary_encode(key, self.threshold[1])
        if self.training and not self.deployed:
            with torch.no_grad():
                self.threshold_sum += torch.stack((q_mean, k_mean))
                self.threshold_count += 1
        return q, k, q_link.to(dtype), k_link.to(dtype)

    def _examine(self, rows: Tensor, what: str, zero: bool = False) -> None:
        if not self.check:
            return
        norm = torch.linalg.vector_norm(rows.detach(), dim=-1)
        wrong = int((~norm.isfinite()).sum() if zero else (~norm.isfinite() | (norm == 0)).sum())
        if wrong:
            kind = "finite" if zero else "finite and not 0"
            refuse("BinaryLinearAttention", f"{what} must be {kind}, got {wrong} rows that are not, of {norm.numel()}")

    def forward(self, input: Tensor, *size: Any) -> Tensor:
        self._check(input)
        for given in size:
            if not (given is None or isinstance(given, int) or _is_pair(given)):
                what = type(given).__name__
                raise TypeError(
                    f"BinaryLinearAttention: takes sizes of a grid beside the input, and no mask; got {what}"
                )
        self._require_fitted()
        v = self._heads(self.v(input))
        self._examine(v, "values", zero=True)
        q, k, q_link, k_link = self._codes(input, v.dtype)
        if self.check:
            with torch.no_grad():
                wide = torch.promote_types(v.dtype, torch.float32)
                q_bits, k_bits = (bits_of(codes, None, self.bits, wide) for codes in (q, k))
                self._examine(attention_rows(q_bits, k_bits, v.to(wide))[1], "sums of values")
        mix = None if self.mix is None else self.mix.to(v.dtype)
        links = (q_link, k_link) if q_link.requires_grad or k_link.requires_grad else (None, None)
        y = ops.binary_linear_attention(q, k, v, mix, bits=self.bits, query_link=links[0], key_link=links[1])
        y = y.transpose(1, 2).flatten(2)
        return y if self.proj is None else cast(Tensor, self.proj(y))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, encoder={self.encoder}, bits={self.bits}, "
            f"kernel_size={self.kernel_size}"
        )


def check_encoder(
    where: str, encoder: str, bits: int, anchors: int, topk: int, kernel_size: int, momentum: float
) -> None:
    """The sentences of everything that describes an attention beside its sizes."""
    check_choice(where, "encoder", encoder, ENCODERS)
    check_integer(where, bits=bits, anchors=anchors, topk=topk, kernel_size=kernel_size)
    if not 1 <= bits <= MOST_BITS:
        refuse(where, f"bits must be between 1 and {MOST_BITS}, got {bits}")
    for name, value in (("anchors", anchors), ("topk", topk)):
        if value < 1:
            refuse(where, f"{name} must be at least 1, got {value}")
    if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
        refuse(where, f"kernel_size must be odd, or 0 for no convolution, got {kernel_size}")
    check_number(where, momentum=momentum)
    if not 0 < momentum <= 1:
        refuse(where, f"momentum must be in (0, 1], got {momentum}")


def _is_pair(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and all(isinstance(n, int) for n in x)


@torch.no_grad()
def supervised_hash(rows: Tensor, features: Tensor, bits: int, topk: int, iterations: int = 100) -> Tensor:
    """Directions whose signs, of the features, are alike where rows are similar.

    Args:
        rows: fp32 ``[H, n, d]``, unit rows: what says how similar tokens are.
        features: fp32 ``[H, n, m]``: what a hash sees of them.
        bits: directions to find, one after the other, each to explain what those before it leave.
        topk: the most similar tokens of each are to have equal bits, as many least similar ones opposite ones.
        iterations: steps of gradient ascent (rate 5e-4, Nesterov momentum 0.9) on the relaxed problem.

    Returns:
        fp32 ``[H, bits, m]``.
    """

    def each(matrices: Tensor, vectors: Tensor) -> Tensor:
        # One by one: a batched product with vectors is several times slower on a CPU.
        return torch.stack([a @ x for a, x in zip(matrices, vectors, strict=True)])

    n, m = features.shape[1:]
    similarity = rows @ rows.transpose(1, 2)
    target = torch.zeros_like(similarity)
    target.scatter_(2, similarity.topk(topk, 2, largest=False).indices, -1.0)
    target.scatter_(2, similarity.topk(topk, 2).indices, 1.0)
    target = bits * (target + target.transpose(1, 2)) / 2  # the quadratic form is that of the symmetric part
    gram = features.transpose(1, 2) @ features
    ridge = 1e-4 * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    chol = torch.linalg.cholesky(gram + ridge[:, None, None] * torch.eye(m, device=gram.device))

    transposed = features.transpose(1, 2)

    def product(a: Tensor) -> Tensor:
        return each(features, a)

    def hard(a: Tensor) -> Tensor:
        return torch.where(product(a) > 0, 1.0, -1.0)

    def applied(y: Tensor) -> Tensor:
        return each(target, y)

    found = []
    for _ in range(bits):
        inner = transposed @ (target @ features)
        inner = torch.linalg.solve_triangular(chol, inner, upper=False)
        inner = torch.linalg.solve_triangular(chol, inner.transpose(1, 2), upper=False)
        top = torch.linalg.eigh((inner + inner.transpose(1, 2)) / 2).eigenvectors[..., -1:]
        start = torch.linalg.solve_triangular(chol.transpose(1, 2), top, upper=True)[..., 0]
        start = start * (math.sqrt(n) / torch.linalg.vector_norm(product(start), dim=1, keepdim=True).clamp(min=1e-12))
        a, velocity = start.clone(), torch.zeros_like(start)
        for _ in range(iterations):
            t = torch.tanh(product(a) / 2)  # 2 sigmoid - 1
            # of -(1 / (n bits)) t^T S t, to descend on
            slope = -(applied(t) * (1 - t * t)) / (n * bits)
            gradient = each(transposed, slope)
            velocity = 0.9 * velocity + gradient
            a = a - 5e-4 * (gradient + 0.9 * velocity)
        first, last = hard(start), hard(a)
        better = (last * applied(last)).sum(1) > (first * applied(first)).sum(1)
        found.append(torch.where(better[:, None], a, start))
        y = torch.where(better[:, None], last, first)
        target = target - y[:, :, None] * y[:, None, :]
    return torch.stack(found, 1)


# ------------------------------------------------------------------------------------------------------- mixture


class MixtureOfPrimitives(nn.Module):
    """Two linear experts, one dense and one of powers of two, and a router that sends each token through one of them.

    The output is ``p_e E_e(x)`` with e the expert of the larger logit and p_e its probability, so that the task trains the
    router; on equal logits it is the shift expert, the cheap one. In training the logits get noise of a learned deviation.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        noise: whether logits get noise in training.
        alpha: what a token costs in the dense and in the shift expert; None: the measured latencies, see :meth:`measure`.
        format: of the shift expert's packed weight.

    Attributes:
        dense: the dense expert, an ``nn.Linear``.
        shift: the shift expert, a :class:`ShiftLinear`.
        router: ``nn.Linear`` to two logits, zero at the start. It has a bias: without one, tokens whose mean is 0 would be
            shared evenly whatever the latencies are.
        noise: ``nn.Linear`` without bias to the logits' noise, zero at the start, or None.
        latency: fp32 buffer ``[2]``, moving average of measured latencies in microseconds; equal ones until measured.
        measured: int64 buffer, how often it was measured.
        noise_scale: fp32 buffer, a factor of the learned deviation, 1 at the start. The balance is one of noisy choices; where
            it falls to 0 in the course of training, the balance becomes that of the choices without noise.
        balance_loss: scalar with a graph, of the last forward in training: how far both experts are from taking equally
            long, by the sums of the probabilities and (with noise) by the smooth count of tokens. None before; copies and
            pickles drop it.

    Shape: as ``nn.Linear``; an expert may get no token, or there may be none.

    Raises:
        TypeError: an input that is no floating-point tensor.
        ValueError: an unknown format, ``alpha`` that is not two positive numbers.

    Example:
        >>> layer = MixtureOfPrimitives(8, 4, alpha=(6, 4))
        >>> layer(torch.rand(5, 8)).shape, layer.balance_loss.dim()
        (torch.Size([5, 4]), 0)

    Source: You et al. 2023 (ShiftAddViT, 2306.06446), section 4.3; the gate: Fedus et al. 2022 (Switch Transformers),
    section 2.1; noise and smooth count: Shazeer et al. 2017, appendix A.
    """

    latency: Tensor
    measured: Tensor
    noise_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        noise: bool = True,
        alpha: Sequence[float] | None = None,
        format: str = "S5",
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        dense = nn.Linear(in_features, out_features, bias, **where)
        shift = ShiftLinear(in_features, out_features, bias, **where, format=format)
        self._take(dense, shift, noise, alpha)

    def _take(self, dense: nn.Linear, shift: ShiftLinear, noise: bool, alpha: Sequence[float] | None) -> None:
        check_alpha("MixtureOfPrimitives", alpha)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.alpha = None if alpha is None else (float(alpha[0]), float(alpha[1]))
        self.dense, self.shift = dense, shift
        where: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        self.router = nn.Linear(self.in_features, 2, **where)
        self.noise = nn.Linear(self.in_features, 2, False, **where) if noise else None
        for layer in (self.router, self.noise):
            for p in () if layer is None else layer.parameters():
                nn.init.zeros_(p)
        self.register_buffer("latency", torch.ones(2, dtype=torch.float32, device=dense.weight.device))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64, device=dense.weight.device))
        self.register_buffer("noise_scale", torch.ones((), dtype=torch.float32, device=dense.weight.device))
        self.balance_loss: Tensor | None = None

    @classmethod
    def from_dense(
        cls, linear: nn.Module, *, noise: bool = True, alpha: Sequence[float] | None = None, format: str = "S5"
    ) -> MixtureOfPrimitives:
        """From a dense layer, or from a :class:`ShiftLinear`, with copies of its parameters.

        The gate of a new router is a half, so both experts start at twice the layer: what goes through the dense expert
        comes out as before.
        """
        if isinstance(linear, ShiftLinear):
            dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            dense.weight = nn.Parameter(linear.weight.detach())
            if linear.bias is not None:
                dense.bias = nn.Parameter(linear.bias.detach().clone())
        else:
            weight, bias = dense_weight(linear)
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            dense.weight = nn.Parameter(weight.clone())
            if bias is not None:
                dense.bias = nn.Parameter(bias.clone())
        shift = ShiftLinear.from_dense(dense, format=format, octaves=1)
        for p in dense.parameters():
            p.data.mul_(2)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(dense, shift, noise, alpha)
        return layer.train(linear.training)

    # --------------------------------------------------------------------------------------------- latencies

    @torch.no_grad()
    def measure(self, tokens: int = 1024, momentum: float = 0.1) -> tuple[float, float]:
        """Time both experts as they run in evaluation and deployed, and average into :attr:`latency`.

        That is the product of the mixture, :func:`cofire.ops.moe2_linear`, with all tokens sent through one expert, then
        through the other, in turns. The shift expert's weight is decoded beforehand there, so that on today's processors
        both take about equally long; what an expert takes elsewhere is given by ``alpha``.

        Args:
            tokens: rows of the random input.
            momentum: of the moving average; the first measurement is taken whole.

        Returns:
            Microseconds per call of the dense and of the shift expert, medians of what was measured now.
        """
        x = torch.randn(tokens, self.in_features, device=self.latency.device, dtype=self.dense.weight.dtype)
        weight = self.shift.decoded()

        def through(expert: int) -> Callable[[Tensor], Tensor]:
            logits = x.new_zeros(tokens, 2)
            logits[:, expert] = 1
            routed = ops.moe_route(logits)[:3]
            return lambda x: _mixed(x, self.dense.weight, weight, self.dense.bias, self.shift.bias, *routed)

        times = interleaved({expert: (through(expert), x) for expert in range(2)})
        found = [1e6 * median(times[expert]) for expert in range(2)]
        now = torch.tensor(found, device=self.latency.device)
        self.latency.copy_(torch.where(self.measured > 0, self.latency.lerp(now, momentum), now))
        self.measured += 1
        return found[0], found[1]

    @property
    def costs(self) -> Tensor:
        """What the balance loss takes a token to cost in each expert: ``alpha`` if given, else the latencies."""
        return self.latency if self.alpha is None else self.latency.new_tensor(self.alpha)

    # ----------------------------------------------------------------------------------------------- routing

    def route(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:func:`cofire.ops.moe_route` of the router's logits, without noise."""
        return ops.moe_route(self.router(input.reshape(-1, self.in_features)))

    def forward(self, input: Tensor) -> Tensor:
        check_float("MixtureOfPrimitives", input=input)
        if input.shape[-1:] != (self.in_features,):
            refuse("MixtureOfPrimitives", f"input must have shape [..., {self.in_features}], got {shape_of(input)}")
        x = input.reshape(-1, self.in_features)
        clean = noisy = self.router(x)
        deviation = None
        if self.training and self.noise is not None:
            deviation = F.softplus(self.noise(x)) * self.noise_scale + LEAST_NOISE
            noisy = clean + torch.randn_like(clean) * deviation
        gate, index, count, importance = ops.moe_route(noisy)
        if self.training:
            loss = ops.balance_loss(importance, self.costs)
            if deviation is not None:
                loss = loss + ops.balance_loss(ops.load_probability(clean, noisy, deviation), self.costs)
            self.balance_loss = loss
        weight = self.shift.weight if self.training or self.shift._is_trained() else self.shift.decoded()
        y = _mixed(x, self.dense.weight, weight, self.dense.bias, self.shift.bias, gate, index, count)
        return y.view(*input.shape[:-1], self.out_features)

    def pack(self) -> PackedMixture:
        """The form for inference, with the shift expert's packed weight, and copies of everything else."""
        return PackedMixture(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance_loss": None}  # no leaf, and of one forward only

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, alpha={self.alpha}"


def check_alpha(where: str, alpha: Sequence[float] | None) -> None:
    """The sentence of latencies that a user gives."""
    if alpha is None:
        return
    fine = isinstance(alpha, Sequence) and len(alpha) == 2 and all(isinstance(a, (int, float)) for a in alpha)
    if not fine or not all(0 < a < math.inf for a in alpha):
        refuse(where, f"alpha must be two positive numbers, one for each of two experts, or None, got {alpha!r}")


def _mixed(x: Tensor, dense: Tensor, shift: Tensor, *rest: Tensor | None) -> Tensor:
    dense_bias, shift_bias, gate, index, count = rest
    assert gate is not None and index is not None and count is not None
    return ops.moe2_linear(x, dense, shift, dense_bias, shift_bias, gate.to(x.dtype), index, count)


class PackedMixture(nn.Module):
    """The form of a :class:`MixtureOfPrimitives` for inference; frozen. What is stored of the shift expert is packed; a
    decoded copy of it, made at the first call and kept, is what the product reads. So it is small on disk, not in memory:
    :attr:`nbytes` against :attr:`resident_nbytes`.

    Attributes:
        dense: ``nn.Linear``; shift: :class:`QuantLinear`; router: ``nn.Linear``.

    Shape: as ``nn.Linear``.

    Example:
        >>> layer = MixtureOfPrimitives(8, 4).eval()
        >>> x = torch.rand(5, 8)
        >>> torch.equal(layer.pack()(x), layer(x))
        True

    Source: You et al. 2023 (ShiftAddViT, 2306.06446), section 4.3.
    """

    def __init__(self, mixture: MixtureOfPrimitives) -> None:
        super().__init__()
        self.in_features, self.out_features = mixture.in_features, mixture.out_features
        self.dense, self.router = _frozen(mixture.dense), _frozen(mixture.router)
        self.shift = mixture.shift.pack()
        self._derived = _Derived()
        self.eval()

    @property
    def nbytes(self) -> int:
        """Bytes that are stored: both experts, the second packed, their biases, and the router."""
        return self.shift.nbytes + sum(p.nbytes for m in (self.dense, self.router) for p in m.parameters())

    @property
    def resident_nbytes(self) -> int:
        """Bytes that are held once it has run: what is stored, and the decoded copy of the shift expert's weight."""
        return self.nbytes + self.in_features * self.out_features * self.shift.dtype.itemsize

    def decoded(self) -> Tensor:
        """The shift expert's weight, kept as long as its codes do not change."""
        of = tuple(b for b in self.shift.buffers() if b is not self.shift.geometry)
        found: Tensor = self._derived.get("decoded", (*of, self.dense.weight), lambda: self.shift.weight)
        return found

    def route(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:func:`cofire.ops.moe_route` of the router's logits."""
        return ops.moe_route(self.router(input.reshape(-1, self.in_features)))

    def forward(self, input: Tensor) -> Tensor:
        check_float("PackedMixture", input=input)
        x = input.reshape(-1, self.in_features)
        gate, index, count, _ = self.route(x)
        y = _mixed(x, self.dense.weight, self.decoded(), self.dense.bias, self.shift.bias, gate, index, count)
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _frozen(linear: nn.Linear) -> nn.Linear:
    result = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    result.weight = nn.Parameter(linear.weight.detach().clone(), False)
    if linear.bias is not None:
        result.bias = nn.Parameter(linear.bias.detach().clone(), False)
    return result


def shift_layers(model: nn.Module) -> Iterator[tuple[str, ShiftLinear]]:
    """The shift layers of a model, experts of mixtures among them."""
    for name, module in model.named_modules():
        if isinstance(module, ShiftLinear):
            yield name, module
