"""`binarize_`: one call that makes a network binary, in place.

Everything is planned before anything is changed, so that a failure leaves the model as it was.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from design_lightning.binary import BinaryLayer
from design_lightning.surgery.bits import check_bits_
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.fused_bias import call_qkv_layer_
from design_lightning.surgery.fusing import refuse_fusing_
from design_lightning.surgery.plan import Plan
from design_lightning.surgery.plan_activations import check_binarizers, decide_activations
from design_lightning.surgery.plan_layers import decide_layers
from design_lightning.surgery.record import SurgeryRecord, record_surgery
from design_lightning.surgery.report import BinarizationReport
from design_lightning.surgery.shortcuts import RealShortcut
from design_lightning.surgery.unbinarize import remember_original


def binarize_(
    model: nn.Module, config: BinaryConfig | None = None, example_input: Tensor | Sequence[int] | None = None
) -> BinarizationReport:
    """Makes the convolutions and linear layers of a model binary, in place.

    The layers keep their parameters, which become latent weights, and their names. Float activations whose output reaches
    a binarizer become its companion.

    Args:
        model: a timm network, its `features_only` form, or any module.
        config: how; the defaults of `BinaryConfig` if not given.
        example_input: a batch of inputs, or its shape, for the one forward by which surgery learns what reaches what. By
            default what timm says of the model, or a guess.

    Returns:
        The report: every layer, what was done to it and why. Print it.

    Raises:
        ValueError: if the model is binary or compiled already, nothing would become binary, a pattern of `overrides` matches
            nothing, a kernel does not fit a layer, or a binarizer would be constant. The model is left as it was.
    """
    plan = operate_(model, config or BinaryConfig(), example_input)
    _check_bits(plan)
    for text in plan.warnings:
        warnings.warn(text, stacklevel=2)
    return plan.report()


def operate_(model: nn.Module, config: BinaryConfig, example_input: Tensor | Sequence[int] | None) -> Plan:
    """The surgery of `binarize_`, without the forward that looks at the binarizers' bits."""
    _refuse(model)
    plan = Plan(model, config, example_input)
    decide_layers(plan)
    decide_activations(plan)
    check_binarizers(plan)
    _swap(model, plan.replacements)
    for name, norm in plan.shortcuts.items():
        RealShortcut().attach(model.get_submodule(name), model.get_submodule(norm))
    for name in plan.binary:
        call_qkv_layer_(model.get_submodule(name.rpartition(".")[0]))
    refuse_fusing_(model)
    record_surgery(model, SurgeryRecord(config, plan.probe.input_shape if plan.probe else None))
    return plan


def _check_bits(plan: Plan) -> None:
    """Notes binarizers that are constant on the probe's batch, and in their rows the units that were set."""
    if plan.probe is None or not any(config.activation != "none" for config in plan.binary.values()):
        return
    parameter = next(plan.model.parameters())
    if any(p.is_meta for p in plan.model.parameters()):
        plan.note("the model is on meta, so whether each binarizer sees both signs was not looked at", warn=False)
        return
    x = plan.example_input
    if not isinstance(x, Tensor):
        x = torch.randn(plan.probe.input_shape, generator=torch.Generator().manual_seed(0))
    checked = check_bits_(plan.model, x.detach().to(parameter.device, parameter.dtype))
    for name, unit in checked.units.items():
        row = plan.rows[name]
        plan.rows[name] = replace(row, reason=f"{row.reason}, thresholds in units of {unit:.2g}")
    if checked.units:
        count = f"{len(checked.units)} DeSign{'s reach' if len(checked.units) > 1 else ' reaches'}"
        plan.note(
            f"{count} no threshold on the probe's batch and took the size of the input as the unit: {', '.join(checked.units)}",
            warn=False,
        )
    if checked.constant:
        count = f"{len(checked.constant)} binarizer{'s see' if len(checked.constant) > 1 else ' sees'}"
        plan.note(f"{count} no change of sign on the probe's batch: {', '.join(checked.constant)}")
    if checked.failure:
        plan.note(
            f"the binary network's forward failed, so its binarizers' signs were not looked at: {checked.failure}"
        )


def _refuse(model: nn.Module) -> None:
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise ValueError("the model is compiled; binarize it first, then compile it")
    done = [name for name, module in model.named_modules() if isinstance(module, BinaryLayer)]
    if done:
        raise ValueError(
            f"the model is binary already: {done[0]!r} and {len(done) - 1} other layers; binarize a float model"
        )


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts each replacement wherever its original stands, a shared module in all of its places.

    The replacement has the mode and the hooks of its original: timm's `FeatureHookNet` hangs on hooks of activations.
    """
    for original, replacement in replacements.items():
        replacement.train(original.training)
        if not hasattr(replacement, "to_float"):
            remember_original(replacement, original)
        for name in _HOOKS:
            setattr(replacement, name, getattr(original, name))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
