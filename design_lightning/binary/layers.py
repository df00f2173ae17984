"""`BinaryConv2d` and `BinaryLinear`: float layers whose input and weights become +-1.

The binarizer sits at the input of the layer, so that the stream between layers stays real-valued. The latent weights are
the ordinary parameter `weight`, under the float layer's state-dict key; the +-1 weights exist only in forward.

A layer has a stage, a plain attribute that travels in its state dict:

    float        the float layer, unchanged
    activations  binary input, latent weights
    both         binary input, binary weights
"""

from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from design_lightning._adopt import adopt
from design_lightning.binary.activations import BinaryActivation, Layout
from design_lightning.binary.functional import binarized_product, multiply_bits
from design_lightning.binary.keeping import Keeping
from design_lightning.binary.lean import mark_counts
from design_lightning.binary.products import Convolution, Linear, PaddingMode, Product
from design_lightning.binary.weights import WeightBinarizer, make_weight_binarizer

Stage = Literal["float", "activations", "both"]
PaddingValue = Literal[0, 1, -1, "replicate"]


class BinaryLayer(Keeping):
    """What the binary layers share; it stands before a float layer among a class's bases."""

    weight: Tensor
    activation: BinaryActivation | None
    weight_binarizer: WeightBinarizer
    stage: Stage
    layout: ClassVar[Layout]
    float_class: type[nn.Module]
    """What `to_float` gives."""

    def _make_binary(
        self,
        activation: BinaryActivation | None,
        weight: str | WeightBinarizer,
        weight_args: dict[str, Any] | None,
        stage: Stage,
    ) -> None:
        if activation is not None and activation.layout != self.layout:
            axis = "first" if self.layout == "NCHW" else "last"
            raise ValueError(
                f"a {type(self).__name__} has its channels {axis}: give {type(activation).__name__} layout={self.layout!r}"
            )
        self.activation = activation
        if isinstance(weight, WeightBinarizer):
            self.weight_binarizer = weight
        else:
            self.weight_binarizer = make_weight_binarizer(weight, self.latent_weight(), **(weight_args or {}))
        self.set_stage(stage)

    def to_float(self) -> nn.Module:
        """The float layer that this one was, of the class that it had, with the latent weights as its weights.

        Nothing is copied. What only the binary layer had (thresholds, scales, shifts) is not in it.
        """
        layer = adopt(self.float_class, self)
        for name in ("activation", "weight_binarizer"):
            layer._modules.pop(name, None)
            layer.__dict__.pop(name, None)
        for name in ("stage", "padding_value", "float_class", "keeps"):
            layer.__dict__.pop(name, None)
        return layer

    def latent_weight(self) -> Tensor:
        """The real-valued weights that are binarized: the parameter, or what the float layer makes of it (standardised)."""
        return self.weight

    def set_stage(self, stage: Stage) -> None:
        """Sets what is binary from the next forward on.

        When binary weights follow real ones, a learned scale starts anew from the latent weights as they are by then.

        Raises:
            ValueError: if the stage is none of `float`, `activations`, `both`.
        """
        if stage not in get_args(Stage):
            raise ValueError(f"unknown stage {stage!r}: use one of {', '.join(get_args(Stage))}")
        if stage == "both" and getattr(self, "stage", "both") != "both":
            self.weight_binarizer.reset_scale(self.latent_weight())
        self.stage = stage

    @property
    def input_is_binary(self) -> bool:
        """Whether the layer binarizes its input now; not in stage `float`, nor where only its weights are binary."""
        return self.stage != "float" and self.activation is not None

    def stage_input(self, x: Tensor) -> Tensor:
        """The input as the stage has it: +-1, or unchanged."""
        if self.activation is None:
            return x
        return cast(Tensor, self.activation(x)) if self.stage != "float" else _with_idle(x, self.activation)

    def stage_weight(self) -> Tensor:
        """The weights as the stage has them: signs times scale in `both`, else the latent ones."""
        latent = self.latent_weight()
        return (
            cast(Tensor, self.weight_binarizer(latent))
            if self.stage == "both"
            else _with_idle(latent, self.weight_binarizer)
        )

    @property
    def _multiplies_bits(self) -> bool:
        """Whether the input of the product is known to be +-1 alone."""
        return self.input_is_binary and cast(BinaryActivation, self.activation).gives_bits

    def _multiply(self, x: Tensor, product: Product) -> Tensor:
        """The product of the binarized input by the weights of the stage."""
        activation = cast(BinaryActivation, self.activation)
        weight, bias = self.stage_weight(), cast(Tensor | None, self.bias)
        is_binary = self.stage == "both" and self.weight_binarizer.gives_bits
        if _is_hooked(activation):
            y = multiply_bits(activation(x), weight, bias, product, is_binary, self.keeps)
        else:
            threshold = activation.threshold(x)
            keeps = activation.keeps
            y = binarized_product(x, threshold, activation.estimator, weight, bias, product, is_binary, keeps)
        if is_binary and bias is None:
            mark_counts(y, weight.detach().flatten(1)[:, 0].abs(), weight[0].numel())
        return y

    def get_extra_state(self) -> dict[str, str]:
        """The stage, for the state dict."""
        return {"stage": self.stage}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The stage, from a state dict, which brings the scales that belong to it.

        Raises:
            ValueError: if there is no such stage.
        """
        if type(state).__module__.startswith("torch.distributed"):
            return  # a placeholder: weights are loaded into shards one by one, and no extra state
        stage: Any = state.get("stage") if isinstance(state, dict) else state
        if stage not in get_args(Stage):
            raise ValueError(f"unknown stage {stage!r} in a state dict: use one of {', '.join(get_args(Stage))}")
        self.stage = stage


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see the module's own forward or backward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _with_idle(value: Tensor, module: nn.Module) -> Tensor:
    """The value unchanged, with a gradient of zero for the parameters of a module that this stage does not use.

    DDP waits for the gradient of every parameter, and a stage must not change which ones are trained.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            value = value + 0 * parameter.sum().to(value.dtype)
    return value


class BinaryConv2d(BinaryLayer, nn.Conv2d):
    """A 2-D convolution of +-1 inputs [B, C, H, W] by +-1 weights [O, C / groups, kh, kw] times a scale per output channel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            `torch.nn.Conv2d`; the bias is real-valued.
        activation: the binarizer of the input, or None for a layer whose weights alone are binary.
        weight: a name of `WEIGHT_BINARIZERS`, the dotted path of a class, or a `WeightBinarizer`.
        weight_args: what the class of that name takes, such as `{"tau": 0.9}` for `recu`.
        padding_value: what the border of the binary input is padded with: 0 (a third value), +1, -1, or `replicate` its
            edge. An input that is not binarized is padded with zeros, or replicated.
        stage: see the module's text.

    Raises:
        ValueError: if a name is unknown, the activation takes its channels from the wrong axis, or `padding_value` is
            given together with a `padding_mode`.

    >>> import torch
    >>> from design_lightning.binary import DeSign
    >>> layer = BinaryConv2d(4, 8, 3, padding=1, activation=DeSign("2x2_v1"), weight="sign")
    >>> layer(torch.randn(2, 4, 5, 5)).unique().remainder(1).any().item()  # sums of +-1 are whole numbers
    False
    """

    layout: ClassVar[Layout] = "NCHW"
    float_class = nn.Conv2d
    padding_value: PaddingValue

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        activation: BinaryActivation | None,
        weight: str | WeightBinarizer = "xnor",
        weight_args: dict[str, Any] | None = None,
        padding_value: PaddingValue = 0,
        stage: Stage = "both",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        )
        self._set_padding_value(padding_value)
        self._make_binary(activation, weight, weight_args, stage)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        activation: BinaryActivation | None,
        weight: str | WeightBinarizer = "xnor",
        weight_args: dict[str, Any] | None = None,
        padding_value: PaddingValue = 0,
        stage: Stage = "both",
    ) -> Self:
        """The binary twin of a float convolution; it takes over its parameters, without a copy. Arguments as in the class."""
        layer = adopt(cls, conv)
        layer.float_class = type(conv)
        layer._set_padding_value(padding_value)
        layer._make_binary(activation, weight, weight_args, stage)
        return layer

    def _set_padding_value(self, padding_value: PaddingValue) -> None:
        if padding_value not in get_args(PaddingValue):
            raise ValueError(f"padding_value must be 0, 1, -1 or 'replicate', not {padding_value!r}")
        if padding_value != 0 and self.padding_mode != "zeros":
            raise ValueError(
                f"padding_value {padding_value!r} does not go with padding_mode {self.padding_mode!r}; use 0 to keep the mode"
            )
        self.padding_value = padding_value

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102  named as in the float layer
        if self._multiplies_bits and input.dim() == 4:
            return self._multiply(input, self.convolution_of(input))
        return self.convolve(self.stage_input(input), self.stage_weight())

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Pads x with `padding_value` and convolves it."""
        if self.padding_value == 0 and not self.pads_by_input_size:
            return self._conv_forward(x, weight, self.bias)
        return F.conv2d(self.pad(x), weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def convolution_of(self, x: Tensor) -> Convolution:
        """The convolution, with its padding, for an input of the size of x."""
        plain = Convolution(self.stride, (0, 0), self.dilation, self.groups)
        if self.padding_value == 0 and not self.pads_by_input_size and self.padding_mode == "zeros":
            left, right, top, bottom = self._reversed_padding_repeated_twice
            if (left, top) == (right, bottom):
                return plain._replace(padding=(top, left))
        border = self.padding_of(x)
        if self.padding_value == "replicate":
            return plain._replace(border=border, mode="replicate")
        if self.padding_mode != "zeros":
            return plain._replace(border=border, mode=cast(PaddingMode, self.padding_mode))
        return plain._replace(border=border, value=self.padding_value)

    @property
    def pads_by_input_size(self) -> bool:
        """Whether the padding depends on the input's size (TensorFlow's SAME), so that the convolution itself has none."""
        return False

    def padding_of(self, x: Tensor) -> tuple[int, int, int, int]:
        """How many pixels are added at the left, right, top and bottom of x."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return left, right, top, bottom

    def pad(self, x: Tensor) -> Tensor:
        """x with its padding around it."""
        pads = self.padding_of(x)
        if self.padding_value == "replicate":
            # torch's replication refuses an empty batch, for which any value will do.
            return F.pad(x, pads, mode="replicate") if x.numel() else F.pad(x, pads)
        return F.pad(x, pads, value=self.padding_value if self.input_is_binary else 0)

    def extra_repr(self) -> str:  # noqa: D102
        padding = "" if self.padding_value == 0 else f", padding_value={self.padding_value!r}"
        return f"{super().extra_repr()}{padding}, stage={self.stage}"


class BinaryLinear(BinaryLayer, nn.Linear):
    """A linear layer of +-1 inputs [..., I] by +-1 weights [O, I] times a scale per output channel.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`; the bias is real-valued.
        activation: the binarizer of the input, of layout NHWC, or None for a layer whose weights alone are binary.
        weight, weight_args, stage: as in `BinaryConv2d`.

    Raises:
        ValueError: if a name is unknown, or the activation takes its channels from the wrong axis.
    """

    layout: ClassVar[Layout] = "NHWC"
    float_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: BinaryActivation | None,
        weight: str | WeightBinarizer = "xnor",
        weight_args: dict[str, Any] | None = None,
        stage: Stage = "both",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._make_binary(activation, weight, weight_args, stage)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        activation: BinaryActivation | None,
        weight: str | WeightBinarizer = "xnor",
        weight_args: dict[str, Any] | None = None,
        stage: Stage = "both",
    ) -> Self:
        """The binary twin of a float linear layer; it takes over its parameters, without a copy. Arguments as in the class."""
        layer = adopt(cls, linear)
        layer.float_class = type(linear)
        layer._make_binary(activation, weight, weight_args, stage)
        return layer

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if self._multiplies_bits:
            return self._multiply(input, Linear())
        return F.linear(self.stage_input(input), self.stage_weight(), self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, stage={self.stage}"
