"""`binarize_`: one call that makes a network binary, in place.

Everything is planned before anything is changed, so that a failure leaves the model as it was.
"""

import fnmatch
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from design_lightning._names import class_by_name, did_you_mean
from design_lightning.binary import (
    ACTIVATIONS,
    BinaryActivation,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    DeSign,
    make_companion,
)
from design_lightning.binary.activations import Layout, RSign, Sign
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.float_activations import ACTIVATION_MODULES
from design_lightning.surgery.float_layers import binary_twin, in_channels, is_weight_layer
from design_lightning.surgery.probe import LayerCall, Probe, ProbeError, probe
from design_lightning.surgery.report import BinarizationReport, Row
from design_lightning.surgery.rules import Facts, find_rule
from design_lightning.surgery.shortcuts import RealShortcut, shortcut_place


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
    plan = _Plan(model, config, example_input)
    plan.decide_layers()
    plan.decide_activations()
    plan.check_binarizers()
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


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts each replacement wherever its original stands, a shared module in all of its places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


@dataclass
class _Plan:
    """The decisions about one model, made before anything is changed."""

    model: nn.Module
    config: BinaryConfig
    example_input: Tensor | Sequence[int] | None
    probe: Probe | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    binary: dict[str, BinaryConfig] = field(default_factory=dict)
    shortcuts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.model, BinaryLayer) or is_weight_layer(self.model):
            raise ValueError(
                f"{type(self.model).__name__} is a layer itself; use its binary twin's from_float, or pass its parent"
            )
        self.modules = dict(self.model.named_modules())
        try:
            self.probe = probe(self.model, self.example_input)
        except ProbeError as error:
            if self.example_input is not None:
                raise ValueError(f"the model's forward fails on the example input: {error}") from error
            self._note(
                f"no probing forward went through ({error}); rules went by the order of modules, and every float activation was "
                "taken to reach a binarizer. Pass example_input."
            )
        self.facts = Facts.of(self.model, self.probe)
        self._check_patterns()

    def _note(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, stacklevel=5)

    def _check_patterns(self) -> None:
        known = [n for n, m in self.modules.items() if is_weight_layer(m) or isinstance(m, ACTIVATION_MODULES)]
        for pattern in self.config.overrides:
            if not any(_matches(pattern, name) for name in known):
                raise ValueError(
                    f"override {pattern!r} matches no layer and no activation: {did_you_mean(pattern, known)}"
                )

    def _config_of(self, name: str) -> BinaryConfig | None:
        """The configuration of one module, its overrides applied; None where the last match is null."""
        config: BinaryConfig | None = self.config
        for pattern, override in self.config.overrides.items():
            if _matches(pattern, name):
                config = None if override is None else (config or self.config).overridden(override)
        return config

    def _call(self, name: str) -> LayerCall | None:
        return self.probe.layers.get(name) if self.probe else None

    # Layers

    def decide_layers(self) -> None:
        """Gives every layer with weights a row, and those that become binary a replacement."""
        for name, module in self.modules.items():
            if is_weight_layer(module):
                self._decide_layer(name, module)
        if not self.binary:
            counts = {
                rule: sum(row.rule == rule for row in self.rows.values())
                for rule in {r.rule for r in self.rows.values()}
            }
            found = ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items())) or "it has none"
            raise ValueError(
                f"no layer of {type(self.model).__name__} would become binary ({found}); see `skip` and `overrides`"
            )

    def _decide_layer(self, name: str, layer: nn.Module) -> None:
        config = self._config_of(name)
        twin = binary_twin(layer)
        if config is None:
            return self._leave(name, layer, "override", "an override leaves it float")
        if twin is None:
            return self._leave(name, layer, "no twin", f"{type(layer).__name__} has no binary twin")
        if self.probe and name not in self.probe.layers:
            return self._leave(name, layer, "not called", "forward does not call it in eval mode")
        rule = find_rule(name, layer, self.facts, config.skip_rules)
        if rule:
            return self._leave(name, layer, *rule)
        return self._make_binary(name, layer, twin, config)

    def _leave(self, name: str, layer: nn.Module, rule: str, reason: str) -> None:
        self.rows[name] = self._row(name, layer, type(layer).__name__, rule, reason)

    def _row(self, name: str, layer: nn.Module, after: str, rule: str, reason: str) -> Row:
        call = self._call(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return Row(name, type(layer).__name__, after, rule, reason, weight.numel(), self._macs_per_image(call))

    def _macs_per_image(self, call: LayerCall | None) -> int:
        return call.macs // self.probe.input_shape[0] if call and self.probe else 0

    def _make_binary(self, name: str, layer: nn.Module, twin: type[BinaryLayer], config: BinaryConfig) -> None:
        try:
            activation = self._activation(name, layer, config)
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
        self.replacements[layer] = binary
        self.binary[name] = config
        words = _in_words(config)
        if config.shortcut == "bireal" and isinstance(layer, nn.Conv2d):
            norm, shortcut_in_words = shortcut_place(name, self.probe)
            words += f", {shortcut_in_words}"
            if norm is not None:
                self.shortcuts[name] = norm
        self.rows[name] = self._row(name, layer, type(binary).__name__, "binary", words)

    def _activation(self, name: str, layer: nn.Module, config: BinaryConfig) -> BinaryActivation | None:
        if config.activation is None:
            return None
        channels = in_channels(layer)
        layout: Layout = "NHWC" if isinstance(layer, nn.Linear) else "NCHW"
        estimator: dict[str, Any] = {"estimator": config.estimator, "estimator_args": config.estimator_args}
        if config.activation == "sign":
            return Sign(layout, **estimator)
        if config.activation == "rsign":
            return RSign(channels, layout, **estimator)
        if config.activation != "design":
            found = class_by_name(config.activation, ACTIVATIONS, BinaryActivation, "activation")
            make = cast(Callable[..., BinaryActivation], found)
            return make(channels=channels, layout=layout, **estimator, **config.activation_args)
        kernel = config.threshold_kernel()
        kernel.tile(channels, 1, 1)  # raises where the depth does not divide the channels
        grid, prefix_tokens = self._token_grid(name)
        return DeSign(
            kernel,
            scale=config.scale,
            align=config.align,
            learn_kernel=config.learn_kernel,
            gamma_from=self._norm_before(name) if config.scale_by_gamma else None,
            grid=grid,
            prefix_tokens=prefix_tokens,
            layout=layout,
            **estimator,
        )

    def _token_grid(self, name: str) -> tuple[tuple[int, int] | None, int]:
        """The grid and the prefix tokens of a layer that sees all the tokens of a patch embedding."""
        call = self._call(name)
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if call is None or len(call.input_shape) != 3 or grid is None:
            return None, 0
        prefix = call.input_shape[1] - grid[0] * grid[1]
        return ((grid[0], grid[1]), prefix) if prefix == getattr(self.model, "num_prefix_tokens", 0) else (None, 0)

    def _norm_before(self, name: str) -> nn.Module:
        call = self._call(name)
        norm = self.modules.get(call.flow.norm) if call and call.flow.norm else None
        if norm is None:
            raise ValueError(
                "scale_by_gamma needs one norm that feeds this layer alone, and it has none or several; "
                f"set it by an override, as in overrides: {{'{name}': {{scale_by_gamma: false}}}}"
            )
        return norm

    # Float activations

    def decide_activations(self) -> None:
        """Gives every float activation a row, and those whose output reaches a binarizer their companion."""
        reaching = self._reaching()
        for name, module in self.modules.items():
            if isinstance(module, ACTIVATION_MODULES):
                self._decide_activation(name, module, reaching)

    def _reaching(self) -> set[str]:
        """The activations whose output reaches a binarizer, also through layers of a shortcut that stay float."""
        if self.probe is None:
            gates = {
                n for n, m in self.modules.items() if is_weight_layer(m) and find_rule(n, m, self.facts, ("gate",))
            }
            parents = {name.rpartition(".")[0] for name in gates}
            names = (n for n, m in self.modules.items() if isinstance(m, ACTIVATION_MODULES))
            return {name for name in names if name.rpartition(".")[0] not in parents}
        found: set[str] = set()
        waiting = [name for name, config in self.binary.items() if config.activation is not None]
        visited = set(waiting)
        while waiting:
            for source in self.probe.layers[waiting.pop()].flow.sources - visited:
                visited.add(source)
                if source in self.probe.layers:
                    if self.rows[source].rule == "downsample":
                        waiting.append(source)
                else:
                    found.add(source)
        return found

    def _decide_activation(self, name: str, module: nn.Module, reaching: set[str]) -> None:
        before = type(module).__name__
        config = self._config_of(name) or self.config
        if name not in reaching:
            self.rows[name] = Row(name, before, before, "reaches none", "its output reaches no binarizer")
        elif config.companion == "keep":
            self.rows[name] = Row(name, before, before, "kept", "companion: keep")
        else:
            companion = self._companion(name, config)
            self.replacements[module] = companion
            self.rows[name] = Row(name, before, type(companion).__name__, "companion", "its output reaches a binarizer")

    def _companion(self, name: str, config: BinaryConfig) -> nn.Module:
        if config.companion in ("hardtanh", "identity"):
            return make_companion(config.companion, 0, "NCHW")
        shapes = self.probe.activations[name] if self.probe else []
        layout: Layout = "NHWC" if shapes and (len(shapes[0]) != 4 or self._is_channels_last(shapes[0])) else "NCHW"
        channels = {shape[1] if layout == "NCHW" else shape[-1] for shape in shapes}
        if len(channels) != 1:
            seen = f"inputs of {sorted(channels)} channels" if channels else "no input in a probing forward"
            raise ValueError(
                f"{name}: companion {config.companion!r} has parameters per channel, but saw {seen}; use 'hardtanh'"
            )
        reference = next(self.model.parameters())
        return make_companion(config.companion, channels.pop(), layout).to(reference.device, reference.dtype)

    def _is_channels_last(self, shape: tuple[int, ...]) -> bool:
        """Whether an image tensor is [B, H, W, C]: where the network's linear layers take such tensors."""
        calls = self.probe.layers.items() if self.probe else ()
        linear = {
            call.input_shape[-1]
            for n, call in calls
            if isinstance(self.modules[n], nn.Linear) and len(call.input_shape) == 4
        }
        return shape[-1] in linear

    # Binarizers that could not work

    def check_binarizers(self) -> None:
        """Raises where a binarizer would be constant, and notes those behind a ReLU that stays."""
        if self.probe is None:
            return
        replaced = {name for name, row in self.rows.items() if row.rule == "companion"}
        one_sided = []
        for name, config in self.binary.items():
            positive_by = self.probe.layers[name].flow.positive_by
            if config.activation is None or positive_by is None or positive_by & replaced:
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
            self._note(
                f"{count} with an input that is never negative, which only positive thresholds divide: {', '.join(one_sided)}"
            )

    def report(self) -> BinarizationReport:
        """The rows in the order of the module tree, and the totals."""
        parameters = sum(p.numel() for p in self.model.parameters())
        new = [p for module in self.replacements.values() for p in module.parameters()]
        old = {id(p) for p in self.model.parameters()}
        gone = [
            p
            for module, twin in self.replacements.items()
            if not isinstance(twin, BinaryLayer)
            for p in module.parameters()
        ]
        added = sum(p.numel() for p in new if id(p) not in old) - sum(p.numel() for p in gone)
        rows = tuple(self.rows[name] for name in self.modules if name in self.rows)
        return BinarizationReport(rows, parameters + added, 4 * parameters, tuple(self.notes))


def _highest_threshold(config: BinaryConfig) -> float:
    """The highest threshold at the start; infinite for an activation that this package does not know."""
    if config.activation in ("sign", "rsign"):
        return 0.0
    if config.activation != "design":
        return math.inf
    return config.scale * max(level for plane in config.threshold_kernel().levels for row in plane for level in row)


def _in_words(config: BinaryConfig) -> str:
    if config.activation is None:
        return f"weights {config.weight}, input float"
    kernel = f" {config.threshold_kernel().name}" if config.activation == "design" else ""
    return f"input {config.activation}{kernel}, weights {config.weight}"
