"""Which float activations get a companion, and which binarizers could not work behind those that stay."""

import math
from typing import cast

from torch import nn

from design_lightning.binary import make_companion
from design_lightning.binary.activations import Layout
from design_lightning.binary.companions import CompanionName
from design_lightning.surgery.bare_norms import with_companion
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.float_activations import ACTIVATION_NORMS, SIGMOIDS, is_activation
from design_lightning.surgery.float_layers import is_weight_layer
from design_lightning.surgery.flow import A_FUNCTION
from design_lightning.surgery.plan import Plan
from design_lightning.surgery.probe import Probe
from design_lightning.surgery.report import Row
from design_lightning.surgery.rules import find_rule


def decide_activations(plan: Plan) -> None:
    """Gives every float activation a row, and those whose output reaches a binarizer their companion."""
    reaching = _reaching(plan)
    for name, module in plan.modules.items():
        if is_activation(module) or (isinstance(module, SIGMOIDS) and name in reaching):
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
    return found - plan.probe.findings.weighing


def _decide_activation(plan: Plan, name: str, module: nn.Module, reaching: set[str]) -> None:
    before = type(module).__name__
    config = plan.config_of(name)
    if name not in reaching:
        plan.rows[name] = Row(name, before, before, "reaches none", "its output reaches no binarizer")
    elif config is None:
        plan.rows[name] = Row(name, before, before, "kept", "an override leaves it")
    elif config.companion == "keep":
        plan.rows[name] = Row(name, before, before, "kept", "companion: keep")
    else:
        companion, instead = _companion(plan, name, config)
        after = plan.companions[name] = type(companion).__name__
        if isinstance(module, ACTIVATION_NORMS):
            companion = with_companion(module, companion)
            after = f"{type(companion).__name__} + {after}"
        plan.replacements[module] = companion
        plan.rows[name] = Row(name, before, after, "companion", f"its output reaches a binarizer{instead}")


def _companion(plan: Plan, name: str, config: BinaryConfig) -> tuple[nn.Module, str]:
    """The companion of an activation, and in words why it is another than the configuration's, if it is."""
    wanted = cast(CompanionName, config.companion)
    if wanted in ("hardtanh", "identity"):
        return make_companion(wanted, 0, "NCHW"), ""
    calls = plan.probe.activations.get(name, []) if plan.probe else []
    places = {_channels_and_layout(shape, axis) for shape, axis in calls}
    if len(places) == 1 and None not in places:
        channels, layout = cast(tuple[int, Layout], places.pop())
        reference = next(plan.model.parameters())
        return make_companion(wanted, channels, layout).to(reference.device, reference.dtype), ""
    if not calls:
        seen = "the probe did not see it"
    elif None in places:
        seen = f"where its channels stand in {list(calls[0][0])} is not known"
    else:
        seen = f"it is shared by {sorted({place[0] for place in places if place})} channels"
    return make_companion("hardtanh", 0, "NCHW"), f"; {seen}, so no {wanted}, which has parameters per channel"


def _channels_and_layout(shape: tuple[int, ...], axis: int | None) -> tuple[int, Layout] | None:
    """How many channels an activation's input has, and which layout of a companion fits; None where none does."""
    if len(shape) == 2:
        return shape[1], "NHWC"
    if axis == len(shape) - 1:
        return shape[-1], "NHWC"
    return (shape[1], "NCHW") if axis == 1 and len(shape) == 4 else None


def check_binarizers(plan: Plan) -> None:
    """Raises where a binarizer would be constant, and notes those that have less to divide than their thresholds suggest."""
    if plan.probe is None:
        return
    _check_one_sided(plan, plan.probe)
    _check_clipped(plan, plan.probe)
    functions = {s for n in plan.binary for s in plan.probe.layers[n].flow.sources if s.startswith(A_FUNCTION)}
    if functions:
        plan.note(
            f"float activations that are no modules, and so stay, reach binarizers: {', '.join(sorted(functions))}",
            warn=False,
        )


def _check_one_sided(plan: Plan, probe: Probe) -> None:
    replaced = {name for name, row in plan.rows.items() if row.rule == "companion"}
    one_sided = []
    for name, config in plan.binary.items():
        positive_by = probe.layers[name].flow.positive_by
        if config.activation == "none" or positive_by is None or positive_by & replaced:
            continue
        behind = ", ".join(sorted(positive_by)) or "an operation without a negative output"
        if _highest_threshold(config) <= 0:
            kept = [s for s in positive_by if s in plan.rows and plan.rows[s].rule == "kept"]
            way = "use a companion other than 'keep'" if kept else "leave the layer float by an override"
            raise ValueError(
                f"{name}: its input is never negative (behind {behind}), so a sign with thresholds of 0 would be "
                f"constant; {way}, or a kernel with positive thresholds"
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
