"""`binarize_`: one call that makes a network binary, in place.

Everything is planned before anything is changed, so that a failure leaves the model as it was.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from design_lightning._names import in_a_line
from design_lightning.binary import keep_for_backward_
from design_lightning.binary.lean import make_lean_
from design_lightning.surgery.bits import LEAST_SHARE, check_bits_
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.fusing import refuse_fusing_
from design_lightning.surgery.hooks import share_hooks
from design_lightning.surgery.packing import packed_layers
from design_lightning.surgery.plan import Plan
from design_lightning.surgery.plan_activations import check_binarizers, decide_activations
from design_lightning.surgery.plan_layers import decide_layers
from design_lightning.surgery.probe import example_batch
from design_lightning.surgery.record import SurgeryRecord, record_surgery
from design_lightning.surgery.report import BinarizationReport
from design_lightning.surgery.shortcuts import RealShortcut
from design_lightning.surgery.stages import binary_layers
from design_lightning.surgery.traceless import forward_without_trace
from design_lightning.surgery.unbinarize import remember_original, restore_, unbinarize_
from design_lightning.surgery.uncalled import call_layers_


def binarize_(
    model: nn.Module, config: BinaryConfig | None = None, example_input: Tensor | Sequence[int] | None = None
) -> BinarizationReport:
    """Makes the convolutions and linear layers of a model binary, in place.

    The layers keep their parameters, which become latent weights, and their names. Float activations whose output reaches
    a binarizer become its companion. Batch norms, max pools and strided 1x1 convolutions of torch get a class that computes the
    same and keeps less for the backward pass (`binary.lean`).

    Args:
        model: a timm network, its `features_only` form, or any module.
        config: how; the defaults of `BinaryConfig` if not given.
        example_input: a batch of inputs, or its shape, for the one forward by which surgery learns what reaches what. By
            default what timm says of the model, or a guess.

    Returns:
        The report: every layer, what was done to it and why. Print it.

    Raises:
        ValueError: if the model is binary or compiled already, nothing would become binary, a pattern of `overrides` matches
            nothing, a kernel does not fit a layer, a binarizer would be constant, or the binary network's forward fails where
            the float one's does not. The model is left as it was.
    """
    config = config or BinaryConfig()
    plan = operate_(model, config, example_input)
    try:
        _check_bits(plan)
        for text in plan.warnings:
            warnings.warn(text, stacklevel=2)
    except BaseException:
        if binary_layers(model):
            unbinarize_(model)
        raise
    return plan.report()


def operate_(model: nn.Module, config: BinaryConfig, example_input: Tensor | Sequence[int] | None) -> Plan:
    """The surgery of `binarize_`, without the forward that looks at the binarizers' bits."""
    _refuse(model)
    plan = Plan(model, config, example_input)
    decide_layers(plan)
    decide_activations(plan)
    check_binarizers(plan)
    try:
        _change_(plan)
    except BaseException:  # an interruption by the user, say
        restore_(model)
        raise
    return plan


def _change_(plan: Plan) -> None:
    """All that changes the model."""
    model, config = plan.model, plan.config
    _swap(model, plan.replacements)
    for name, end in plan.shortcuts.items():
        RealShortcut().attach(model.get_submodule(name), model.get_submodule(end))
    for name in plan.binary:
        call_layers_(model.get_submodule(name.rpartition(".")[0]))
    make_lean_(model)
    keep_for_backward_(model, config.keeps)
    refuse_fusing_(model)
    record_surgery(model, SurgeryRecord(config, plan.probe.input_shape if plan.probe else None, plan.shortcuts))


def _check_bits(plan: Plan) -> None:
    """Notes binarizers that are constant on the probe's batch, and in their rows the units that were set."""
    if plan.probe is None or not any(config.activation != "none" for config in plan.binary.values()):
        return
    if any(p.is_meta for p in plan.model.parameters()):
        plan.note("the model is on meta, so whether each binarizer sees both signs was not looked at", warn=False)
        return
    x = example_batch(plan.model, plan.example_input, plan.probe.input_shape)
    checked = check_bits_(plan.model, x)
    if checked.failure is not None:
        _fail_unless_float_does(plan, x, checked.failure)
        plan.note(f"the forward failed, so its binarizers' signs were not looked at: {in_a_line(checked.failure)}")
        return
    for name, unit in checked.units.items():
        row = plan.rows[name]
        plan.rows[name] = replace(row, reason=f"{row.reason}, thresholds in units of {unit:.2g}")
    least = f"less than {LEAST_SHARE:.0%} of the bits"
    if checked.units:
        plan.note(
            f"{_count(checked.units, 'DeSign')} hardly reached a threshold on the probe's batch ({least} differed) and took the "
            f"size of the input as the unit: {', '.join(checked.units)}",
            warn=False,
        )
    if checked.constant:
        plan.note(
            f"{_count(checked.constant, 'binarizer')} saw (almost) no change of sign on the probe's batch, {least}: "
            f"{', '.join(checked.constant)}"
        )
    if checked.uncalled:
        plan.note(
            f"{_count(checked.uncalled, 'binarizer')} had no call in a forward in eval mode, which may read the weight "
            f"without the layer: {', '.join(checked.uncalled)}"
        )


def _count(names: Collection[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}"


def _fail_unless_float_does(plan: Plan, x: Tensor, failure: Exception) -> None:
    """Raises where the float model's forward goes through on what the binary one fails on; the model is float then."""
    unbinarize_(plan.model)
    try:
        with forward_without_trace(plan.model):
            plan.model(x)
    except Exception:  # alike: an operation without a kernel here, say
        operate_(plan.model, plan.config, plan.example_input)
        return
    raise ValueError(
        f"the binary network's forward fails where the float one's goes through: {in_a_line(failure)}; please report it"
    ) from failure


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        is_compiled = isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        if is_compiled or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            what = f"its part {name!r}" if name else "the model"
            raise ValueError(f"{what} is compiled; binarize first, then compile")
    done = [*binary_layers(model), *packed_layers(model)]
    if done:
        raise ValueError(
            f"the model is binary already: {done[0]!r} and {len(done) - 1} other layers; binarize a float model"
        )


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts each replacement wherever its original stands, a shared module in all of its places.

    The replacement has the mode and the hooks of its original.
    """
    for original, replacement in replacements.items():
        replacement.train(original.training)
        if not hasattr(replacement, "to_float"):
            remember_original(replacement, original)
        share_hooks(original, replacement)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
