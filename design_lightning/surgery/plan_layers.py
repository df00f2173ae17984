"""Which layers become binary, and the binary layer that each becomes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from design_lightning._names import class_by_name
from design_lightning.binary import (
    ACTIVATIONS,
    BinaryActivation,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    DeSign,
    RSign,
    Sign,
)
from design_lightning.binary.activations import Layout
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.downsampling import average_pooled
from design_lightning.surgery.float_layers import binary_twin, in_channels, is_weight_layer, weight_count, why_no_twin
from design_lightning.surgery.plan import Plan
from design_lightning.surgery.report import Row
from design_lightning.surgery.rules import find_rule
from design_lightning.surgery.shortcuts import shortcut_place


def decide_layers(plan: Plan) -> None:
    """Gives every layer with weights a row, and those that become binary a replacement."""
    for name, module in plan.modules.items():
        if is_weight_layer(module):
            _decide_layer(plan, name, module)
    if not plan.binary:
        counts = {
            rule: sum(row.rule == rule for row in plan.rows.values()) for rule in {r.rule for r in plan.rows.values()}
        }
        found = ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items())) or "it has none"
        raise ValueError(
            f"no layer of {type(plan.model).__name__} would become binary ({found}); see `skip` and `overrides`"
        )


def _decide_layer(plan: Plan, name: str, layer: nn.Module) -> None:
    config = plan.config_of(name)
    twin = binary_twin(layer)
    if config is None:
        return _leave(plan, name, layer, "override", "an override leaves it float")
    if twin is None:
        return _leave(plan, name, layer, "no twin", why_no_twin(layer))
    if plan.probe and name not in plan.probe.layers:
        user = plan.probe.users.get(name)
        by = (
            "forward does not call it in eval mode"
            if user is None
            else f"{user or 'the model'} uses its weight without a call"
        )
        return _leave(plan, name, layer, "not called", by)
    rule = find_rule(name, layer, plan.facts, config.skip_rules)
    if rule and rule[0] == "downsample" and config.downsample == "avgpool":
        pooled = average_pooled(layer)
        if pooled is not None:
            plan.replacements[layer] = pooled
            words = f"{rule[1]}: average pool and 1x1"
            plan.rows[name] = _row(plan, name, layer, type(pooled).__name__, "downsample", words)
            return None
    if rule:
        return _leave(plan, name, layer, *rule)
    return _make_binary(plan, name, layer, twin, config)


def _leave(plan: Plan, name: str, layer: nn.Module, rule: str, reason: str) -> None:
    plan.rows[name] = _row(plan, name, layer, type(layer).__name__, rule, reason)


def _row(plan: Plan, name: str, layer: nn.Module, after: str, rule: str, reason: str) -> Row:
    return Row(name, type(layer).__name__, after, rule, reason, weight_count(layer), _macs_per_image(plan, name))


def _macs_per_image(plan: Plan, name: str) -> int:
    if plan.probe is None:
        return 0
    call = plan.call(name)
    return ((call.macs if call else 0) + plan.probe.user_macs[name]) // plan.probe.input_shape[0]


def _make_binary(plan: Plan, name: str, layer: nn.Module, twin: type[BinaryLayer], config: BinaryConfig) -> None:
    call = plan.call(name)
    try:
        activation = _activation(plan, name, layer, config)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if activation is not None:
            activation.to(weight.device, weight.dtype)
        if isinstance(layer, nn.Conv2d) and issubclass(twin, BinaryConv2d):
            padding_value = config.padding_value if layer.padding_mode == "zeros" else 0
            binary: BinaryLayer = twin.from_float(
                layer, activation, config.weight, config.weight_args, padding_value, config.stage
            )
        else:
            assert isinstance(layer, nn.Linear)
            assert issubclass(twin, BinaryLinear)
            binary = twin.from_float(layer, activation, config.weight, config.weight_args, config.stage)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error
    plan.replacements[layer] = binary
    plan.binary[name] = config
    words = _in_words(config)
    if isinstance(activation, DeSign) and activation.grid is None and call is not None and len(call.input_shape) == 3:
        words += ", tokens in a row (no fixed grid is known)"
    if config.padding_value != 0 and getattr(layer, "padding_mode", "zeros") != "zeros":
        words += f", padding stays {layer.padding_mode}"
    if config.shortcut == "bireal" and isinstance(layer, nn.Conv2d):
        end, shortcut_in_words = shortcut_place(name, plan.probe)
        words += f", {shortcut_in_words}"
        if end is not None:
            plan.shortcuts[name] = end
    elif config.shortcut == "bireal":
        words += ", no shortcut: not a convolution"
    row = _row(plan, name, layer, type(binary).__name__, "binary", words)
    plan.rows[name] = replace(row, binary_macs=0 if activation is None else row.macs)


def _activation(plan: Plan, name: str, layer: nn.Module, config: BinaryConfig) -> BinaryActivation | None:
    if config.activation == "none":
        return None
    channels = in_channels(layer)
    layout: Layout = "NHWC" if isinstance(layer, nn.Linear) else "NCHW"
    estimator: dict[str, Any] = {"estimator": config.estimator, "estimator_args": config.estimator_args}
    if config.activation == "sign":
        return Sign(layout, **estimator)
    if config.activation == "rsign":
        return RSign(channels, layout, **estimator)
    if config.activation != "design":
        found = class_by_name(str(config.activation), ACTIVATIONS, BinaryActivation, "activation")
        make = cast(Callable[..., BinaryActivation], found)
        return make(channels=channels, layout=layout, **estimator, **config.activation_args)
    kernel = config.threshold_kernel()
    kernel.tile(channels, 1, 1)  # raises where the depth does not divide the channels
    grid, prefix_tokens = _token_grid(plan, name)
    return DeSign(
        kernel,
        scale=config.scale,
        align=config.align,
        learn_kernel=config.learn_kernel,
        gamma_from=_norm_before(plan, name) if config.scale_by_gamma else None,
        grid=grid,
        prefix_tokens=prefix_tokens,
        layout=layout,
        **estimator,
    )


def _token_grid(plan: Plan, name: str) -> tuple[tuple[int, int] | None, int]:
    """The grid and the prefix tokens of a layer that sees all the tokens of the nearest patch embedding around it."""
    call = plan.call(name)
    vit = _with_patch_embedding(plan.model, name)
    if call is None or len(call.input_shape) != 3 or vit is None:
        return None, 0
    drops = not isinstance(getattr(vit, "patch_drop", None), nn.Identity | None)
    if (
        drops
        or getattr(vit.patch_embed, "dynamic_img_pad", False)
        or not getattr(vit.patch_embed, "strict_img_size", True)
    ):
        return None, 0  # the tokens vary from batch to batch, so a fixed grid would not fit them
    rows, columns = vit.patch_embed.grid_size
    prefix = call.input_shape[1] - rows * columns
    return ((rows, columns), prefix) if prefix == getattr(vit, "num_prefix_tokens", 0) else (None, 0)


def _with_patch_embedding(model: nn.Module, name: str) -> Any:
    """The innermost module around a layer that embeds patches of a grid; None if there is none."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if getattr(getattr(module, "patch_embed", None), "grid_size", None) is not None:
            return module
    return None


def _norm_before(plan: Plan, name: str) -> nn.Module:
    call = plan.call(name)
    norm = plan.modules.get(call.flow.norm) if call and call.flow.norm else None
    if norm is None:
        raise ValueError(
            "scale_by_gamma needs one norm that feeds this layer alone, and it has none or several; "
            f"set it by an override, as in overrides: {{'{name}': {{scale_by_gamma: false}}}}"
        )
    return norm


def _in_words(config: BinaryConfig) -> str:
    if config.activation == "none":
        return f"weights {config.weight}, input float"
    kernel = f" {config.threshold_kernel().name}" if config.activation == "design" else ""
    return f"input {config.activation}{kernel}, weights {config.weight}"
