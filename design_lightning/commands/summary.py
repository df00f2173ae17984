"""`design-train summary`: what a network holds and computes before and after it is binarized, stage by stage.

Nothing is trained, and no data or weights are read: the network is built without storage.
"""

import json as json_
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, instantiate_class
from torch import nn

from design_lightning.commands.lightning import DesignCLI, run
from design_lightning.training.trainer import DesignTrainer

if TYPE_CHECKING:
    from design_lightning.surgery import BinaryConfig
    from design_lightning.surgery.summary import Summary


class SummaryTrainer(DesignTrainer):
    """The Trainer of this command, which is never built."""

    def summary(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        size: int | None = None,
        classes: int | None = None,
        json: bool = False,
    ) -> None:
        """Prints what each stage of a network holds and computes, binarized and as float.

        Args:
            model: the name of a network, such as `--model resnet18`; or the model of a configuration.
            datamodule: its images decide the input, and its labels the number of classes, if its files are there.
            size: height and width of the images; the data's, or else the network's own, if not given.
            classes: of the network; the data's, or else 1000, if not given.
            json: print JSON in place of the table.
        """


class SummaryCLI(DesignCLI):
    """The command line of this command: configurations and errors as those of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one command."""
        return {"summary": {"model", "datamodule"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a configuration may hold; data is not required."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links nothing: data is not needed here."""

    def instantiate_classes(self) -> None:
        """Builds neither model nor Trainer."""

    def after_instantiate_classes(self) -> None:
        """Nothing was."""

    def _run_subcommand(self, subcommand: str) -> None:
        from design_lightning.surgery import BinaryConfig
        from design_lightning.surgery.summary import summarize

        config = self.config[subcommand]
        given = config.model.get("init_args") or Namespace()
        if "backbone" not in given:
            raise ValueError(
                f"{config.model.class_path} has no backbone; summary shows DesignClassifier's and its like"
            )
        for name in ("size", "classes"):
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"{name} is {config[name]}, but must be at least 1")
        classes, shape = _of_data(config.get("data"))
        classes = config.classes or classes or given.num_classes
        binary = given.get("binary")
        binary = BinaryConfig.from_dict(dict(vars(binary))) if isinstance(binary, Namespace) else binary
        network = _network(given.backbone, classes, dict(given.get("backbone_args") or {}), shape)
        channels = shape[0] if shape else None
        side = (config.size, config.size) if config.size else shape[1:] if shape else None
        found = summarize(network, binary, channels, side)
        if config.json:
            about = {"network": given.backbone, "classes": classes, "binary": binary and binary.to_dict()}
            print(json_.dumps({**about, **found.to_dict()}, indent=2))
        else:
            _print(found, given.backbone, classes, binary)


def main(command: str, args: Sequence[str]) -> None:
    """Runs the command."""
    run(command, [*_spelled_out(args), "--seed_everything=false"], SummaryCLI, SummaryTrainer, saves_config=False)


def _spelled_out(args: Sequence[str]) -> list[str]:
    """The arguments as those of `fit`: `--model NAME` of a network, `--binary.X`, and `--json` without a value."""
    import timm

    found: list[str] = []
    arguments = iter(args)
    for arg in arguments:
        option, equals, value = arg.partition("=")
        if option == "--model":
            value = value if equals else next(arguments, "")
            if value != value.lower() and not timm.is_model(value.lower()):  # a class; networks have lower-case names
                found.append(f"--model={value}")
            else:
                found += ["--model=DesignClassifier", f"--model.backbone={value}"]
        elif option == "--binary" or option.startswith("--binary."):
            found.append(f"--model.{arg.removeprefix('--')}")
        else:
            found.append("--json=true" if arg == "--json" else arg)
    return found


def _of_data(data: Namespace | None) -> tuple[int | None, tuple[int, ...] | None]:
    """The number of classes and the shape of an image, as far as the data knows them without its files."""
    if not data:
        return None, None
    arguments = {**data.get("init_args", Namespace()).as_dict(), **(data.get("dict_kwargs") or {})}
    module: Any = instantiate_class((), {"class_path": data.class_path, "init_args": arguments})
    shape = getattr(module, "input_size", None)
    try:
        return getattr(module, "num_classes", None), shape
    except OSError:  # the files are not here
        return None, shape


def _network(name: str, classes: int, arguments: dict[str, Any], shape: tuple[int, ...] | None) -> nn.Module:
    """The network without storage, or with where it cannot be built so."""
    from design_lightning.training.backbone import create_backbone

    arguments.pop("checkpoint_path", None)
    try:
        with torch.device("meta"):
            return create_backbone(name, classes, False, arguments, shape)
    except (RuntimeError, NotImplementedError):  # a constructor that reads numbers
        return create_backbone(name, classes, False, arguments, shape)


def _print(found: "Summary", name: str, classes: int, binary: "BinaryConfig | None") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    image = "x".join(map(str, found.input_shape))
    how = f"policy {binary.policy}" if binary else "float"
    console.print(f"{name}, {how}, {classes:,} classes, images of {image}\n", style="bold")
    console.print(found)
