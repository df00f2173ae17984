"""What must hold of a surgery, whatever the network: its report, its weights, its bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import timm.layers
import torch
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.surgery import BinarizationReport, binary_layers
from zoo.row import Row
from zoo.tensors import are_finite, tensors_in

LEAST_BINARY = 1 / 3
"""Of the weights that no fact but that of a gate or a shortcut excuses: at least this share becomes binary."""

LARGEST_GATES = 1 / 10
"""A gate is made from one pixel. At most this share of the weights lies in what is called a gate and sees a map."""

TWINNED = (
    *(nn.Conv2d, nn.Linear, timm.layers.Conv2dSame, timm.layers.Linear),
    *(timm.layers.StdConv2d, timm.layers.StdConv2dSame, timm.layers.ScaledStdConv2d, timm.layers.ScaledStdConv2dSame),
)
"""Float classes that have a binary twin."""

_WEIGHT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)


class FloatFailureError(RuntimeError):
    """The float network, before any surgery, does not do what is asked."""


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def expect_finite(value: Any, what: str) -> None:
    expect(are_finite(tensors_in(value)), f"{what} is not finite")


def expect_same(first: Any, second: Any, otherwise: str, tolerance: float = 0.0) -> None:
    """The same tensors, to a part `tolerance` of the largest number of each."""
    for ours, theirs in zip(tensors_in(first), tensors_in(second), strict=True):
        expect(ours.shape == theirs.shape, otherwise)
        if ours.numel():
            ours, theirs = (t.float() if t.dtype == torch.bool else t for t in (ours, theirs))
            off, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
            expect(off <= tolerance * largest, f"{otherwise}: they are {off:.2g} apart")


def expect_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    expect(first.keys() == second.keys(), f"keys differ: {sorted(first.keys() ^ second.keys())[:3]}")
    for key, value in first.items():
        other = second[key]
        same = (
            value == other
            if not isinstance(value, Tensor)
            else value.shape == other.shape
            and value.dtype == other.dtype
            and (value.is_meta or torch.equal(value.nan_to_num(), other.nan_to_num()))
        )
        expect(bool(same), f"{key} differs in the rebuilt network")


def structure(model: nn.Module) -> dict[str, tuple[type[nn.Module], str]]:
    """Every module's class and settings."""
    return {name: (type(module), module.extra_repr()) for name, module in model.named_modules()}


class Original:
    """What a network is before surgery: its modules, its parameters, and what its forwards do with its layers."""

    def __init__(self, model: nn.Module) -> None:
        self.structure = structure(model)
        self.keys = list(model.state_dict())
        self.parameters = dict(model.named_parameters())
        self.values = {n: p.detach().clone() for n, p in self.parameters.items() if not p.is_meta}
        self.layers = {name: module for name, module in model.named_modules() if _is_weight_layer(module)}
        classifier = cast(Any, model).pretrained_cfg.get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else classifier
        self.heads = tuple(name.split(".")[0] for name in names)
        self.called: dict[bool, set[str]] = {False: set(), True: set()}  # modules by mode: in eval, in training
        self.behind_parameters: set[str] = set()
        self.on_maps: set[str] = set()  # layers that see more than one pixel

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Looks at forwards of the float network: which modules are called, which read what depends on a parameter."""

        def watch(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                self.called[model.training].add(name)
                tensors = tensors_in([inputs, named])
                if any(x.requires_grad for x in tensors):
                    self.behind_parameters.add(name)
                if tensors and tensors[0].numel() > tensors[0].shape[:1].numel() * _channels(module)[0]:
                    self.on_maps.add(name)

            return hook

        modules = model.named_modules()
        handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_weight_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, _WEIGHT_LAYERS) or (
        isinstance(weight, Tensor) and weight.dim() > 1 and not isinstance(module, nn.LayerNorm)
    )


# -- the report and the weights ----------------------------------------------------------------------------------------


def note_report(report: BinarizationReport, model: nn.Module, row: Row) -> None:
    totals = report.totals()
    row.layers, row.binary_layers = totals["layers"], totals["binary_layers"]
    row.binary_parameters_share = round(totals["binary_parameters_share"], 4)
    row.binary_operations_share = round(totals["binary_macs_share"], 4)


def check_report(report: BinarizationReport, model: nn.Module, original: Original, config: dl.BinaryConfig) -> None:
    """Every weight layer has a row, each row tells what is there, no rule contradicts the facts, and most is binary."""
    rows = {row.name: row for row in report.rows}
    missing = original.layers.keys() - rows.keys()
    expect(not missing, f"{len(missing)} weight layers are not in the report, such as {sorted(missing)[:3]}")
    binary = set(binary_layers(model))
    expect(len(binary) > 0, "no layer became binary")
    named = {row.name for row in report.rows if row.rule == "binary"}
    expect(named == binary, f"the report and the model differ in what is binary: {sorted(named ^ binary)[:3]}")
    weights = {False: 0, True: 0}
    for name, layer in original.layers.items():
        rule, facts = rows[name].rule, _facts(name, layer, original)
        expect(rule in {"binary", "gate"} | facts, f"{name}: rule {rule!r} does not hold")
        overlooked = rule == "binary" and "depthwise" in facts and "depthwise" in config.skip_rules
        expect(not overlooked, f"{name} is binary, though it is depthwise")
        if not facts - {"downsample"}:
            weights[name in binary] += rows[name].parameters
    gates = sum(
        rows[name].parameters for name in original.on_maps & original.layers.keys() if rows[name].rule == "gate"
    )
    all_weights = sum(rows[name].parameters for name in original.layers)
    expect(
        gates <= LARGEST_GATES * all_weights, f"{gates / all_weights:.1%} of the weights are gates that see whole maps"
    )
    is_skipped = any(rows[name].rule == "first" for name in original.layers)
    expect(is_skipped or "first" not in config.skip_rules, "no layer reads the network's input")
    share = weights[True] / max(sum(weights.values()), 1)
    expect(share >= LEAST_BINARY, f"only {share:.1%} of the weights that could be binary are")


def _channels(layer: nn.Module) -> tuple[int, int]:
    """Of a layer's input and output; 0 where a module has none."""
    inner, outer = (
        next((getattr(layer, k) for k in names if isinstance(getattr(layer, k, None), int)), 0)
        for names in (("in_channels", "in_features"), ("out_channels", "out_features"))
    )
    return inner, outer


def _facts(name: str, layer: nn.Module, original: Original) -> set[str]:
    """The rules that may hold for a layer by what is known without surgery's probe. Of gates nothing is."""
    inner, outer = _channels(layer)
    resizes = inner != outer or getattr(layer, "stride", (1, 1)) not in ((1, 1), (1,))
    facts = {
        "no twin": type(layer) not in TWINNED,
        "not called": name not in original.called[False],
        "first": name in original.called[False] and name not in original.behind_parameters,
        "last": name.startswith(original.heads),
        "depthwise": inner == getattr(layer, "groups", 1),
        "downsample": resizes or bool({"downsample", "shortcut"} & set(name.split("."))),
    }
    return {rule for rule, holds in facts.items() if holds}


def check_latent_weights(report: BinarizationReport, model: nn.Module, original: Original) -> None:
    """The parameters of the float network are those of the binary one, number for number; a companion may have replaced some."""
    companions = tuple(f"{row.name}." for row in report.rows if row.rule == "companion")
    now = dict(model.named_parameters())
    for name, parameter in original.parameters.items():
        if name not in now:
            expect(name.startswith(companions), f"{name} is gone")
            continue
        expect(now[name] is parameter, f"{name} is another tensor than in the float network")
        expect(name not in original.values or torch.equal(original.values[name], parameter), f"{name} has other values")


def check_stage_weights(model: nn.Module) -> None:
    """What each layer multiplies by is one bit a weight, times a factor of the output channel: that of its latent weights."""
    with torch.no_grad():
        for name, layer in binary_layers(model).items():
            expect(layer.stage == "both", f"{name} is in stage {layer.stage!r}")
            latent, binarizer = layer.latent_weight(), layer.weight_binarizer
            signs, scale = binarizer.signs(latent), binarizer.scale(latent)
            factor = 1 if scale is None else scale.view(-1, *[1] * (latent.dim() - 1))
            expect(bool((signs.abs() == 1).all()), f"{name}: the signs of its weights are other values than +-1")
            expect(abs(float(signs.sum())) < signs.numel(), f"{name}: all its weights have the same sign")
            expect(torch.equal(layer.stage_weight(), signs * factor), f"{name}: its weights are not signs times scale")


def tolerance_of(model: nn.Module) -> float:
    """0, or the rounding of a sum in another order: surgery has some attentions add the bias of qkv separately."""
    return 1e-5 if any(getattr(module, "qkv_bias_separate", False) for module in model.modules()) else 0.0


def check_restored(model: nn.Module, original: Original) -> None:
    """After `unbinarize_`: the float network's modules, settings, keys and parameters."""
    now = structure(model)
    differing = [n for n in {**original.structure, **now} if original.structure.get(n) != now.get(n)]
    expect(not differing, f"unbinarize_ left {len(differing)} modules other than they were, such as {differing[:3]}")
    expect(list(model.state_dict()) == original.keys, "unbinarize_ gave other keys of the state dict")
    others = [name for name, p in model.named_parameters() if p is not original.parameters[name]]
    expect(not others, f"unbinarize_ left {len(others)} other parameters, such as {others[:3]}")
    changed = [name for name, value in original.values.items() if not torch.equal(value, original.parameters[name])]
    expect(not changed, f"{len(changed)} parameters have other values after unbinarize_, such as {changed[:3]}")


def keeping_activations(config: dl.BinaryConfig) -> dl.BinaryConfig:
    """One by which a network in stage `float` is the float network."""
    return replace(config, activation="design", companion="keep", shortcut="none", downsample="keep", overrides={})
