"""The rules by which a layer stays float: first, last, depthwise, gate, downsample. Each gives its reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import timm.layers as timm_layers
import timm.models._efficientnet_blocks as efficientnet_blocks
from timm.layers.cbam import CbamModule, LightCbamModule
from timm.layers.selective_kernel import SelectiveKernelAttn
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet
from timm.models.csatv2 import SpatialAttention as CsatSpatialAttention
from torch import nn

from design_lightning.surgery.config import SkipRule
from design_lightning.surgery.float_layers import is_weight_layer
from design_lightning.surgery.flow import Flow
from design_lightning.surgery.probe import Probe

_HEADLESS = (FeatureDictNet, FeatureGetterNet, FeatureHookNet, FeatureListNet)

_GATES = (
    *(timm_layers.SEModule, timm_layers.EffectiveSEModule, efficientnet_blocks.SqueezeExcite),
    *(timm_layers.EcaModule, timm_layers.CecaModule, timm_layers.GatherExcite, timm_layers.GlobalContext),
    *(CbamModule, LightCbamModule, SelectiveKernelAttn, timm_layers.BatNonLocalAttn),
    CsatSpatialAttention,
)


@dataclass(frozen=True)
class Facts:
    """What the rules look at: the model, what the probe saw of it, and which layers are its classifier."""

    model: nn.Module
    probe: Probe | None
    order: list[str]
    classifier: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, probe: Probe | None) -> "Facts":
        """The facts about a model; `probe` is None where no probing forward went through."""
        in_tree = [name for name, module in model.named_modules() if is_weight_layer(module)]
        order = list(probe.layers) if probe else in_tree
        return cls(model, probe, order, frozenset(_classifier(model, order)))


def _classifier(model: nn.Module, order: list[str]) -> list[str]:
    """The layers of timm's classifier; of any other model, the last that runs. None in a network without a head."""
    if isinstance(model, _HEADLESS):
        return []
    if not hasattr(model, "get_classifier"):
        return [] if hasattr(model, "feature_info") else order[-1:]  # timm's networks of features alone have no head
    heads: Any = cast(Any, model).get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    inside = {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}
    return [name for name, module in model.named_modules() if id(module) in inside and is_weight_layer(module)]


def _first(name: str, layer: nn.Module, facts: Facts) -> str | None:
    if facts.probe is None:
        return "the first layer of the module tree" if facts.order[:1] == [name] else None
    return "reads the network's input" if facts.probe.layers[name].flow.from_input else None


def _last(name: str, layer: nn.Module, facts: Facts) -> str | None:
    if name not in facts.classifier:
        return None
    return "the classifier" if hasattr(facts.model, "get_classifier") else "the last layer that runs"


def _depthwise(name: str, layer: nn.Module, facts: Facts) -> str | None:
    channels = getattr(layer, "in_channels", None) or getattr(layer, "in_features", None)
    groups = getattr(layer, "groups", 1)
    if channels != groups:
        return None
    return f"{groups} groups of one channel" if groups > 1 else "it reads one channel"


def _gate(name: str, layer: nn.Module, facts: Facts) -> str | None:
    if facts.probe and name in facts.probe.findings.gates:
        return "its output gates a stream"
    flow = facts.probe.layers[name].flow if facts.probe else Flow()
    if facts.probe and flow.is_gate and not flow.sources - facts.probe.findings.weighing:
        return "it reads a gate"
    parts = name.split(".")
    for end in range(len(parts)):
        module = facts.model.get_submodule(".".join(parts[:end]))
        if isinstance(module, _GATES):
            return f"inside {type(module).__name__}"
    return None


def _downsample(name: str, layer: nn.Module, facts: Facts) -> str | None:
    if facts.probe and name in facts.probe.findings.shortcuts and getattr(layer, "kernel_size", None) == (1, 1):
        return "the projection of a shortcut"
    named = {"downsample", "shortcut"} & set(name.split("."))
    return f"part of a module named {named.pop()}" if named else None


RULES: dict[SkipRule, Callable[[str, nn.Module, Facts], str | None]] = {
    "first": _first,
    "last": _last,
    "depthwise": _depthwise,
    "gate": _gate,
    "downsample": _downsample,
}
"""From a rule to the function that gives its reason for leaving a layer float, or None."""


def find_rule(name: str, layer: nn.Module, facts: Facts, rules: tuple[SkipRule, ...]) -> tuple[SkipRule, str] | None:
    """The first of `rules` that leaves a layer float, with its reason; None if the layer is to be binary."""
    for rule in rules:
        reason = RULES[rule](name, layer, facts)
        if reason is not None:
            return rule, reason
    return None
