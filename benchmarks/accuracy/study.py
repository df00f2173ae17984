"""The study's grid: what `study.yaml` says, as values, and the command of each run."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml

import design_lightning as dl

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
STUDY = FOLDER / "study.yaml"

Kind = Literal["baseline", "control", "design"]
STARTING_SECONDS = 25  # of a run: imports, and 50,000 small files that are decoded
EVALUATING = 2.5  # images evaluated in the time of one trained on


@cache
def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


@dataclass(frozen=True)
class Network:
    """A network: its configuration beside this file, and how many images a second one core trains on."""

    name: str
    config: str
    images_per_second: float

    def base(self) -> dict[str, Any]:
        """Its configuration, to which a run adds options."""
        return _read(FOLDER / self.config)


@dataclass(frozen=True)
class Setting:
    """What changes more than thresholds, and so for every arm alike: fields of `BinaryConfig`."""

    name: str
    binary: dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A way to threshold: fields of `BinaryConfig`, and callbacks.

    Args:
        name: in the table.
        kind: only a `design` arm can be the best DeSign arm.
        binary: fields of `BinaryConfig`.
        callbacks: as in a YAML.
        networks: those that it is tried on; all where empty.
        designed: its kernels, one a layer, come from the files that `designing.py` makes.
    """

    name: str
    kind: Kind
    binary: dict[str, Any]
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    designed: bool = False

    def control(self) -> Self:
        """This arm with its kernels replaced by constants, each of the same mean; nothing else changes."""
        binary = {**self.binary, "kernel": constant(self.binary["kernel"])}
        if "overrides" in binary:
            binary["overrides"] = {
                layer: {**values, "kernel": constant(values["kernel"])} for layer, values in binary["overrides"].items()
            }
        return replace(self, name=f"constant_of_{self.name}", kind="control", binary=binary)

    def does_as(self, other: "Arm") -> bool:
        """Whether both are one thing under two names; a fixed threshold of 0 everywhere is Sign."""
        return self._canonical() == other._canonical()

    def _canonical(self) -> str:
        is_fixed = "kernel" in self.binary and not self.binary.get("learn_kernel") and "overrides" not in self.binary
        if is_fixed and constant_level(self.binary["kernel"]) == 0:
            return json.dumps([{"activation": "sign"}, []])
        return json.dumps([self.binary, self.callbacks], sort_keys=True)


def constant(kernel: Any) -> list[list[list[float]]]:
    """The constant kernel with the mean of another, to 8 digits."""
    return [[[round(dl.ThresholdKernel.of(kernel).mean(), 8) + 0.0]]]


def constant_level(kernel: Any) -> float | None:
    """The one level of a constant kernel; None of another."""
    levels = {level for plane in dl.ThresholdKernel.of(kernel).levels for row in plane for level in row}
    return levels.pop() if len(levels) == 1 else None


@dataclass(frozen=True)
class Budget:
    """How long a run is, and what is measured at its end.

    Args:
        split: `held-out` or `test`.
        options: of `design-train fit`.
        evaluated: images that are measured, once.
        networks: further options for single networks.
    """

    split: str
    options: dict[str, Any]
    evaluated: int
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, network: Network) -> dict[str, Any]:
        """The options for a network; its last epoch alone is measured."""
        options = {**self.options, **self.networks.get(network.name, {})}
        return {**options, "trainer.check_val_every_n_epoch": options["trainer.max_epochs"]}

    def visits(self, network: Network) -> int:
        """Images that a run trains on, each as often as it is seen."""
        options = self.of(network)
        batch: int = options.get("data.batch_size") or network.base()["data"]["init_args"]["batch_size"]
        return batch * int(options["trainer.max_epochs"]) * int(options["trainer.limit_train_batches"])

    def seconds(self, network: Network) -> float:
        """What a run takes."""
        return (self.visits(network) + self.evaluated / EVALUATING) / network.images_per_second + STARTING_SECONDS


@dataclass(frozen=True)
class Run:
    """One training: a row of the results."""

    step: str
    network: Network
    setting: Setting
    arm: Arm
    rate: float
    seed: int
    budget: Budget
    affine: bool = True

    @property
    def name(self) -> str:
        """Tells it from all others; also its folder below `runs/accuracy`."""
        return f"{self.step}/{self.network.name}/{self.setting.name}/{self.arm.name}/lr{self.rate:g}/seed{self.seed}"

    def options(self) -> dict[str, Any]:
        """What it adds to its network's configuration."""
        return {
            "seed_everything": self.seed,
            "data.seed": self.seed,
            "model.optimizer.lr": self.rate,
            **self.budget.of(self.network),
            **({} if self.affine else {"model.backbone_args.norm_affine": False}),
            **{f"model.binary.{key}": value for key, value in {**self.setting.binary, **self.arm.binary}.items()},
            **({"trainer.callbacks+": self.arm.callbacks} if self.arm.callbacks else {}),
        }

    def command(self, data: str) -> list[str]:
        """`design-train fit` and its arguments, from the repository's root."""
        config = (FOLDER / self.network.config).relative_to(ROOT)
        options = {**self.options(), "data.root": data, "trainer.logger.name": self.name}
        flat = [part for key, value in options.items() for part in (f"--{key}", _as_argument(value))]
        return ["design-train", "fit", "--config", str(config), *flat]

    @cached_property
    def config(self) -> str:
        """A hash over all that decides what the run does, but for the code."""
        text = json.dumps([self.network.base(), self.options()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Study:
    """All of `study.yaml`."""

    networks: list[Network]
    rates: list[float]
    budgets: dict[str, Budget]
    seeds: dict[str, list[int]]
    judges: list[str]
    settings: list[Setting]
    arms: dict[str, Arm]

    @classmethod
    def read(cls, path: Path = STUDY) -> Self:
        """From a YAML file of that shape."""
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(
            networks=[Network(name, **values) for name, values in given["networks"].items()],
            rates=given["rates"],
            budgets={name: Budget(**values) for name, values in given["budgets"].items()},
            seeds=given["seeds"],
            judges=given["judges"],
            settings=[Setting(name, binary) for name, binary in given["settings"].items()],
            arms={name: Arm(name, **values) for name, values in given["arms"].items()},
        )

    def networks_of(self, arm: Arm) -> list[Network]:
        """Those that an arm is tried on."""
        return [network for network in self.networks if network.name in (arm.networks or [network.name])]
