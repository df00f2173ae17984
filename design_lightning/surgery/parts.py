"""What the parts of a network hold and compute: 1-bit weights and floats, binary and float operations, bytes.

Operations are counted as the papers count them: a BOP is a multiply-accumulate of +-1 by +-1, a FLOP one of floats (so a multiply
and its add are one), and OPs = BOPs / 64 + FLOPs, because a 64-bit word holds 64 products. Norms, activations and pools are not
counted. Liu et al., Bi-Real Net, ECCV 2018, arXiv:1808.00278; Liu et al., ReActNet, ECCV 2020, arXiv:2003.03488.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn
from torch.nn.parameter import is_lazy

from design_lightning.binary import BinaryLayer
from design_lightning.surgery.float_layers import is_weight_layer

BOPS_A_WORD = 64


@dataclass
class Part:
    """Counts of one part of a network.

    Args:
        modules: the names of the modules that it is of; empty for what the network holds itself.
        kind: the class of the first of them.
        layers: convolutions and linear layers.
        binary_layers: how many of them are binary.
        one_bit: binary weights; a tied weight counts where it stands first.
        floats: all other parameters.
        scales: factors that the weight binarizers compute, one an output channel, which are no parameters.
        bops: binary multiply-accumulates an image, in stage `both`.
        flops: float multiply-accumulates an image.
    """

    modules: tuple[str, ...] = ()
    kind: str = ""
    layers: int = 0
    binary_layers: int = 0
    one_bit: int = 0
    floats: int = 0
    scales: int = 0
    bops: int = 0
    flops: int = 0

    @property
    def name(self) -> str:
        """The names of the modules, or `(own)`."""
        return ", ".join(self.modules) or "(own)"

    @property
    def ops(self) -> float:
        """OPs = BOPs / 64 + FLOPs."""
        return self.bops / BOPS_A_WORD + self.flops

    @property
    def bytes(self) -> int:
        """The size of the parameters with one bit a binary weight."""
        return stored_bytes(self.one_bit, self.floats + self.scales)


def stored_bytes(one_bit: int, floats: int) -> int:
    """The size with one bit a binary weight, and float32 for the rest."""
    return -(-one_bit // 8) + 4 * floats


def total(parts: Iterable[Part]) -> Part:
    """The sum of parts."""
    parts = list(parts)
    names = ("layers", "binary_layers", "one_bit", "floats", "scales", "bops", "flops")
    return Part(("all",), **{name: sum(getattr(part, name) for part in parts) for name in names})


@dataclass(frozen=True)
class Operations:
    """Multiply-accumulates an image, by the name of the module in which they happen.

    Args:
        binary: of +-1 by +-1.
        floats: all others.
    """

    binary: Mapping[str, int] = field(default_factory=dict)
    floats: Mapping[str, int] = field(default_factory=dict)


def binary_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """The latent weights of the model's binary layers, by identity; one that a float layer shares is a float."""
    of_float_layers = {id(getattr(m, "weight", None)) for m in model.modules() if not isinstance(m, BinaryLayer)}
    latent = (cast(nn.Parameter, m.weight) for m in model.modules() if isinstance(m, BinaryLayer))
    return {id(weight): weight for weight in latent if id(weight) not in of_float_layers}


def computed_scales(model: nn.Module) -> int:
    """How many factors weight binarizers compute: a channel each, where they have no parameter for it."""
    layers = (m for m in model.modules() if isinstance(m, BinaryLayer))
    return sum(
        m.weight.shape[0] for m in layers if m.weight_binarizer.has_scale and not list(m.weight_binarizer.parameters())
    )


def count_parts(model: nn.Module, groups: Iterable[Sequence[str]], operations: Operations) -> list[Part]:
    """A part for each group of modules that holds parameters, and one for the parameters that stand outside of all.

    Args:
        model: the network.
        groups: the names of the modules that each part is of, in the order of the network.
        operations: of the network; those outside of all groups count to the last part.
    """
    latent = binary_weights(model)
    modules = dict(model.named_modules())
    seen: set[int] = set()
    parts = []
    for names in groups:
        part = Part(tuple(names), type(modules[names[0]]).__name__)
        for name in names:
            _add_parameters(part, modules[name].parameters(), latent, seen)
            inside = list(modules[name].modules())
            part.layers += sum(isinstance(m, nn.Conv2d | nn.Linear) for m in inside)
            part.binary_layers += sum(isinstance(m, BinaryLayer) for m in inside)
            part.scales += computed_scales(modules[name])
        if part.one_bit or part.floats:
            parts.append(part)
    own = Part(kind=type(model).__name__)
    _add_parameters(own, model.parameters(), latent, seen)
    homes = {name: part for part in parts for name in part.modules}
    for name, count in operations.binary.items():
        _home(name, homes, own).bops += count
    for name, count in operations.floats.items():
        _home(name, homes, own).flops += count
    return [*parts, own] if own.one_bit or own.floats or own.ops else parts


def _add_parameters(
    part: Part, parameters: Iterable[nn.Parameter], latent: Mapping[int, nn.Parameter], seen: set[int]
) -> None:
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            count = 0 if is_lazy(parameter) else parameter.numel()
            part.one_bit += count if id(parameter) in latent else 0
            part.floats += 0 if id(parameter) in latent else count


def _home(name: str, homes: Mapping[str, Part], own: Part) -> Part:
    """The part of a module: that of its nearest ancestor that is of one."""
    while name and name not in homes:
        name = name.rpartition(".")[0]
    return homes.get(name, own)


def stages_of(model: nn.Module, outputs: Mapping[str, tuple[int, ...]]) -> list[tuple[str, ...]]:
    """The stages of a network as groups of modules, for `count_parts`.

    A stage is a child of the network. A child whose own children give several shapes is a row of stages, as `blocks` of a
    MobileNet or `stages` of a ConvNeXt, and is taken apart; one whose children all give the same is a stage, as `layer1` of a
    ResNet or `blocks` of a ViT. Sisters with at most one layer each are one stage: a stem of convolution and norm, a head.

    Args:
        model: the network.
        outputs: the shape that each module gave, by its name.
    """
    groups: list[tuple[str, ...]] = []
    mother_of_small = None
    for name, module in _taken_apart("", model, outputs):
        if not any(True for _ in module.parameters()):
            continue
        is_small = sum(is_weight_layer(m) for m in module.modules()) <= 1
        mother = name.rpartition(".")[0] if is_small else None
        if is_small and mother == mother_of_small:
            groups[-1] = (*groups[-1], name)
        else:
            groups.append((name,))
        mother_of_small = mother
    return groups


def _taken_apart(
    prefix: str, module: nn.Module, outputs: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        inner = [f"{name}.{key}" for key, part in child.named_children() if any(True for _ in part.children())]
        if len({outputs[key] for key in inner if key in outputs}) > 1:
            yield from _taken_apart(f"{name}.", child, outputs)
        else:
            yield name, child
