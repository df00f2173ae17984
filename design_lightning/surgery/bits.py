"""Whether each binarizer of a network divides what it sees: one forward of real numbers through the binary network.

DeSign's thresholds are standard deviations of a batch-normalised input. Behind an attention, in a gated product or with small
initial weights an input may be so small that it reaches none of them, and every bit is -1. Such a DeSign takes the root mean
square of its input as its `unit`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from design_lightning.binary import BinaryActivation, DeSign
from design_lightning.surgery.stages import binary_layers


@dataclass
class BitCheck:
    """What the forward showed.

    Args:
        units: DeSigns whose input reached no threshold, and the unit that they have now.
        constant: binarizers that gave one and the same bit for the whole batch, and still do.
        failure: why the forward did not go through, if it did not.
    """

    units: dict[str, float] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)
    failure: str | None = None


@torch.no_grad()
def check_bits_(model: nn.Module, x: Tensor) -> BitCheck:
    """Runs x through a binarized model in eval mode, sets the units that it needs, and names binarizers that are constant.

    Norms that have seen no batch yet use this one's statistics, which they do not keep.
    """
    try:
        return _checked(model, x, [m for m in model.modules() if _is_fresh(m)])
    except Exception as first:
        try:  # one value a channel, say, has no deviation
            return _checked(model, x, [])
        except Exception:  # whatever a foreign forward may raise
            return BitCheck(failure=f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}")


def _is_fresh(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.num_batches_tracked is not None and int(module.num_batches_tracked) == 0
    )


def _checked(model: nn.Module, x: Tensor, fresh_norms: list[nn.Module]) -> BitCheck:
    with _modes_for_checking(model, fresh_norms), _binary_inputs(model), watched_bits_(model) as seen:
        model(x)
    return seen


@contextmanager
def watched_bits_(model: nn.Module) -> Iterator[BitCheck]:
    """Watches the binarizers of the forwards inside, and sets the units that they need before they run."""
    seen = BitCheck()
    varied: dict[str, bool] = {}

    def watch(name: str, activation: BinaryActivation) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if varied.get(name) or _has_both_bits(activation, inputs[0]):
                varied[name] = True
            elif isinstance(activation, DeSign) and _take_unit(activation, inputs[0]):
                varied[name] = True
                seen.units[name] = activation.unit.item()
            else:
                varied[name] = False

        return activation.register_forward_pre_hook(hook)

    layers = binary_layers(model).items()
    handles = [watch(name, layer.activation) for name, layer in layers if layer.activation is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.constant = [name for name, both in varied.items() if not both]


@torch.no_grad()
def _has_both_bits(activation: BinaryActivation, x: Tensor) -> bool:
    bits = x.float() >= activation.threshold(x)
    return bool(bits.any()) and not bool(bits.all())


@torch.no_grad()
def _take_unit(activation: DeSign, x: Tensor) -> bool:
    """Sets the unit of a DeSign to the size of x; whether that made a difference."""
    unit = x.float().square().mean().sqrt()
    if not bool(torch.isfinite(unit)) or unit == 0:
        return False
    activation.unit.copy_(unit)
    if _has_both_bits(activation, x):
        return True
    activation.unit.fill_(1)
    return False


@contextmanager
def _modes_for_checking(model: nn.Module, fresh_norms: list[nn.Module]) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    kept = [(buffer, buffer.clone()) for norm in fresh_norms for buffer in norm.buffers()]
    model.eval()
    for norm in fresh_norms:
        norm.training = True
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
        for module, mode in training.items():
            module.training = mode


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
