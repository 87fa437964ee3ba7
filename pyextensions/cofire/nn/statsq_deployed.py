# SPDX-License-Identifier: Apache-2.0
"""What few-bit layers become for inference: products of integers, and convolutions with packed weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofire.nn.lowbit import QuantLinear
from cofire.nn.palettes import PackedPalettizedConv2d
from cofire.ops import QTensor
from cofire.ops.checks import refuse

if TYPE_CHECKING:
    from cofire.nn.statsq import LSQActivation

#: Columns that the kernels take at a time; other numbers of them cost a copy of the input.
COLUMNS = 32


def folded_bias(weight: QTensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The bias of a product whose input has lost a shift: ``bias + W shift``; with memory of its own."""
    if shift is None:
        return None if bias is None else bias.detach().clone()
    more = weight.dequantize().double() @ shift.detach().double()
    return (more if bias is None else bias.detach().double() + more).to(weight.dtype)


def rounded(rounding: LSQActivation, layer: QuantLinear | QuantConv2d) -> nn.Sequential:
    """The layer behind the rounding of its input. It takes states of when the shift after was no part of the bias."""
    both = nn.Sequential(rounding, layer)
    both.register_load_state_dict_pre_hook(_load_older)
    return both


def _load_older(
    both: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    layer = cast(nn.Sequential, both)[1]
    if not isinstance(layer, QuantLinear):
        if f"{prefix}weight" in state_dict:
            error_msgs.append(f"QuantConv2d: {of_before_convolutions(prefix)}")
        return
    after, inner = state_dict.get(f"{prefix}0.after"), f"{prefix}1."
    if not isinstance(after, Tensor):
        return
    own = copy.deepcopy(layer)  # with the weight of the state
    bias = state_dict.get(f"{inner}bias")
    if bias is None:
        own.bias = None
    of_layer = {name.removeprefix(inner): x for name, x in state_dict.items() if name.startswith(inner)}
    try:
        own.load_state_dict(of_layer, assign=bool(local_metadata.get("assign_to_params_buffers")))
    except RuntimeError:  # the layer will say so itself
        return
    del state_dict[f"{prefix}0.after"]
    state_dict[f"{inner}bias"] = folded_bias(own.qweight, own.bias, after.to(own.codes.device))


def of_before_convolutions(prefix: str) -> str:
    """What to do with a state in which a convolution has its dense weight alone."""
    name = prefix.removesuffix(".").removeprefix("student.")
    return (
        f"the state has a dense weight and no scales for the convolution {name!r}, as states of OFQ had that left convolutions as "
        f"they are; load it into a network that was prepared with skip=[{name!r}]"
    )


# ---------------------------------------------------------------------------------------------------------- integers


class IntegerLinear(nn.Module):
    """A linear layer that multiplies integers: ``scale * (W q) + (bias + W after)`` where the input is rounded to ``scale * q +
    after``; :meth:`StatsQLinear.deploy` makes it.

    The product of int8 activations gives each row a scale of its own, its largest magnitude over 127. Behind the integers
    stand 127 and -127, for two columns of equal weights, which add nothing: that scale is then 1, so the integers enter the
    product as they are, and it is exact but for the scales.

    Args:
        weight: of one scale per row, ``[N, K]``, with zero points and offsets where it has them.
        bias: ``[N]``, of the layer that rounds its input with the shift after; or None.
        activation: rounds the input. It must satisfy :meth:`takes`; its shift after becomes part of the bias.
        inside: whether the layer rounds its own input. Otherwise it has :meth:`multiply` alone, for integers that several
            layers share.

    Shape: as ``nn.Linear``; the result has the dtype of the input.

    Raises:
        ValueError: an activation that cannot be taken, or a weight in groups, with an order of columns or with a table.

    Example:
        >>> from cofire.nn import LSQActivation, StatsQLinear
        >>> layer = StatsQLinear(nn.Linear(8, 3), bits=2, input=LSQActivation(4, features=8))
        >>> x = torch.rand(5, 8)
        >>> expected = layer(x)
        >>> integers = layer.deploy(integer=True)
        >>> type(integers).__name__, torch.allclose(integers(x), expected, atol=1e-5)
        ('IntegerLinear', True)

    Source: Jacob et al. 2018 (1712.05877), section 2.2; the shift: Liu et al. 2023 (OFQ).
    """

    ends: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: QTensor, bias: Tensor | None, activation: LSQActivation, *, inside: bool = True) -> None:
        super().__init__()
        if not self.takes(activation):
            refuse(
                "IntegerLinear",
                f"activation must have integers of at most 127, and one scale for all or one per position, got {activation}",
            )
        rows, columns = weight.shape
        if weight.group_size != columns or weight.perm is not None:
            refuse("IntegerLinear", f"weight must have one scale per row and its columns in order, got {weight!r}")
        if weight.lut is not None:
            refuse("IntegerLinear", f"weight must have levels that are evenly spaced, without a lut, got {weight!r}")
        bias = folded_bias(weight, bias, activation.after)
        self.bias = None if bias is None else nn.Parameter(bias, False)
        self.input: LSQActivation | None = None
        if inside:
            self.input = activation
            activation.after = None
        more = 2 + -(columns + 2) % COLUMNS
        codes = F.pad(weight.unpack(), (0, more))
        padded = QTensor.from_codes(
            codes,
            weight.scales(),
            bits=weight.bits,
            group_size=columns + more,
            zero=weight.zero,
            offset=weight.offsets(),  # (the ends have equal ones, as all that makes their weights equal)
            dtype=weight.dtype,
        )
        self.linear = QuantLinear.from_qtensor(padded, activations="int8")
        ends = torch.zeros(more, device=weight.device)
        ends[0], ends[1] = 127, -127
        self.register_buffer("ends", ends, persistent=False)
        self.in_features, self.out_features = columns, rows

    @staticmethod
    def takes(activation: Any) -> bool:
        """Whether what this :class:`LSQActivation` rounds to can be multiplied as integers."""
        fits = max(-activation.low, activation.high) <= 127
        return fits and activation.parts == 1 and activation.axis in (None, -2)

    def extended(self, integers: Tensor) -> Tensor:
        """With what makes the scale of each row 1."""
        ends = self.ends.to(integers.dtype).expand(*integers.shape[:-1], -1)
        return torch.cat((integers, ends), -1)

    def multiply(self, extended: Tensor, scale: Tensor) -> Tensor:
        """Of integers from :meth:`extended`, and the scale that belongs to them, in fp32 or wider."""
        y: Tensor = self.linear(extended).to(scale.dtype)
        return y * scale if self.bias is None else torch.addcmul(self.bias.to(scale.dtype), y, scale)

    def forward(self, input: Tensor) -> Tensor:
        assert self.input is not None
        integers, scale = self.input.integers(input)
        return self.multiply(self.extended(integers), scale).to(input.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


# ------------------------------------------------------------------------------------------------------ convolutions


def follow(layer: nn.Module, conv: nn.Module) -> None:
    """Take over the geometry of a convolution."""
    for name in PackedPalettizedConv2d.GEOMETRY:
        setattr(layer, name, getattr(conv, name))


def convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``nn.Conv2d`` with the geometry of ``layer`` does."""
    output: Tensor = nn.Conv2d._conv_forward(cast(nn.Conv2d, layer), input, weight, bias)
    return output


def geometry_repr(layer: Any) -> str:
    shape = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}"
    return f"{shape}, padding={layer.padding}, groups={layer.groups}, bias={layer.bias is not None}"


class QuantConv2d(nn.Module):
    """A convolution whose weight has 1 to 8 bits; frozen. :meth:`StatsQConv2d.deploy` makes it.

    Where kernels lie side by side, as those of a patch embedding do, the patches are multiplied by the packed weight, and
    nothing decoded is kept; elsewhere the weight is decoded with each call.

    Args:
        conv: the convolution whose geometry it has.
        weight: a row for each output channel, ``[out_channels, in_channels / groups * kernel height * kernel width]``.
        bias: ``[out_channels]`` or None.

    Attributes:
        linear: a :class:`~cofire.nn.QuantLinear` that owns weight and bias.

    Shape: as ``nn.Conv2d``.

    Raises:
        ValueError: a weight that has not the convolution's shape.

    Example:
        >>> from cofire.ops import quantize_weight
        >>> conv = nn.Conv2d(3, 8, 4, stride=4)
        >>> weight = quantize_weight(conv.weight.detach().flatten(1), bits=8, group_size=None)
        >>> layer = QuantConv2d(conv, weight, conv.bias)
        >>> layer(torch.rand(2, 3, 16, 16)).shape, layer.weight.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([8, 3, 4, 4]))

    Source: Dosovitskiy et al., ICLR 2021, section 3.1: the embedding of patches is a linear map of each.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    def __init__(self, conv: Any, weight: QTensor, bias: Tensor | None) -> None:
        super().__init__()
        follow(self, conv)
        shape = [self.out_channels, self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]]
        if list(weight.shape) != shape:
            refuse("QuantConv2d", f"weight must have shape {shape}, got {list(weight.shape)}")
        self.linear = QuantLinear.from_qtensor(weight, None if bias is None else bias.detach().clone())
        self.eval()

    @property
    def side_by_side(self) -> bool:
        """Whether each pixel is part of one patch at most."""
        plain = self.padding in ("valid", (0, 0)) and self.dilation == (1, 1) and self.groups == 1
        return plain and self.stride == self.kernel_size

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def weight(self) -> Tensor:
        """The decoded weight, anew with each call."""
        return self.linear.weight.view(self.out_channels, -1, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        high, wide = self.kernel_size
        rows, columns = (n // k for n, k in zip(input.shape[-2:], self.kernel_size, strict=True))
        if not self.side_by_side or input.dim() != 4 or not rows * columns:
            return convolve(self, input, self.weight, self.bias)
        x = input[..., : rows * high, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [batch, rows, columns, channels * height * width]
        output: Tensor = self.linear(patches)
        return output.permute(0, 3, 1, 2)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if f"{prefix}weight" in state_dict:
            error_msgs.append(f"QuantConv2d: {of_before_convolutions(prefix)}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return geometry_repr(self)
