"""`BinaryConfig`: everything that decides how a network is binarized, as one immutable value."""

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import yaml
from torch import Tensor, nn

from design_lightning._names import class_by_name, did_you_mean
from design_lightning.binary import ACTIVATIONS, ESTIMATORS, WEIGHT_BINARIZERS
from design_lightning.binary.activations import BinaryActivation
from design_lightning.binary.companions import CompanionName
from design_lightning.binary.estimators import Estimator
from design_lightning.binary.keeping import Keeps
from design_lightning.binary.layers import PaddingValue, Stage
from design_lightning.binary.weights import WeightBinarizer
from design_lightning.kernels import Alignment, ThresholdKernel
from design_lightning.kernels.kernel import REGISTERED

FORMAT_VERSION = 1

PolicyName = Literal["conservative", "paper", "reactnet", "everything"]
Shortcut = Literal["none", "bireal"]
Downsample = Literal["keep", "avgpool"]
SkipRule = Literal["first", "last", "depthwise", "gate", "downsample"]


@dataclass(frozen=True)
class Policy:
    """What a policy stands for: the values of those fields that a configuration leaves out."""

    skip: tuple[SkipRule, ...] = get_args(SkipRule)
    activation: str = "design"
    companion: CompanionName = "hardtanh"
    shortcut: Shortcut = "none"
    downsample: Downsample = "keep"


POLICIES: dict[str, Policy] = {
    "conservative": Policy(),
    # Xu et al., ReCU, ICCV 2021, arXiv:2103.12369, on which the paper of DeSign builds: first, last and downsampling layers float,
    # Hardtanh, a shortcut around every 3x3 convolution. It has neither depthwise layers nor gates to speak of.
    "paper": Policy(skip=("first", "last", "downsample"), shortcut="bireal"),
    # Liu et al., ReActNet, ECCV 2020, arXiv:2003.03488.
    "reactnet": Policy(activation="rsign", companion="rprelu", shortcut="bireal", downsample="avgpool"),
    "everything": Policy(skip=()),
}


@dataclass(frozen=True)
class BinaryConfig:
    """How to binarize a network; every field has a default.

    Args:
        activation: the binarizer of a layer's input: `design`, `sign`, `rsign`, the dotted path of a `BinaryActivation`, or
            `none` for layers whose weights alone become binary. The policy's where null.
        activation_args: what the class of a dotted path takes beside `channels`, `layout` and the estimator.
        kernel: of `design`: a published name, a registered one or a kernel's JSON file (both read at once, so that a checkpoint
            needs neither), a `ThresholdKernel`, or levels [D, h, w]. Unused by the others.
        scale: of `design`: factor of the kernel; 1 is the paper's, 0 is plain Sign.
        scale_by_gamma: of `design`: multiply the thresholds by the weight of the one norm that feeds the layer.
        align: of `design`: `topleft` or `center`.
        learn_kernel: of `design`: train the thresholds of each layer.
        estimator: the pseudo-gradient: `ste`, `approx_sign`, `swish_sign`, `ede`, `reste`, or a dotted path.
        estimator_args: what its constructor takes, such as `{clip: 1.25}`.
        weight: the weight binarizer: `sign`, `xnor`, `learned`, `recu`, `irnet`, or a dotted path.
        weight_args: what its constructor takes, such as `{tau: 0.9}`.
        padding_value: what pads a binary input: 0, 1, -1 or `replicate`.
        companion: what replaces the float activations whose output reaches a binarizer: `hardtanh`, `prelu`, `rprelu`,
            `identity`, or `keep`. The policy's where null.
        shortcut: `bireal` adds a layer's real-valued input behind the norm that follows it (behind the layer where none does),
            around every binary convolution that has none of its own and keeps its input's shape; `none` adds none. The
            policy's where null.
        downsample: `avgpool` makes a strided 1x1 projection of a shortcut that the rule `downsample` leaves float an average
            pool and a 1x1 convolution; `keep` leaves it. The policy's where null.
        policy: a named choice for the fields that are null: `conservative` (float first, last, depthwise, gate and downsample
            layers, DeSign, Hardtanh), `paper` (float first, last and downsample layers, DeSign, Hardtanh, shortcuts),
            `reactnet` (as conservative, with RSign, RPReLU, shortcuts, average pools) or `everything` (no layer float).
        skip: the rules by which layers stay float: any of `first`, `last`, `depthwise`, `gate`, `downsample`. The policy's
            where null.
        overrides: other values of these fields for the layers whose name matches a pattern (a name, a glob, or `re:` and a
            regular expression); null leaves them float; the last match wins. A layer that a rule would skip becomes binary
            by `{skip: []}`. A pattern may also name a float activation, with `{companion: ...}`.
        stage: `float`, `activations` or `both`; `set_stage_` changes it later.
        keeps: what the layers keep for the backward pass: `bits` (an estimator's derivative as 1 bit, or 4), `exact` (such a
            derivative as a float) or `floats` (the naive way, which a double backward needs); `keep_for_backward_` changes it.

    Raises:
        ValueError: if a value is unknown; names the nearest known one.

    >>> print(BinaryConfig(activation="sign", skip=["first", "last"]).to_yaml(defaults=False), end="")
    activation: sign
    skip: [first, last]
    """

    activation: str | None = None
    activation_args: dict[str, Any] = field(default_factory=dict)
    kernel: str | dict[str, Any] | list[Any] | None = "2x2_v1"
    scale: float = 1.0
    scale_by_gamma: bool = False
    align: Alignment = "topleft"
    learn_kernel: bool = False
    estimator: str = "approx_sign"
    estimator_args: dict[str, Any] = field(default_factory=dict)
    weight: str = "xnor"
    weight_args: dict[str, Any] = field(default_factory=dict)
    padding_value: PaddingValue = 0
    companion: CompanionName | None = None
    shortcut: Shortcut | None = None
    downsample: Downsample | None = None
    policy: PolicyName = "conservative"
    skip: list[SkipRule] | None = None
    overrides: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    stage: Stage = "both"
    keeps: Keeps = "bits"

    def __post_init__(self) -> None:
        _check_kinds(self)
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: use one of {', '.join(POLICIES)}")
        for name, value in vars(POLICIES[self.policy]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, list(value) if name == "skip" else value)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(map(str, choices))}")
        if self.activation != "none":
            class_by_name(str(self.activation), ACTIVATIONS, BinaryActivation, "activation")
        estimator = class_by_name(self.estimator, ESTIMATORS, Estimator, "estimator")
        weight = class_by_name(self.weight, WEIGHT_BINARIZERS, WeightBinarizer, "weight binarizer")
        _check_arguments("estimator_args", self.estimator_args, self.estimator, estimator)
        _check_arguments("weight_args", self.weight_args, self.weight, weight)
        if _is_elsewhere(self.kernel) or isinstance(self.kernel, ThresholdKernel | Tensor):
            object.__setattr__(self, "kernel", _kernel_as_dict(ThresholdKernel.of(cast(Any, self.kernel))))
        object.__setattr__(self, "overrides", {k: _with_kernel_inside(v) for k, v in self.overrides.items()})
        if not isinstance(self.scale, int | float) or isinstance(self.scale, bool):
            raise ValueError(f"scale must be a number, not {self.scale!r}")
        for name in ("scale_by_gamma", "learn_kernel"):
            if getattr(self, name) and self.activation != "design":
                raise ValueError(f"{name} goes with activation 'design', not with {self.activation!r}; leave it out")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} is no finite number")
        if self.activation == "design":
            self.threshold_kernel()
        for rule in self.skip or ():
            if rule not in get_args(SkipRule):
                raise ValueError(f"unknown skip rule {rule!r}: {did_you_mean(str(rule), get_args(SkipRule))}")
        for pattern, override in self.overrides.items():
            self._check_override(pattern, override)

    def _check_override(self, pattern: str, override: Mapping[str, Any] | None) -> None:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"override {pattern!r} is no regular expression: {error}") from error
        known = {f.name for f in dataclasses.fields(self)} - {"policy", "overrides", "stage", "keeps"}
        for name in override or ():
            if name not in known:
                raise ValueError(
                    f"override {pattern!r} sets {name!r}, which is no field of a layer: {did_you_mean(str(name), known)}"
                )
        if override is not None:
            try:
                self.overridden(override)
            except ValueError as error:
                raise ValueError(f"override {pattern!r}: {error}") from error

    def overridden(self, override: Mapping[str, Any]) -> "BinaryConfig":
        """This configuration with other values for one layer."""
        return dataclasses.replace(self, **{**override, "overrides": {}})

    @property
    def skip_rules(self) -> tuple[SkipRule, ...]:
        """The rules in force."""
        return tuple(self.skip or ())

    def threshold_kernel(self) -> ThresholdKernel:
        """The kernel of `design`.

        Raises:
            ValueError: if there is none, or it is not a kernel.
        """
        if self.kernel is None:
            raise ValueError("activation 'design' needs a kernel: give a name such as 2x2_v1, or use activation 'sign'")
        if isinstance(self.kernel, dict):
            return ThresholdKernel(**self.kernel)
        return ThresholdKernel.of(self.kernel)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts, with a format version: what a checkpoint stores."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` gave, or a mapping of some fields.

        Raises:
            ValueError: if a field is unknown, or the format is newer than this release.
        """
        values = dict(stored)
        version = values.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"BinaryConfig has format version {version}, but this release reads {FORMAT_VERSION}; update design-lightning"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"unknown field {name!r} of BinaryConfig: {did_you_mean(str(name), known)}")
        return cls(**values)

    def to_yaml(self, defaults: bool = True) -> str:
        """The configuration as YAML.

        Args:
            defaults: also print the fields that have their default value.
        """
        usual = BinaryConfig(policy=self.policy)  # whose other fields need not be said, where the policy is
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not defaults:
            shown = {
                n: v
                for n, v in shown.items()
                if v != getattr(usual, n) or (n == "policy" and v != BinaryConfig().policy)
            }
        return yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=120)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The configuration that a YAML text holds."""
        return cls.from_dict(yaml.safe_load(text) or {})


_CHOICES: dict[str, tuple[Any, ...]] = {
    "align": get_args(Alignment),
    "padding_value": get_args(PaddingValue),
    "companion": get_args(CompanionName),
    "shortcut": get_args(Shortcut),
    "downsample": get_args(Downsample),
    "stage": get_args(Stage),
    "keeps": get_args(Keeps),
}


_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("activation", "policy"), ("a name", (str, type(None)))),
    **dict.fromkeys(("estimator", "weight"), ("a name", (str,))),
    **dict.fromkeys(("activation_args", "estimator_args", "weight_args", "overrides"), ("a mapping", (Mapping,))),
    **dict.fromkeys(("scale_by_gamma", "learn_kernel"), ("true or false", (bool,))),
    "skip": ("a list of rules, such as [first, last]", (list, tuple, type(None))),
}


def _check_kinds(config: BinaryConfig) -> None:
    """Raises where a field holds another kind of value, as a YAML file may have it, before anything looks into it."""
    for name, (kind, classes) in _KINDS.items():
        value = getattr(config, name)
        if not isinstance(value, classes):
            raise ValueError(f"{name} must be {kind}, not {value!r}")
    for pattern, override in config.overrides.items():
        if not isinstance(pattern, str):
            raise ValueError(f"a pattern of overrides must be a text, not {pattern!r}; put it in quotation marks")
        if override is not None and not isinstance(override, Mapping):
            raise ValueError(f"override {pattern!r} must be a mapping of fields, or null, not {override!r}")


def _check_arguments(field_name: str, arguments: Mapping[str, Any], choice: str, kind: type) -> None:
    has_own = cast(Any, kind).__init__ is not nn.Module.__init__  # which takes anything, and refuses it later
    parameters = inspect.signature(kind).parameters if has_own else {}
    known = [name for name in parameters if name != "latent"]
    for name in arguments:
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"{field_name} has {name!r}, which {choice!r} does not take; {takes}")


def _with_kernel_inside(override: dict[str, Any] | None) -> dict[str, Any] | None:
    """An override with its kernel read, as the configuration's own is."""
    if override is None or not _is_elsewhere(override.get("kernel")):
        return override
    return {**override, "kernel": _kernel_as_dict(ThresholdKernel.of(override["kernel"]))}


def _is_elsewhere(kernel: Any) -> bool:
    """Whether a kernel is in a file or a plugin, which may be gone when a checkpoint is read."""
    return isinstance(kernel, str | Path) and (str(kernel).endswith(".json") or str(kernel) in REGISTERED)


def _kernel_as_dict(kernel: ThresholdKernel) -> dict[str, Any]:
    levels = [[list(row) for row in plane] for plane in kernel.levels]
    return {"levels": levels, "name": kernel.name, "provenance": kernel.provenance}
