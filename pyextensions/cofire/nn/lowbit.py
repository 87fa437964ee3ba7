# SPDX-License-Identifier: Apache-2.0
"""Linear layers with quantised weights, and the one call that puts them into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.nn.calibration import input_statistics
from cofire.ops import QTensor, dequantize, packed_bytes, qlinear, qlora_linear, quantize_weight
from cofire.ops.checks import check_choice, check_integer, check_module, check_number, refuse, shape_of
from cofire.ops.lowbit import ACTIVATIONS, check_bits, check_int8, drop_layouts
from cofire.ops.qtensor import NESTED, TENSORS
from cofire.ops.quantizers import check_method

__all__ = ["LoRALinear", "QLoRALinear", "QuantLinear", "hessians", "quantize_"]

#: Of the layout of a packed weight's state: written into it, and compared. Older ones, and states without one, are read.
VERSION = 2
#: The buffers of a quantised weight; a dot cannot be part of a name.
BUFFERS = (*TENSORS, *(f"{name}_{part}" for name in ("scale", "offset") for part in NESTED))


class QuantLinear(nn.Module):
    """A linear layer whose weight has 1 to 8 bits; frozen.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        bits, group_size: of the weight (None: one scale per row).
        activations: "exact" or "int8", as in :func:`cofire.ops.qlinear`.

    A new layer is all zeros: :meth:`from_linear` makes one from a dense layer, and ``load_state_dict`` accepts the state of
    any other of the same size, whatever its bits, groups, tables, order of columns, format or activations; the state says
    them itself. It is looked at before this layer is changed: shapes that do not fit together, numbers that are not finite, a
    ``perm`` that is no permutation and activations that the weight does not take are refused. Keys that are missing are not:
    what there is of the others may be loaded before torch reports them.

    Attributes:
        codes, scale, zero, offset, lut, perm: the tensors of the :class:`~cofire.ops.QTensor`, as buffers; those that the
            weight has not are None. Nested scales are ``scale_codes`` and so on, nested offsets ``offset_codes``. They keep
            their dtypes when the layer is cast.
        activations: "exact" or "int8"; may be set.
        geometry: int64 buffer: rows, columns, bits, group size, the block of nested scales or 0, the version of this layout
            (2), 0 for exact activations or 1 for int8, and the bytes of the format's name. States of version 1 say nothing
            of activations: the layer keeps its own. Still older ones end after the block; a layer of other bits or groups
            than theirs then has no format either.

    Shape: as ``nn.Linear``.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: bits out of range, a group size that does not divide ``in_features``, unknown activations, or int8
            activations of a weight with a table of floats or with groups too wide for sums in 32 bits.
        RuntimeError: from ``load_state_dict``, for a state that does not fit; from the forward as :func:`cofire.ops.qlinear`.

    Example:
        >>> layer = QuantLinear.from_linear(nn.Linear(64, 8), bits=4, group_size=32)
        >>> layer(torch.rand(3, 64)).shape
        torch.Size([3, 8])

    Source: Dettmers et al. 2023 (QLoRA, 2305.14314), section 3.
    """

    geometry: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        activations: str = "exact",
    ) -> None:
        super().__init__()
        check_integer("QuantLinear", in_features=in_features, out_features=out_features)
        size = check_bits("QuantLinear", bits, group_size, in_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        where: dict[str, Any] = {"device": device}
        codes = torch.zeros(out_features, packed_bytes(in_features, bits), dtype=torch.uint8, **where)
        scale = torch.zeros(out_features, in_features // size, **where, dtype=torch.float32)
        zero = torch.zeros(1, 1, **where, dtype=torch.float32)
        self._take(QTensor(codes, scale, (out_features, in_features), bits, size, zero, dtype=dtype), activations)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), False) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Module, method: str = "absmax", *, activations: str = "exact", **options: Any
    ) -> QuantLinear:
        """From a dense layer; the options are those of :func:`cofire.ops.quantize_weight`."""
        weight, bias = dense_weight(linear)
        return cls.from_qtensor(quantize_weight(weight, method, **options), bias, activations=activations)

    @classmethod
    def from_qtensor(cls, weight: QTensor, bias: Tensor | None = None, *, activations: str = "exact") -> QuantLinear:
        """Around a weight, which is not copied, and a bias."""
        if not isinstance(weight, QTensor):
            raise TypeError(f"QuantLinear.from_qtensor: weight must be a QTensor, got {type(weight).__name__}")
        if bias is not None and list(bias.shape) != [weight.shape[0]]:
            refuse("QuantLinear.from_qtensor", f"bias must have shape [{weight.shape[0]}], got {shape_of(bias)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(weight, activations)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), False)
        return layer

    # ---------------------------------------------------------------------------------------------- its weight

    def _take(self, weight: QTensor, activations: str) -> None:
        _check_activations(activations, weight.bits, weight.group_size, weight.lut)
        tensors = {name.replace(".", "_"): t.detach() for name, t in weight.tensors().items()}
        for name in BUFFERS:
            self.register_buffer(name, tensors.get(name))
        self.out_features, self.in_features = weight.shape
        self._describe(weight, activations)
        self.register_buffer("geometry", torch.tensor(self._numbers(), device=weight.device))
        #: Of the weight that this one stands for; follows the layer wherever it is cast to.
        self.dtype = weight.dtype

    def _describe(self, weight: QTensor, activations: str) -> None:
        self.bits, self.group_size, self.format = weight.bits, weight.group_size, weight.format
        self._block: int = getattr(weight.scale, "block", 0)
        self._activations = activations

    def _numbers(self) -> list[int]:
        """What ``geometry`` holds."""
        sizes = [self.out_features, self.in_features, self.bits, self.group_size, self._block]
        return [*sizes, VERSION, ACTIVATIONS.index(self._activations), *self.format.encode()]

    @property
    def activations(self) -> str:
        return self._activations

    @activations.setter
    def activations(self, value: str) -> None:
        _check_activations(value, self.bits, self.group_size, self._buffers["lut"])
        self._activations = value
        self.geometry = torch.tensor(self._numbers(), device=self.geometry.device)

    @property
    def qweight(self) -> QTensor:
        """The weight as a :class:`~cofire.ops.QTensor` around the layer's buffers."""
        found = {n: self._buffers[n] for n in BUFFERS if self._buffers[n] is not None}
        tensors = {n.replace("_", ".", 1): t for n, t in found.items()}
        block = {"block": self._block} if self._block else {}
        return QTensor.from_tensors(
            tensors,  # type: ignore[arg-type]
            shape=(self.out_features, self.in_features),
            bits=self.bits,
            group_size=self.group_size,
            dtype=self.dtype,
            format=self.format,
            **block,
        )

    @property
    def weight(self) -> Tensor:
        """The decoded weight, anew with each call."""
        return dequantize(self.qweight)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and of the bias: what is saved."""
        return self.qweight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def resident_nbytes(self) -> int:
        """Bytes that are held once it has run: what is saved, and the layout that products on a CPU read, which is made by
        the first one and kept. :meth:`free_layout` gives that back."""
        return self.qweight.resident_nbytes + (0 if self.bias is None else self.bias.nbytes)

    @torch.no_grad()
    def free_layout(self) -> QuantLinear:
        """Free the layout that products, and some gradients, read; the next one makes it anew.

        The layout lives as long as the memory of the codes, so the layer moves to a copy of them. Where something else holds
        the old ones, a :attr:`qweight` or a state dict, both stay until that is gone.

        Returns:
            The layer.

        Example:
            >>> layer = QuantLinear.from_linear(nn.Linear(64, 8), bits=4, group_size=32)
            >>> x = torch.rand(3, 64)
            >>> y = layer(x)
            >>> torch.equal(layer.free_layout()(x), y)
            True
        """
        self.codes = self._buffers["codes"].clone()  # type: ignore[union-attr]
        drop_layouts()
        return self

    def forward(self, input: Tensor) -> Tensor:
        return qlinear(input, self.qweight, self.bias, activations=self._activations)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, activations={self.activations}"
        )

    # ------------------------------------------------------------------------------------- casting and loading

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "activations" in self.__dict__:  # pickled before they were in the geometry
            self._activations = self.__dict__.pop("activations")
            self.geometry = torch.tensor(self._numbers(), device=self.geometry.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, was in before.items():
            now = self._buffers[name]
            if was is not None and now is not None and now.dtype != was.dtype:
                self._buffers[name] = was.to(now.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        stored, codes = state_dict.get(f"{prefix}geometry"), state_dict.get(f"{prefix}codes")
        if isinstance(stored, Tensor) and isinstance(codes, Tensor) and not stored.is_meta:
            parts = {n: t for n in BUFFERS if isinstance(t := state_dict.get(prefix + n), Tensor)}
            try:
                bias = state_dict.get(f"{prefix}bias")
                weight, activations = self._read(stored.tolist() if stored.dim() == 1 else [], parts, bias)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'QuantLinear'}: {error}")
                return
            self._describe(weight, activations)
            if stored.tolist() != self._numbers():  # of an older version
                stored = torch.tensor(self._numbers(), device=stored.device)
                state_dict = {**state_dict, f"{prefix}geometry": stored}
            self.geometry = torch.empty_like(stored, device=self.geometry.device)
            for name in BUFFERS:  # of the shapes and dtypes of what comes
                there = parts.get(name)
                self._buffers[name] = None if there is None else torch.empty_like(there, device=self.geometry.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _read(self, numbers: list[int], parts: dict[str, Tensor], bias: Any) -> tuple[QTensor, str]:
        """The weight of a state, and its activations; refused where the layer cannot be one of it."""
        trouble = _trouble(numbers, [self.out_features, self.in_features])
        if trouble:
            raise ValueError(trouble)
        if self.bias is not None and isinstance(bias, Tensor) and bias.shape != self.bias.shape:
            raise ValueError(f"bias must have shape {shape_of(self.bias)}, got {shape_of(bias)}")
        bits, group_size, block = numbers[2:5]
        same = [bits, group_size, block] == [self.bits, self.group_size, self._block]
        if len(numbers) == 5:  # of before there was a version
            activations, format = self.activations, self.format if same else ""
        else:
            first = 6 if numbers[5] == 1 else 7
            activations = self.activations if first == 6 else ACTIVATIONS[numbers[6]]
            format = bytes(numbers[first:]).decode(errors="replace")
        for name in ("scale", "offset"):
            lacking = [part for part in NESTED if f"{name}_{part}" not in parts]
            if 0 < len(lacking) < len(NESTED):
                raise ValueError(f"the state of a nested {name} must have {name}_{lacking[0]}, got none")
        weight = QTensor.from_tensors(
            {n.replace("_", ".", 1): t for n, t in parts.items()},
            shape=(self.out_features, self.in_features), bits=bits, group_size=group_size, block=block, dtype=self.dtype,
            format=format,
        )  # fmt: skip
        if not any(t.is_meta for t in parts.values()):
            weight.check_values()
        _check_activations(activations, bits, group_size, weight.lut)
        return weight, activations


def _check_activations(activations: str, bits: int, group_size: int, lut: Tensor | None) -> None:
    check_choice("QuantLinear", "activations", activations, ACTIVATIONS)
    if activations == "int8":
        check_int8("QuantLinear", bits, group_size, lut)


def _trouble(numbers: list[int], shape: list[int]) -> str | None:
    """Why a packed weight of this geometry cannot be loaded into a layer of ``shape``, or None."""
    version = numbers[5] if len(numbers) > 5 else 1
    if not 1 <= version <= VERSION:
        return f"the layout of the state must have a version of 1 to {VERSION}, got {version}"
    known = version == 1 or (len(numbers) > 6 and 0 <= numbers[6] < len(ACTIVATIONS))
    if len(numbers) < 5 or not known or not all(0 <= byte < 256 for byte in numbers[6:]):
        parts = "rows, columns, bits, group size, block, version, activations and the bytes of a format's name"
        return f"the geometry of the state must hold {parts}, got {numbers}"
    if numbers[:2] != shape:
        return f"the state must be of a weight {shape}, got one of {numbers[:2]}"
    return None


class LoRALinear(nn.Module):
    """A frozen linear layer and a trained low-rank term: ``base(x) + alpha / rank * (x A^T) B^T``.

    Args:
        base: an ``nn.Linear``. Its weight and bias are frozen, and stay what they are.
        rank: of the term.
        alpha: its factor, before division by the rank.
        dtype: of the term; None: that of the weight.

    Attributes:
        lora_a: parameter ``[rank, in_features]``, uniform as ``nn.Linear`` starts.
        lora_b: parameter ``[out_features, rank]``, zero, so that the layer starts as its base.

    Shape: as ``nn.Linear``.

    Raises:
        TypeError: ``base`` is no ``nn.Linear``, or of a subclass, which may compute with another weight than it holds; or a
            number has another type.
        ValueError: ``rank`` below 1.

    Example:
        >>> base = nn.Linear(64, 8)
        >>> layer = LoRALinear(base, rank=4)
        >>> x = torch.rand(3, 64)
        >>> torch.equal(layer(x), base(x)), [name for name, p in layer.named_parameters() if p.requires_grad]
        (True, ['lora_a', 'lora_b'])

    Source: Hu et al., ICLR 2022 (LoRA, 2106.09685), section 4.1.
    """

    base: Any

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        own_dtype, device = self._check_base(base)
        check_integer(name, rank=rank)
        check_number(name, alpha=alpha)
        if rank < 1:
            refuse(name, f"rank must be at least 1, got {rank}")
        self.base, self.rank, self.alpha = base.requires_grad_(False), rank, alpha
        like: dict[str, Any] = {"device": device, "dtype": dtype or own_dtype}
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def _check_base(self, base: nn.Module) -> tuple[torch.dtype, torch.device]:
        """The dtype and the device of its weight."""
        if type(base) is not nn.Linear:
            got = f"the subclass {type(base).__name__}" if isinstance(base, nn.Linear) else type(base).__name__
            raise TypeError(f"LoRALinear: base must be an nn.Linear itself, got {got}")
        return base.weight.dtype, base.weight.device

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)

    def forward(self, input: Tensor) -> Tensor:
        term = F.linear(F.linear(input.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        output: Tensor = self.base(input)
        return output + (self.alpha / self.rank * term).to(output.dtype)

    def merged(self) -> Tensor:
        """The dense weight that the layer applies; to quantise it again loses some of what was trained."""
        weight: Tensor = self.base.weight
        return weight + (self.alpha / self.rank) * (self.lora_b @ self.lora_a).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}"


class QLoRALinear(LoRALinear):
    """A frozen quantised layer and a trained low-rank term: ``base(x) + alpha / rank * (x A^T) B^T``.

    Args:
        base: a :class:`QuantLinear` with exact activations.
        rank: of the term.
        alpha: its factor, before division by the rank.

    Attributes:
        lora_a: parameter ``[rank, in_features]``, uniform as ``nn.Linear`` starts.
        lora_b: parameter ``[out_features, rank]``, zero, so that the layer starts as its base.

    Shape: as ``nn.Linear``.

    Raises:
        TypeError: ``base`` is no :class:`QuantLinear`, or a number has another type.
        ValueError: ``rank`` below 1, or a base with int8 activations, in the forward as well.
        RuntimeError: from ``load_state_dict``, for the state of such a base, which leaves the layer as it is.

    Example:
        >>> base = QuantLinear.from_linear(nn.Linear(64, 8), "nf4", group_size=64)
        >>> layer = QLoRALinear(base, rank=4)
        >>> x = torch.rand(3, 64)
        >>> torch.equal(layer(x), base(x)), [name for name, p in layer.named_parameters() if p.requires_grad]
        (True, ['lora_a', 'lora_b'])

    Source: Dettmers et al. 2023 (QLoRA, 2305.14314), equation 5.
    """

    def _check_base(self, base: nn.Module) -> tuple[torch.dtype, torch.device]:
        if not isinstance(base, QuantLinear):
            raise TypeError(f"QLoRALinear: base must be a QuantLinear, got {type(base).__name__}")
        _check_exact(base.activations)
        return base.dtype, base.geometry.device

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        stored = state_dict.get(f"{prefix}base.geometry")
        numbers = stored.tolist() if isinstance(stored, Tensor) and stored.dim() == 1 and not stored.is_meta else []
        if len(numbers) > 6 and numbers[5] == VERSION and numbers[6] == ACTIVATIONS.index("int8"):
            error_msgs.append(f"{prefix}base: the state must have exact activations, got 'int8'")
            # torch hands this dict on to the base, which would take the state: it finds its own instead.
            for name in [n for n in state_dict if n.startswith(prefix)]:
                del state_dict[name]
            state_dict.update(self.state_dict(prefix=prefix))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(self, input: Tensor) -> Tensor:
        _check_exact(self.base.activations)
        weight = self.base.qweight
        return qlora_linear(input, weight, self.lora_a, self.lora_b, self.alpha / self.rank, self.base.bias)


def _check_exact(activations: str) -> None:
    if activations != "exact":
        refuse("QLoRALinear", f"base must have exact activations, got {activations!r}")


# ------------------------------------------------------------------------------------------------ whole models


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's ``Conv1D``: a linear layer with the weight ``[in, out]``. Known by name: nothing is imported."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def dense_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[out, in]`` and bias of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    if is_transposed(module):
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
        return weight.detach().t().contiguous(), bias.detach()
    raise TypeError(f"QuantLinear.from_linear: linear must be a linear layer, got {type(module).__name__}")


Filter = Callable[[nn.Module, str], bool]


def linear_layers(
    model: nn.Module, filter: Filter | None = None, also: tuple[type[nn.Module], ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a model that own their weight: one that is tied to another module's stays as it is.

    ``also``: other classes to take.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    for name, module in model.named_modules():
        plain = type(module) in (nn.Linear, *also) or is_transposed(module)
        # (a weight that is no parameter is computed anew by a hook, as old-style weight norm does)
        if plain and owners.get(id(module.weight)) == 1 and (filter is None or filter(module, name)):
            yield name, module


def quantize_(
    model: nn.Module,
    method: str = "absmax",
    *,
    bits: int = 4,
    group_size: int | None = 128,
    activations: str = "exact",
    filter: Filter | None = None,
    hessians: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> nn.Module:
    """Put quantised layers into a model, in place: every ``nn.Linear``, and GPT-2's ``Conv1D``.

    Layers whose weight is tied to another module's (an output layer to the embedding) stay dense, as do subclasses of
    ``nn.Linear``, which may do more than a linear layer does. Nothing is changed if a layer cannot be quantised.

    The state of the result loads into any model of the same layers that was quantised by this function, whatever its method,
    bits and groups: ``safetensors.torch.save_model`` and ``load_model`` write and read it, tied weights included, of which
    ``save_file`` would refuse the two names.

    Args:
        model: changed in place.
        method, bits, group_size, options: as in :func:`cofire.ops.quantize_weight`.
        activations: "exact" or "int8", as in :func:`cofire.ops.qlinear`.
        filter: ``filter(module, name)`` says whether to quantise a layer; default: all.
        hessians: for "gptq": ``[K, K]`` by name of the layer; see :func:`hessians`.

    Returns:
        The model; or a new layer, if the model itself is a linear layer.

    Raises:
        TypeError: ``model`` is no module, or an option that the method does not have.
        ValueError: no layer is left to quantise, or one cannot be: the sentence names it; an unknown method.

    Example:
        >>> model = quantize_(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), bits=4, group_size=32)
        >>> type(model[0]).__name__, model(torch.rand(2, 64)).shape
        ('QuantLinear', torch.Size([2, 8]))

    Source: the call: torchao's ``quantize_``; the ways to quantise: those of :func:`cofire.ops.quantize_weight`.
    """
    check_module("quantize_", model)
    check_choice("quantize_", "activations", activations, ACTIVATIONS)
    check_method("quantize_", method)
    if hessians is not None and method != "gptq":
        refuse("quantize_", f"hessians are for the method 'gptq', got the method {method!r}")
    made: dict[nn.Module, QuantLinear] = {}
    for name, module in linear_layers(model, filter):
        own = dict(options)
        if method == "gptq":
            if hessians is None or name not in hessians:
                refuse("quantize_", f"hessians must have one for the layer {name!r} (method gptq)")
            own["hessian"] = hessians[name]
        try:
            layer = QuantLinear.from_linear(
                module, method, bits=bits, group_size=group_size, activations=activations, **own
            )
        except ValueError as error:
            refuse("quantize_", f"the layer {name!r} cannot be quantised ({error}); a filter can leave it out")
        made[module] = layer.train(module.training)
    if not made:
        already = any(isinstance(module, QuantLinear) for module in model.modules())
        got = "none that is not quantised already" if already else "none"
        refuse("quantize_", f"model must have a linear layer to quantise (tied ones stay dense), got {got}")
    if model in made:
        return made[model]
    for parent in list(model.modules()):  # wherever it stands: a module may have several places
        for leaf, child in parent._modules.items():
            if child in made:
                parent._modules[leaf] = made[child]
    return model


def hessians(model: nn.Module, batches: Iterable[Any], filter: Filter | None = None) -> dict[str, Tensor]:
    """The sums of ``x x^T`` over the inputs of each linear layer, for GPTQ.

    Args:
        model: called as ``model(batch)``, or ``model(**batch)`` for a mapping, in evaluation mode, without gradients.
        batches: calibration inputs.
        filter: as in :func:`quantize_`.

    Returns:
        fp32 ``[K, K]`` by name of the layer; those that had no input are not in it.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> {name: h.shape for name, h in hessians(model, [torch.rand(5, 4)]).items()}
        {'0': torch.Size([4, 4])}

    Source: Frantar et al. 2023 (GPTQ, 2210.17323), section 3.
    """
    check_module("hessians", model)
    found = input_statistics(model, batches, dict(linear_layers(model, filter)))
    return {name: statistics.gram for name, statistics in found.items()}
