"""Which modules stand between a binary convolution and the next one, found by watching one forward."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from design_lightning.binary.companions import ChannelPReLU, RPReLU
from design_lightning.binary.packed import PackedConv2d, PackedLayer

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
BY_ELEMENT = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid),
    *(nn.GELU, nn.SiLU, nn.Hardswish, nn.PReLU, nn.Dropout, nn.Dropout2d),
    *(ChannelPReLU, RPReLU),
)
"""Modules that map each value by itself, the same for a whole channel. Whether they are monotone is found out by their values."""


@dataclass
class Call:
    """One call of a module."""

    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass
class Watched:
    """What a forward showed.

    Args:
        calls: of the modules that a chain may have, in their order.
        users: of each tensor, by `id`: the calls that read it, and None for each function outside of them.
    """

    calls: list[Call] = field(default_factory=list)
    users: dict[int, list[Call | None]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    """All of the tensors, so that no `id` is given twice."""

    def calls_of(self, module: nn.Module) -> list[Call]:
        """The calls of a module."""
        return [call for call in self.calls if call.module is module]

    def only_user(self, tensor: Tensor) -> Call | None:
        """The call that reads a tensor, if nothing else does."""
        users = self.users.get(id(tensor), [])
        return users[0] if len(users) == 1 else None


def is_link(module: nn.Module) -> bool:
    """Whether a module may stand in a chain."""
    return isinstance(module, (*NORMS, *BY_ELEMENT, nn.MaxPool2d, PackedLayer)) or is_norm_act(module)


def is_norm_act(module: nn.Module) -> bool:
    """Whether it is timm's batch norm with an activation inside."""
    return type(module) is BatchNormAct2d


@torch.no_grad()
def watch(model: nn.Module, x: Tensor) -> Watched:
    """Runs a model in eval mode on a batch."""
    watched = Watched()
    links = [module for module in model.modules() if is_link(module)]
    inplace = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    mode = _Uses(watched)
    with ExitStack() as stack:
        for module in inplace:
            module.inplace = False  # type: ignore[assignment]  # an output that is its input would be no tensor of its own
            stack.callback(setattr, module, "inplace", True)
        stack.enter_context(mode.hooks(links))
        stack.enter_context(mode)
        model(x)
    return watched


class _Uses(TorchFunctionMode):
    """Notes who reads which tensor; what happens inside a link counts as the link's."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched
        self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and not _is_inspection(func):
            for value in _tensors([args, kwargs or {}]):
                self._note(value, None)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor, user: Call | None) -> None:
        self.watched.kept.append(tensor)
        self.watched.users.setdefault(id(tensor), []).append(user)

    @contextmanager
    def hooks(self, links: list[nn.Module]) -> Iterator[None]:
        """Inside, calls of these modules are noted."""

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.inside += 1

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.inside -= 1
            if self.inside or output is inputs[0]:  # part of another link; or nothing happened
                return
            call = Call(module, inputs[0], output)
            self.watched.calls.append(call)
            self.watched.kept.append(output)
            self._note(inputs[0], call)

        with ExitStack() as stack:
            for module in links:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, prepend=True).remove)
            yield


def _is_inspection(function: Any) -> bool:
    return getattr(function, "__name__", "") in ("__get__", "size", "dim", "numel", "is_contiguous", "stride")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@dataclass(frozen=True)
class Chain:
    """From a binary convolution to the next one.

    Args:
        first: the call that starts it.
        links: what stands between, in the order of their calls.
        last: the call of a binary convolution that reads the end, and alone does.
    """

    first: Call
    links: tuple[Call, ...]
    last: Call

    @property
    def values(self) -> Callable[[Tensor], Tensor]:
        """What the links make of sums [B, C, H, W]: what the last layer compares with its thresholds."""
        layer = self.first.module
        assert isinstance(layer, PackedConv2d)

        def compute(sums: Tensor) -> Tensor:
            y = sums if layer.scale is None else sums * layer.scale.view(-1, 1, 1)
            y = y if layer.bias is None else y + layer.bias.view(-1, 1, 1)
            for call in self.links:
                if not isinstance(call.module, nn.MaxPool2d):
                    y = call.module(y)
            return y

        return compute


def find_chains(watched: Watched) -> tuple[list[Chain], dict[nn.Module, str]]:
    """The chains, and of each other binary convolution why none starts there."""
    chains: list[Chain] = []
    reasons: dict[nn.Module, str] = {}
    for call in watched.calls:
        if not isinstance(call.module, PackedConv2d):
            continue
        found = _follow(watched, call)
        if isinstance(found, Chain):
            chains.append(found)
        else:
            reasons[call.module] = found
    return chains, reasons


def _follow(watched: Watched, first: Call) -> Chain | str:
    assert isinstance(first.module, PackedConv2d)
    if not first.module.multiplies_bits:
        return "its input is not binary"
    links: list[Call] = []
    call = first
    while True:
        if len(watched.calls_of(call.module)) > 1:
            return f"{type(call.module).__name__} is called more than once"
        if call is not first and (call.module._forward_hooks or call.module._forward_pre_hooks):
            return f"somebody watches the {type(call.module).__name__} behind it"
        following = watched.only_user(call.output)
        if following is None:
            return "its output is added, or read by several"
        if isinstance(following.module, PackedLayer):
            if not any(not isinstance(link.module, nn.MaxPool2d) for link in links):
                return "no batch norm or activation stands behind it"
            break
        if isinstance(following.module, nn.MaxPool2d) and links:
            return "a MaxPool2d stands behind its batch norm"
        links.append(following)
        call = following
    last = following.module
    if first.module._forward_hooks:
        return "somebody watches it, or a shortcut goes around it"
    if not isinstance(last, PackedConv2d) or not last.multiplies_bits:
        return f"the {type(last).__name__} behind it has no thresholds for feature maps"
    if len(watched.calls_of(last)) > 1:
        return "the layer behind it is called more than once"
    return Chain(first, tuple(links), following)


def sums_of(layer: PackedConv2d) -> Tensor:
    """All sums that a layer can give: [2 n + 1], from -n to n, where n is its fan-in."""
    fan_in = math.prod(layer.signs.shape[1:])
    return torch.arange(-fan_in, fan_in + 1, dtype=torch.float32)
