"""The plan of one surgery: what is known of the model, and every decision, before anything is changed."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from design_lightning._names import did_you_mean
from design_lightning.binary import BinaryLayer
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.float_activations import is_activation
from design_lightning.surgery.float_layers import is_weight_layer
from design_lightning.surgery.parts import binary_weights, computed_scales
from design_lightning.surgery.probe import LayerCall, Probe, ProbeError, probe
from design_lightning.surgery.report import BinarizationReport, Row
from design_lightning.surgery.rules import Facts


@dataclass
class Plan:
    """The decisions about one model, made before anything is changed."""

    model: nn.Module
    config: BinaryConfig
    example_input: Tensor | Sequence[int] | None
    probe: Probe | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    binary: dict[str, BinaryConfig] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)
    shortcuts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.model, BinaryLayer) or is_weight_layer(self.model):
            raise ValueError(
                f"{type(self.model).__name__} is a layer itself; use its binary twin's from_float, or pass its parent"
            )
        self.modules = dict(self.model.named_modules())
        self.names: dict[nn.Module, list[str]] = {}
        """Every name of each module; a shared one has several, and stands in `modules` under its first."""
        for name, module in self.model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.bytes_before = 4 * sum(p.numel() for p in self.model.parameters())
        try:
            self.probe = probe(self.model, self.example_input)
        except ProbeError as error:
            if self.example_input is not None:
                raise ValueError(f"the model's forward fails on the example input: {error}") from error
            self.note(
                f"no probing forward went through ({error}); rules went by the order of modules, and every float activation was "
                "taken to reach a binarizer. Pass example_input."
            )
        self.facts = Facts.of(self.model, self.probe)
        self._check_patterns()

    def note(self, text: str, warn: bool = True) -> None:
        """Adds to the report's notes, and to what the user is warned of in the end."""
        self.notes.append(text)
        if warn:
            self.warnings.append(text)

    def _check_patterns(self) -> None:
        known = [n for m, names in self.names.items() if is_weight_layer(m) or is_activation(m) for n in names]
        for pattern in self.config.overrides:
            if not any(matches(pattern, name) for name in known):
                raise ValueError(
                    f"override {pattern!r} matches no layer and no activation: {did_you_mean(pattern, known)}"
                )

    def config_of(self, name: str) -> BinaryConfig | None:
        """The configuration of one module, its overrides applied; None where the last match is null."""
        config: BinaryConfig | None = self.config
        for pattern, override in self.config.overrides.items():
            if any(matches(pattern, alias) for alias in self.names[self.modules[name]]):
                config = None if override is None else (config or self.config).overridden(override)
        return config

    def call(self, name: str) -> LayerCall | None:
        """What the probe saw of a layer, if it went through and the layer was called."""
        return self.probe.layers.get(name) if self.probe else None

    def report(self) -> BinarizationReport:
        """The rows in the order of the module tree, and the totals; of a model that is binary by now."""
        rows = tuple(self.rows[name] for name in self.modules if name in self.rows)
        weights = binary_weights(self.model)
        return BinarizationReport(
            rows,
            sum(p.numel() for p in self.model.parameters()),
            sum(weight.numel() for weight in weights.values()),
            computed_scales(self.model),
            self.bytes_before,
            tuple(self.notes),
            {name: count // self.probe.input_shape[0] for name, count in self.probe.products.items()}
            if self.probe
            else {},
        )


def matches(pattern: str, name: str) -> bool:
    """Whether a module's name is meant by a pattern: a name, a glob, or `re:` and a regular expression."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)
