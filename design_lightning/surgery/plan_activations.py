"""Which float activations get a companion, and which binarizers could not work behind those that stay."""

import math
from typing import cast

from torch import nn

from design_lightning.binary import make_companion
from design_lightning.binary.activations import Layout
from design_lightning.binary.companions import CompanionName
from design_lightning.surgery.bare_norms import with_companion
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.float_activations import ACTIVATION_NORMS, is_activation
from design_lightning.surgery.float_layers import is_weight_layer
from design_lightning.surgery.plan import Plan
from design_lightning.surgery.probe import Probe
from design_lightning.surgery.report import Row
from design_lightning.surgery.rules import find_rule


def decide_activations(plan: Plan) -> None:
    """Gives every float activation a row, and those whose output reaches a binarizer their companion."""
    reaching = _reaching(plan)
    for name, module in plan.modules.items():
        if is_activation(module):
            _decide_activation(plan, name, module, reaching)


def _reaching(plan: Plan) -> set[str]:
    """The activations whose output reaches a binarizer, also through layers of a shortcut that stay float."""
    if plan.probe is None:
        gates = {n for n, m in plan.modules.items() if is_weight_layer(m) and find_rule(n, m, plan.facts, ("gate",))}
        parents = {name.rpartition(".")[0] for name in gates}
        names = (n for n, m in plan.modules.items() if is_activation(m))
        return {name for name in names if name.rpartition(".")[0] not in parents}
    found: set[str] = set()
    waiting = [name for name, config in plan.binary.items() if config.activation != "none"]
    visited = set(waiting)
    while waiting:
        for source in plan.probe.layers[waiting.pop()].flow.sources - visited:
            visited.add(source)
            if source in plan.probe.layers:
                if plan.rows[source].rule == "downsample":
                    waiting.append(source)
            else:
                found.add(source)
    return found


def _decide_activation(plan: Plan, name: str, module: nn.Module, reaching: set[str]) -> None:
    before = type(module).__name__
    config = plan.config_of(name) or plan.config
    if name not in reaching:
        plan.rows[name] = Row(name, before, before, "reaches none", "its output reaches no binarizer")
    elif config.companion == "keep":
        plan.rows[name] = Row(name, before, before, "kept", "companion: keep")
    else:
        companion = _companion(plan, name, config)
        after = type(companion).__name__
        plan.companions[name] = after
        if isinstance(module, ACTIVATION_NORMS):
            companion = with_companion(module, companion)
            after = f"{type(companion).__name__} + {after}"
        plan.replacements[module] = companion
        plan.rows[name] = Row(name, before, after, "companion", "its output reaches a binarizer")


def _companion(plan: Plan, name: str, config: BinaryConfig) -> nn.Module:
    companion = cast(CompanionName, config.companion)
    if companion in ("hardtanh", "identity"):
        return make_companion(companion, 0, "NCHW")
    shapes = plan.probe.activations[name] if plan.probe else []
    layout: Layout = "NHWC" if shapes and (len(shapes[0]) != 4 or _is_channels_last(plan, shapes[0])) else "NCHW"
    channels = {shape[1] if layout == "NCHW" else shape[-1] for shape in shapes}
    if len(channels) != 1:
        seen = f"inputs of {sorted(channels)} channels" if channels else "no input in a probing forward"
        raise ValueError(f"{name}: companion {companion!r} has parameters per channel, but saw {seen}; use 'hardtanh'")
    reference = next(plan.model.parameters())
    return make_companion(companion, channels.pop(), layout).to(reference.device, reference.dtype)


def _is_channels_last(plan: Plan, shape: tuple[int, ...]) -> bool:
    """Whether an image tensor is [B, H, W, C]: where the network's linear layers take such tensors."""
    calls = plan.probe.layers.items() if plan.probe else ()
    linear = {
        call.input_shape[-1]
        for n, call in calls
        if isinstance(plan.modules[n], nn.Linear) and len(call.input_shape) == 4
    }
    return shape[-1] in linear


def check_binarizers(plan: Plan) -> None:
    """Raises where a binarizer would be constant, and notes those that have less to divide than their thresholds suggest."""
    if plan.probe is None:
        return
    _check_one_sided(plan, plan.probe)
    _check_clipped(plan, plan.probe)


def _check_one_sided(plan: Plan, probe: Probe) -> None:
    replaced = {name for name, row in plan.rows.items() if row.rule == "companion"}
    one_sided = []
    for name, config in plan.binary.items():
        positive_by = probe.layers[name].flow.positive_by
        if config.activation == "none" or positive_by is None or positive_by & replaced:
            continue
        behind = ", ".join(sorted(positive_by)) or "an operation without a negative output"
        if _highest_threshold(config) <= 0:
            raise ValueError(
                f"{name}: its input is never negative (behind {behind}), so a sign with thresholds of 0 would be "
                "constant; use a companion other than 'keep', or a kernel with positive thresholds"
            )
        one_sided.append(f"{name} (behind {behind})")
    if one_sided:
        count = f"{len(one_sided)} binarizer{'s' if len(one_sided) > 1 else ''}"
        plan.note(
            f"{count} with an input that is never negative, which only positive thresholds divide: {', '.join(one_sided)}"
        )


def _check_clipped(plan: Plan, probe: Probe) -> None:
    """A threshold above 1 right behind a Hardtanh is never reached: its bit is always -1."""
    clipped = []
    for name, config in plan.binary.items():
        source = probe.layers[name].flow.activation
        is_hardtanh = source in plan.rows and "Hardtanh" in (plan.companions.get(source), plan.rows[source].after)
        if config.activation == "design" and is_hardtanh and _highest_threshold(config) > 1:
            clipped.append(f"{name} (behind {source})")
    if clipped:
        plan.note(
            f"thresholds above 1 are never reached right behind a Hardtanh, so their bits are always -1: {', '.join(clipped)}; "
            "companion 'identity', 'prelu' or 'rprelu' reaches them"
        )


def _highest_threshold(config: BinaryConfig) -> float:
    """The highest threshold at the start; infinite for an activation that this package does not know."""
    if config.activation in ("sign", "rsign"):
        return 0.0
    if config.activation != "design":
        return math.inf
    return config.scale * max(level for plane in config.threshold_kernel().levels for row in plane for level in row)
