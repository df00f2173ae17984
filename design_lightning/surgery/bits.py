"""Whether each binarizer of a network divides what it sees: one forward of real numbers through the binary network.

DeSign's thresholds are standard deviations of a batch-normalised input. Behind an attention, in a gated product or with small
initial weights an input may be so small that hardly a value reaches them, and the bits say nothing. Such a DeSign takes the size
of its input as its `unit`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from design_lightning.binary import BinaryActivation, DeSign
from design_lightning.surgery.stages import binary_layers
from design_lightning.surgery.traceless import forward_without_trace

LEAST_SHARE = 0.01
"""A binarizer with a smaller share of one sign than this hardly divides its input."""


@dataclass
class BitCheck:
    """What the forward showed.

    Args:
        units: DeSigns whose input hardly reached a threshold, and the unit that they have now.
        constant: binarizers of which less than `LEAST_SHARE` of the bits have one of the signs, and still do.
        uncalled: binarizers that the forward did not call.
        failure: why the forward did not go through, if it did not.
    """

    units: dict[str, float] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    failure: Exception | None = None


def check_bits_(model: nn.Module, x: Tensor) -> BitCheck:
    """Runs x through a binarized model in eval mode, sets the units that it needs, and names binarizers that hardly divide.

    Norms that have seen no batch yet use this one's statistics. Nothing but units is changed.
    """
    try:
        return _checked(model, x, [m for m in model.modules() if _is_fresh(m)])
    except Exception:
        try:  # one value a channel, say, has no deviation
            return _checked(model, x, [])
        except Exception as error:  # whatever a foreign forward may raise
            return BitCheck(failure=error)


def _is_fresh(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.num_batches_tracked is not None and int(module.num_batches_tracked) == 0
    )


def _checked(model: nn.Module, x: Tensor, fresh_norms: list[nn.Module]) -> BitCheck:
    with forward_without_trace(model, fresh_norms), _binary_inputs(model), watched_bits_(model) as seen:
        model(x)
    return seen


@contextmanager
def watched_bits_(model: nn.Module) -> Iterator[BitCheck]:
    """Watches the binarizers of the forwards inside, and sets the units that they need before they run.

    If they fail, the units are as before.
    """
    seen = BitCheck()
    divides: dict[str, bool] = {}
    layers = {name: layer.activation for name, layer in binary_layers(model).items() if layer.activation is not None}
    before = {name: activation.unit.clone() for name, activation in layers.items() if isinstance(activation, DeSign)}

    def watch(name: str, activation: BinaryActivation) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if divides.get(name) or _divides(activation, inputs[0]):
                divides[name] = True
            elif isinstance(activation, DeSign) and _take_unit(activation, inputs[0]):
                divides[name] = True
                seen.units[name] = activation.unit.item()
            else:
                divides[name] = False

        return activation.register_forward_pre_hook(hook)

    handles = [watch(name, activation) for name, activation in layers.items()]
    try:
        yield seen
    except BaseException:
        for name, unit in before.items():
            layers[name].get_buffer("unit").copy_(unit)
        raise
    finally:
        for handle in handles:
            handle.remove()
        seen.constant = [name for name, both in divides.items() if not both]
        seen.uncalled = [name for name in layers if name not in divides]


@torch.no_grad()
def _divides(activation: BinaryActivation, x: Tensor) -> bool:
    share = (x.float() >= activation.threshold(x)).float().mean()
    return bool(share >= LEAST_SHARE) and bool(share <= 1 - LEAST_SHARE)


@torch.no_grad()
def _take_unit(activation: DeSign, x: Tensor) -> bool:
    """Sets the unit of a DeSign to the size of x; whether that helped.

    The size is the standard deviation that a normal distribution around 0 of this mean absolute value has: far values, of
    which there may be a few, count less in it than in the root mean square.
    """
    before = activation.unit.clone()
    unit = x.float().abs().mean() * math.sqrt(math.pi / 2)
    if not bool(torch.isfinite(unit)) or unit == 0:
        return False
    activation.unit.copy_(unit)
    if _divides(activation, x):
        return True
    activation.unit.copy_(before)
    return False


@contextmanager
def _binary_inputs(model: nn.Module) -> Iterator[None]:
    """In stage `float` no binarizer runs, so the forward runs in `both`."""
    layers = [layer for layer in binary_layers(model).values() if layer.stage == "float"]
    for layer in layers:
        layer.stage = "both"
    try:
        yield
    finally:
        for layer in layers:
            layer.stage = "float"
