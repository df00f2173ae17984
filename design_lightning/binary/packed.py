"""`PackedConv2d` and `PackedLinear`: what a binary layer is once it is trained. Its weights are +-1 for good, one bit each on disk.

They have no latent weights, so their weights can no longer be trained; everything around them can. In memory the signs are int8;
a state dict has them as `bits`, uint8 [O, ceil(fan-in / 8)], each row the weights of one output channel in the order
(kernel row, kernel column, input channel), eight to a byte, the first in the lowest bit; 1 stands for +1 and 0 for -1.
"""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from design_lightning._adopt import adopt
from design_lightning.binary.activations import BinaryActivation
from design_lightning.binary.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from design_lightning.binary.products import Linear, Product
from design_lightning.kernels import Alignment, tile


def pack_signs(signs: Tensor) -> Tensor:
    """Signs [O, ...] as bits [O, ceil(fan-in / 8)], in the order of the module's text."""
    rows = (_channels_last(signs) > 0).flatten(1).to(torch.uint8)
    rows = F.pad(rows, [0, -rows.shape[1] % 8]).unflatten(1, (-1, 8))
    return (rows << torch.arange(8, dtype=torch.uint8, device=rows.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(bits: Tensor, shape: torch.Size) -> Tensor:
    """The int8 signs of a shape, from what `pack_signs` made of them."""
    rows = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    ordered = (shape[0], *shape[2:], shape[1])
    signs = rows.flatten(1)[:, : shape[1:].numel()].to(torch.int8).mul_(2).sub_(1).reshape(ordered)
    # Not `contiguous`: of a 1x1 kernel it keeps the strides of channels last, and a convolution then gives its output so.
    return signs.movedim(-1, 1).clone(memory_format=torch.contiguous_format)


def _channels_last(signs: Tensor) -> Tensor:
    return signs.movedim(1, -1)


class PackedLayer(nn.Module):
    """What the packed layers share. Each is made of a binary layer in stage `both`, by `of`.

        y = (signs * activation(x)) * scale + bias

    Attributes:
        signs: +-1 of the shape of the latent weights, int8.
        scale: [O], a factor of each output channel; None stands for 1.
        bias: [O], or None.
        activation: the binarizer of the input, or None for a layer whose weights alone are binary.
    """

    signs: Tensor
    scale: Tensor | None
    bias: Tensor | None
    activation: nn.Module | None
    multiplies_bits: bool
    """Whether the input of the product is +-1 alone. The scale comes behind the product then, and the sums are whole numbers."""

    @torch.no_grad()
    def _take(self, layer: BinaryLayer) -> None:
        weight = layer.stage_weight().detach()
        scale = weight.flatten(1)[:, 0].abs()
        signs = torch.where(weight < 0, -1, 1)
        per_output = scale.view(-1, *(1 for _ in range(weight.dim() - 1)))
        if not weight.is_meta and not torch.equal(signs * per_output, weight):
            raise ValueError(
                f"its weights by {type(layer.weight_binarizer).__name__} are no signs times one factor per output channel"
            )
        self.register_buffer("signs", signs.to(torch.int8), persistent=False)
        has_scale = layer.weight_binarizer.has_scale
        self.register_buffer("scale", scale if has_scale else None)
        self.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
        self.activation = layer.activation
        self.multiplies_bits = layer.activation is not None and layer.activation.gives_bits
        self.training = layer.training

    def product_of(self, x: Tensor) -> Product:
        """The convolution or linear map, for an input of the size of x."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        x = input if self.activation is None else self.activation(input)
        product = self.product_of(x)
        weight = self.signs.to(x.dtype)
        scale = None if self.scale is None else self.scale.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not self.multiplies_bits:
            if scale is not None:
                weight = weight * scale.view(-1, *(1 for _ in range(weight.dim() - 1)))
            return product.apply(x, weight, bias)
        y = product.apply(x, weight, None)
        if scale is not None:
            y = y * product.per_output(scale)
        return y if bias is None else y + product.per_output(bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}bits"] = pack_signs(self.signs)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        bits = state_dict.pop(f"{prefix}bits", None)
        expected = (self.signs.shape[0], -(-self.signs[0].numel() // 8))
        if bits is None:
            missing_keys.append(f"{prefix}bits")
        elif bits.dtype != torch.uint8 or tuple(bits.shape) != expected:
            error_msgs.append(
                f"{prefix}bits is {bits.dtype} of shape {list(bits.shape)}, not uint8 of {list(expected)}"
            )
        else:
            self.signs = unpack_signs(bits.to(self.signs.device), self.signs.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class PackedConv2d(PackedLayer):
    """The packed form of a `BinaryConv2d`: [B, C, H, W] to [B, O, H', W']. Its padding and stride are that layer's."""

    _geometry: tuple[BinaryConv2d]

    @classmethod
    def of(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """The packed form of a layer in stage `both`; activation and bias are shared with it, not copied.

        Raises:
            ValueError: if the weights are something else than signs times a factor per output channel.
        """
        packed = cls()
        packed._take(layer)
        skeleton = adopt(type(layer), layer)  # for its padding, in a tuple: no submodule, and without tensors
        for tensors in (skeleton._parameters, skeleton._buffers, skeleton._modules):
            cast(dict[str, Any], tensors).clear()
        packed._geometry = (skeleton,)
        return packed

    @property
    def geometry(self) -> BinaryConv2d:
        """The layer that it was, without tensors: stride, padding, groups."""
        return self._geometry[0]

    def product_of(self, x: Tensor) -> Product:  # noqa: D102
        convolution = self.geometry.convolution_of(x)
        if self.activation is None and convolution.mode == "constant":
            return convolution._replace(value=0)  # a real-valued input has zeros around it
        return convolution

    def extra_repr(self) -> str:  # noqa: D102
        g = self.geometry
        size, stride, padding = tuple(self.signs.shape), g.stride, g.padding
        return f"{g.in_channels}, {g.out_channels}, weights={size}, stride={stride}, padding={padding} of {g.padding_value}"


class PackedLinear(PackedLayer):
    """The packed form of a `BinaryLinear`: [..., I] to [..., O]."""

    @classmethod
    def of(cls, layer: BinaryLinear) -> "PackedLinear":
        """As in `PackedConv2d`."""
        packed = cls()
        packed._take(layer)
        return packed

    def product_of(self, x: Tensor) -> Product:  # noqa: D102
        return Linear()

    def extra_repr(self) -> str:  # noqa: D102
        return f"in_features={self.signs.shape[1]}, out_features={self.signs.shape[0]}"


def packed(layer: BinaryLayer) -> PackedLayer:
    """The packed form of a binary layer in stage `both`.

    Raises:
        ValueError: if it is in another stage, has no packed form, or has weights that are no scaled signs.
    """
    if layer.stage != "both":
        raise ValueError(f'its weights are real-valued in stage {layer.stage!r}; dl.set_stage_(model, "both") first')
    if isinstance(layer, BinaryConv2d):
        return PackedConv2d.of(layer)
    if isinstance(layer, BinaryLinear):
        return PackedLinear.of(layer)
    raise ValueError(f"{type(layer).__name__} has no packed form")


class SumThreshold(BinaryActivation):
    """Compares the sums of the binary layer in front with whole numbers: what batch norm and thresholds are once they are folded.

        y[b, c, i, j] = +1 if x[b, c, i, j] >= levels[c, (i + oi) mod h, (j + oj) mod w], else -1

    Args:
        levels: [C, h, w], float32.
        align: as in `DeSign`.
    """

    levels: Tensor
    float32_state: ClassVar[tuple[str, ...]] = ("levels",)

    def __init__(self, levels: Tensor, align: Alignment = "topleft") -> None:
        super().__init__()
        self.align: Alignment = align
        self.register_buffer("levels", levels)

    def threshold(self, x: Tensor) -> Tensor:  # noqa: D102
        return tile(self.levels, self._channels(x), x.shape[-2], x.shape[-1], self.align)

    def extra_repr(self) -> str:  # noqa: D102
        return f"levels={list(self.levels.shape)}, {super().extra_repr()}"
