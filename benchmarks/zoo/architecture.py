"""The float networks of the sweep: which there are, at which size, and with or without storage."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
BATCH = 4
LARGE_TENSOR = 10_000


def architectures(pattern: str = "*") -> list[str]:
    """The names that timm itself lists; whatever others have registered with it is not among them."""
    names = timm.list_models(pattern)
    return [name for name in names if timm.models.model_entrypoint(name).__module__.startswith("timm.")]


@dataclass
class Architecture:
    """A name of timm, the smallest input that it takes, and the arguments for it."""

    name: str
    size: int
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> "Architecture":
        """Finds the size by forwards without numbers: the first of `SIZES` that goes through, else timm's own."""
        plain: nn.Module | None = None
        for size in SIZES:
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, img_size=size)
                arguments = {"img_size": size}
            except Exception:  # it takes no `img_size`, or not this one
                if plain is None:
                    with torch.device("meta"):
                        plain = timm.create_model(name)
                model, arguments = plain, {}
            if _goes_through(model, size):
                return cls(name, size, arguments)
        with torch.device("meta"):
            model = timm.create_model(name)
        return cls(name, model.pretrained_cfg["input_size"][-1])

    def count_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(self.name, **self.arguments).parameters())

    def build(self, large_on_meta: bool = False) -> nn.Module:
        """The float network in training mode, the same each time."""
        torch.manual_seed(0)
        model: nn.Module = lean(self._create) if large_on_meta else self._create()
        _fill_zeros_(model)
        return model.train()

    def _create(self) -> nn.Module:
        return timm.create_model(self.name, **self.arguments)

    def batch(self, count: int = BATCH) -> Tensor:
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


def _goes_through(model: nn.Module, size: int) -> bool:
    try:
        with torch.no_grad():
            model.train()(torch.empty(BATCH, 3, size, size, device="meta"))
    except Exception:
        return False
    return True


@torch.no_grad()
def _fill_zeros_(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.is_floating_point() and (parameter == 0).float().mean() > 0.5:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.normal_(0, 1 / math.sqrt(max(fan_in, 1)))


def lean(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` gives, without storage for parameters of more than `LARGE_TENSOR` numbers; buffers are real."""
    try:
        with _large_parameters_on_meta():
            return build()
    except (NotImplementedError, ValueError):  # it computes buffers on the device of a parameter
        model = build()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_large(module, parameter):
                module._parameters[name] = _on_meta(parameter)
    return model


def _is_large(module: nn.Module, parameter: nn.Parameter) -> bool:
    """By itself, or as the gain of weights that are: those of a layer stand on one device."""
    beside_large = any(p is not None and p.is_meta for p in module._parameters.values())
    return parameter.numel() > LARGE_TENSOR or (beside_large and parameter.dim() > 1)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_meta else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


@contextmanager
def _large_parameters_on_meta() -> Iterator[None]:
    """Large parameters lose their storage as soon as a module has them."""
    register = nn.Module.register_parameter

    def leanly(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and _is_large(self, parameter):
            parameter = _on_meta(parameter)
        register(self, name, parameter)

    nn.Module.register_parameter = leanly  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
