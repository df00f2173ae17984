"""The nodes of our own domain: what each knows of its layer, and the module that emits it while a network is traced."""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from design_lightning.binary.activations import BinaryActivation
from design_lightning.binary.packed import PackedLayer
from design_lightning.binary.products import Convolution, Product

DOMAIN = "design_lightning"
CALL = "call"
"""The attribute that names the call of a layer which a node stands for."""
BATCH = 2
"""Images with which a network is traced."""


class Call(NamedTuple):
    """What one call of a layer is for an input of its size."""

    product: Product
    border: Convolution | None
    """A border that repeats the input: it is put around x and the thresholds, for comparing is by element."""
    levels: Tensor
    shape: tuple[int, ...]
    rows: int
    """Inputs of that shape for one image of the network's: windows of attention are many."""
    attributes: dict[str, Any]


@dataclass(frozen=True)
class BinaryNode:
    """A product of bits in the graph.

    Args:
        key: the layer's name, with `#2` and so on where it is called more than once.
        layer: the packed layer.
        input: the value that it binarizes.
        output: the sums.
        call: what the layer does with an input of this size.
    """

    key: str
    layer: PackedLayer
    input: str
    output: str
    call: Call

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input without its batch, a repeated border included."""
        return self.call.shape

    @property
    def operations(self) -> int:
        """Multiply-adds of +-1 for one image."""
        outputs = self.sums(torch.zeros(1, *self.shape)).numel()
        return self.call.rows * outputs * self.layer.signs[0].numel()

    def padded(self, x: Tensor) -> Tensor:
        """The layer's input as the node has it: with a border around it, if that repeats the input."""
        return x if self.call.border is None else self.call.border.pad(x)

    def thresholds(self) -> Tensor:
        """Those of one input: of `shape`."""
        levels = self.call.levels
        repeats = [-(-size // period) for size, period in zip(self.shape, levels.shape, strict=True)]
        tiled = levels.repeat(repeats)
        return tiled[tuple(slice(size) for size in self.shape)]

    def sums(self, bits: Tensor) -> Tensor:
        """The product of +-1 inputs [B, *shape] by the signs."""
        return self.call.product.apply(bits, self.layer.signs.to(bits.dtype), None)


class StandIn(nn.Module):
    """Emits a packed layer's product as one node.

    It has to be called once before the network is traced: that computes what depends on the size of its input.
    """

    signs: Tensor
    factor: Tensor | None

    def __init__(self, name: str, layer: PackedLayer) -> None:
        super().__init__()
        self.name = name
        self._layer = (layer,)  # no submodule: its tensors are not the graph's
        self.calls: list[Call] = []
        self.done = 0
        self.register_buffer("signs", layer.signs)
        self.register_buffer("factor", layer.scale)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if not torch.compiler.is_exporting():
            self._prepare(input)
            (layer,) = self._layer
            return cast(Tensor, layer(input))
        call, levels = self.calls[self.done], getattr(self, f"levels{self.done}")
        self.done += 1
        x = input if call.border is None else call.border.pad(input)
        sums = call.product.apply(x, self.signs.to(x.dtype), None)  # for its shape
        kind = "BinaryConv" if isinstance(call.product, Convolution) else "BinaryLinear"
        y = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{kind}", (x, levels, self.signs), call.attributes, dtype=sums.dtype, shape=sums.shape, version=1
        )
        if self.factor is not None:
            y = y * call.product.per_output(self.factor)
        return y if self.bias is None else y + call.product.per_output(self.bias)

    def _prepare(self, input: Tensor) -> None:
        (layer,) = self._layer
        example = input[:1]
        assert isinstance(layer.activation, BinaryActivation)
        product, threshold = layer.product_of(example), layer.activation.threshold(example).expand(example.shape)
        border = None
        attributes: dict[str, Any] = {CALL: f"{self.name}#{len(self.calls) + 1}"}
        if isinstance(product, Convolution):
            if product.mode != "constant":
                border, product = product, product._replace(border=(0, 0, 0, 0))
                threshold = border.pad(threshold)
            left, right, top, bottom = product.border
            vertical, horizontal = product.padding
            attributes |= {
                "strides": list(product.stride),
                "dilations": list(product.dilation),
                "pads": [top + vertical, left + horizontal, bottom + vertical, right + horizontal],
                "pad_value": int(product.value),
                "group": product.groups,
            }
        levels = smallest_period(threshold[0])
        self.register_buffer(f"levels{len(self.calls)}", levels)
        self.calls.append(Call(product, border, levels, tuple(threshold.shape[1:]), len(input) // BATCH, attributes))


def smallest_period(values: Tensor) -> Tensor:
    """The smallest block that, repeated along every axis and cut, gives the values."""
    for axis in range(values.dim()):
        size = values.shape[axis]
        for period in range(1, size):
            if torch.equal(values.narrow(axis, period, size - period), values.narrow(axis, 0, size - period)):
                values = values.narrow(axis, 0, period)
                break
    return values.clone()
