"""`binarize_`: one call that makes a network binary, in place.

Everything is planned before anything is changed, so that a failure leaves the model as it was.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from design_lightning.binary import BinaryLayer
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.plan import Plan
from design_lightning.surgery.plan_activations import check_binarizers, decide_activations
from design_lightning.surgery.plan_layers import decide_layers
from design_lightning.surgery.report import BinarizationReport
from design_lightning.surgery.shortcuts import RealShortcut


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
    config = config or BinaryConfig()
    _refuse(model)
    plan = Plan(model, config, example_input)
    decide_layers(plan)
    decide_activations(plan)
    check_binarizers(plan)
    report = plan.report()
    _swap(model, plan.replacements)
    for name, norm in plan.shortcuts.items():
        RealShortcut().attach(model.get_submodule(name), model.get_submodule(norm))
    return report


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
        for name in _HOOKS:
            setattr(replacement, name, getattr(original, name))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
