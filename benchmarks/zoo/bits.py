"""What the binary layers of a network do while it runs: the bits that they make, and what they multiply."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from design_lightning.binary import BinaryLayer, DeSign
from design_lightning.surgery import binary_layers
from zoo.checks import expect

LEAST_SHARE = 0.001
"""Of a binarizer's bits on the batch: the rarer of the two signs has at least this share."""


class Bits:
    """Counts the signs that each binarizer gives, and those that a plain Sign would give in its place."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.multiplied: set[str] = set()
        self.numbers: Counter[str] = Counter()
        self.positive: Counter[str] = Counter()
        self.positive_inputs: Counter[str] = Counter()

    def watch(self, name: str, layer: BinaryLayer) -> list[RemovableHandle]:
        """Hooks that tell when a layer runs."""

        def begin(*_: Any) -> None:
            self.running.append(name)

        def end(*_: Any) -> None:
            self.running.pop()

        return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]

    def watch_activation(self, name: str, activation: nn.Module) -> RemovableHandle:
        """A hook that looks at a binarizer's input and bits. With one, a layer runs another function than it trains with."""

        def look(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            expect(bool((output.abs() == 1).all()), f"{name} gives other values than +-1")
            self.numbers[name] += output.numel()
            self.positive[name] += int((output > 0).sum())
            self.positive_inputs[name] += int((inputs[0] >= 0).sum())

        return activation.register_forward_hook(look)

    def shares(self, plain: bool = False) -> dict[str, float]:
        """The rarer sign's share of each binarizer's bits; `plain`: of the bits of a Sign without thresholds."""
        shares = {
            name: (self.positive_inputs if plain else self.positive)[name] / n for name, n in self.numbers.items()
        }
        return {name: min(share, 1 - share) for name, share in shares.items()}

    def check(self, model: nn.Module) -> float:
        """Every binary layer ran, multiplied bits by bits, and saw both signs; returns the least share of a sign."""
        for what, names in (("called", self.numbers.keys()), ("multiplied", self.multiplied)):
            idle = binary_layers(model).keys() - names
            expect(not idle, f"{len(idle)} binary layers were not {what}, such as {sorted(idle)[:3]}")
        _expect_both_signs(self.shares(), LEAST_SHARE, "")
        return min(self.shares().values())

    def check_inputs(self) -> None:
        """A plain Sign in place of each binarizer would see both signs: behind a ReLU that was left in place it does not."""
        _expect_both_signs(self.shares(plain=True), 0, "without thresholds ")


def _expect_both_signs(shares: dict[str, float], least: float, when: str) -> None:
    one_sided = {name: share for name, share in shares.items() if share == 0 or share < least}
    some = ", ".join(f"{name} ({share:.2%})" for name, share in list(one_sided.items())[:3])
    expect(not one_sided, f"{when}{len(one_sided)} binarizers are constant, or nearly: {some}")


class _Products(TorchFunctionMode):
    """Looks at both factors of every convolution and linear map that a binary layer computes."""

    def __init__(self, bits: Bits) -> None:
        super().__init__()
        self.bits = bits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.bits.running and function in (F.conv2d, F.linear):
            name = self.bits.running[-1]
            image, channels = args[0].detach()[:1].abs(), args[1].detach()[:16].abs().flatten(1)  # a part shows it
            expect(bool(((image == 1) | (image == 0)).all()), f"{name} multiplies other inputs than +-1 and padding")
            expect(bool((channels == channels[:, :1]).all()), f"{name} multiplies by weights of more than one bit")
            self.bits.multiplied.add(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def watched_products(model: nn.Module) -> Iterator[Bits]:
    """Watches what the binary layers of a model multiply in the forwards inside, by the functions that they train with."""
    bits = Bits()
    handles = [handle for name, layer in binary_layers(model).items() for handle in bits.watch(name, layer)]
    try:
        with _Products(bits):
            yield bits
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_bits(model: nn.Module) -> Iterator[Bits]:
    """Watches also the binarizers."""
    with watched_products(model) as bits:
        activations = {name: layer.activation for name, layer in binary_layers(model).items() if layer.activation}
        handles = [bits.watch_activation(name, activation) for name, activation in activations.items()]
        try:
            yield bits
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes the hooks off the binarizers for a while, so that their layers run the functions that they train with."""
    activations = [layer.activation for layer in binary_layers(model).values() if layer.activation]
    hooks = [(a, a._forward_hooks, a._forward_pre_hooks) for a in activations]
    for activation, _, _ in hooks:
        activation._forward_hooks, activation._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for activation, forward_hooks, forward_pre_hooks in hooks:
            activation._forward_hooks, activation._forward_pre_hooks = forward_hooks, forward_pre_hooks


@contextmanager
def plain_signs_(model: nn.Module) -> Iterator[None]:
    """Takes the thresholds of every DeSign to 0 for a while: then it is the plain Sign."""
    activations = [layer.activation for layer in binary_layers(model).values()]
    scales = [(a.scale, a.scale.clone()) for a in activations if isinstance(a, DeSign)]
    for scale, _ in scales:
        scale.zero_()
    try:
        yield
    finally:
        for scale, value in scales:
            scale.copy_(value)


def count_units(model: nn.Module) -> int:
    """How many DeSigns took the size of their input as the unit of their thresholds."""
    activations = (layer.activation for layer in binary_layers(model).values())
    return sum(isinstance(a, DeSign) and not a.unit.is_meta and float(a.unit) != 1 for a in activations)
