"""Feature maps of named layers, taken while a network runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from design_lightning._names import did_you_mean


class FeatureMaps:
    """Keeps what layers of a network put out, [B, C, H, W], while it is asked to.

    Args:
        network: stays as it is, but for the hooks; a timm network whose `output_fmt` is NHWC has its maps turned.
        layers: names of modules. Of one that runs several times, the last output counts.

    Raises:
        ValueError: if the network has no layer of that name; names the nearest.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(network.named_modules())
        for name in layers:
            if not name or name not in modules:
                raise ValueError(f"{type(network).__name__} has no layer {name!r}: {did_you_mean(name, modules)}")
        self._channels_first = getattr(network, "output_fmt", "NCHW") != "NHWC"
        self._recording = False
        self._maps: dict[str, Tensor] = {}
        self._hooks = [_last(modules[name]).register_forward_hook(partial(self._keep, name)) for name in layers]

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._recording:
            self._maps[name] = output if self._channels_first else output.permute(0, 3, 1, 2)

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """The maps by layer, which fill while the network runs inside of the block, and are gone behind it."""
        self._recording = True
        try:
            yield self._maps
        finally:
            self._recording = False
            self._maps = {}

    def remove(self) -> None:
        """Takes the hooks off the network."""
        for hook in self._hooks:
            hook.remove()


def _last(module: nn.Module) -> nn.Module:
    """The module whose output is that of this one: under gradient checkpointing timm runs a stage's blocks one by one."""
    while type(module).forward is nn.Sequential.forward and len(module):  # type: ignore[arg-type]
        module = module[-1]  # type: ignore[index]
    return module


def common_stages(first: nn.Module, second: nn.Module) -> list[tuple[str, str]]:
    """Pairs of layers, one of each network, that end stages of the same reduction, after timm's `feature_info` of both."""
    ends, other_ends = _stage_ends(first), _stage_ends(second)
    return [(ends[reduction], other_ends[reduction]) for reduction in sorted(ends.keys() & other_ends.keys())]


def _stage_ends(network: nn.Module) -> dict[int, str]:
    """The last layer of each reduction: how many pixels of the image a pixel of the map stands for, along an axis."""
    info: Any = getattr(network, "feature_info", None) or []
    return {stage["reduction"]: stage["module"] for stage in info}
