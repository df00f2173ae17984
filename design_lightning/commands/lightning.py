"""`design-train fit | validate | test | predict`: LightningCLI with recipes by name, default callbacks and short errors."""

import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from design_lightning.cli import DEBUG, USERS_ERRORS, fail, users_error
from design_lightning.commands.checks import (
    LINKED,
    check_checkpoint,
    check_linked,
    check_trainer,
    compare_classes,
    not_written,
    out_of_memory,
)
from design_lightning.commands.processes import one_fate, watch_
from design_lightning.commands.recipes import find_config
from design_lightning.commands.yaml_files import check_keys, files_of
from design_lightning.training import AtomicCheckpointIO, DesignTrainer
from design_lightning.training.checkpoint_files import PREEMPTED, is_exported, read_checkpoint
from design_lightning.training.memory import is_out_of_memory

EXPORTED_CLASSIFIER = "design_lightning.training.ExportedClassifier"
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")
_NO_DEVICE = re.compile(r"No supported gpu backend|can not run on your system")
MEASURING = ("validate", "test", "predict")
"""The commands that take exported files as `--ckpt_path`."""


class DesignParser(LightningArgumentParser):
    """A parser whose errors are one line: what is wrong, the nearest right name, and where to look."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: D102
        if os.environ.get(DEBUG) and ex is not None:
            raise ex
        from design_lightning.commands.errors import explain

        options = [option.lstrip("-") for option in self._option_string_actions]
        fail(f"{explain(message, sys.argv[1:], options)} (see: design-train {sys.argv[1]} --help)", code=2)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """A configuration as YAML, with what the data may set too: other data may not know the number of classes."""
        return str(super().dump(*args, **{"skip_link_targets": False, **kwargs}))


class DesignCLI(LightningCLI):
    """LightningCLI with this project's defaults."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one command that is run: the arguments of the others take a second to build."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name == sys.argv[1]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """One of `DesignParser`, with LightningCLI's `--config`."""
        kwargs.setdefault(
            "epilog", "The model's options: --model.help DesignClassifier. The data's: --data.help CIFAR10."
        )
        kwargs.setdefault("allow_abbrev", False)  # a cut-off option is a typo, not a wish
        parser = DesignParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="A recipe's name or a YAML file; may be given several times."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what the data knows into the model."""
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Takes the network of a `--ckpt_path` from the checkpoint, whatever the configuration says."""
        config = self.config[self.config.subcommand]
        path, model = config.get("ckpt_path"), config.get("model")
        if is_exported(path) and self.config.subcommand in MEASURING:
            arguments = Namespace(path=path, num_classes=None, **dict.fromkeys(LINKED[1:]))
            config.model = Namespace(class_path=EXPORTED_CLASSIFIER, init_args=arguments)
            config.ckpt_path = None
            return
        if not (path and model and Path(path).is_file() and model.class_path.endswith(".DesignClassifier")):
            return
        stored = read_checkpoint(path, "ckpt_path").get("hyper_parameters", {})
        network = {name: stored[name] for name in ("backbone", "backbone_args", "channels_last") if name in stored}
        if binary := stored.get("binary"):
            binary = {name: value for name, value in binary.items() if name != "format_version"}
        network["binary"] = binary
        for name, value in network.items():  # set whole: merged, an override of the configuration would survive
            given = model.init_args.get(name)
            stored_value = Namespace(value) if name == "binary" and value else value
            if _resolved(name, given) != _resolved(name, stored_value):
                print(
                    f"{name} is taken from the checkpoint {path}, which differs from the configuration", file=sys.stderr
                )
            model.init_args[name] = stored_value

    def instantiate_classes(self) -> None:
        """Builds what the configuration names; a foreign class that refuses is named in a line, as are ours."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            from design_lightning.commands.errors import why_not_built

            if why := why_not_built(error, sys.argv[1:]):
                raise ValueError(why) from error
            raise

    def before_instantiate_classes(self) -> None:
        """Lets float32 matrix products use tensor cores, and reads a kernel's file, so that the saved configuration holds it.

        Looks at the names that Lightning would refuse with a long list, or where there is none.
        """
        check_trainer(self.config[self.config.subcommand].trainer)
        torch.set_float32_matmul_precision("high")
        model = self.config[self.config.subcommand].get("model")
        binary = model.init_args.get("binary") if model and "init_args" in model else None
        if isinstance(binary, Namespace) and str(binary.get("kernel")).endswith(".json"):
            from design_lightning.surgery import BinaryConfig

            binary.kernel = BinaryConfig(kernel=binary.kernel).kernel

    def after_instantiate_classes(self) -> None:
        """Puts what the data set into the configuration that is saved, and says where the data does not know the classes."""
        model = self.config[self.config.subcommand].get("model")
        if (
            self.datamodule is None
            or not model
            or not model.class_path.endswith((".DesignClassifier", ".ExportedClassifier"))
        ):
            return
        given, path = model.init_args.get("num_classes"), self.config[self.config.subcommand].get("ckpt_path")
        for line in compare_classes(self.datamodule, self.model, given, path):
            print(line, file=sys.stderr)
        for name in LINKED:
            if hasattr(self.datamodule, name):
                value = getattr(self.datamodule, name)
                model.init_args[name] = list(value) if isinstance(value, tuple) else value
        if not hasattr(self.datamodule, "num_classes"):
            kind, count = type(self.datamodule).__name__, self.model.num_classes
            print(f"{kind} has no num_classes: the model has {count}, as model.num_classes says", file=sys.stderr)

    def _run_subcommand(self, subcommand: str) -> None:
        with one_fate(self.trainer):
            try:
                super()._run_subcommand(subcommand)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise ValueError(out_of_memory(self.trainer, self.datamodule, self.model)) from error
                if _WORKER_DIED.match(str(error)):
                    raise ValueError(
                        f"{' '.join(str(error).split())} A system kills where memory runs out: set data.num_workers lower, or give "
                        "the run more memory"
                    ) from error
                # EarlyStopping's monitor, which Lightning's other callbacks refuse properly.
                if "conditioned on metric" in str(error):
                    raise ValueError(str(error)) from error
                raise
            except OSError as error:
                if users_error(error) is None and (why := not_written(self.trainer, error)):
                    raise ValueError(why) from error
                raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        from design_lightning.callbacks import (
            BinarySummary,
            ConfusionMatrixReport,
            DamagedImagesReport,
            PredictionWriter,
            PreemptionCheckpoint,
            RandomStates,
            TerminateOnNaN,
            Throughput,
            ThroughputProgressBar,
        )

        chosen = config.get("callbacks") or []
        given = [*([chosen] if isinstance(chosen, Callback) else chosen), *callbacks]
        defaults: list[type[Callback]] = [
            BinarySummary,
            ConfusionMatrixReport,
            DamagedImagesReport,
            PredictionWriter,
            RandomStates,
            Throughput,
        ]
        if self.subcommand == "fit":
            defaults.append(TerminateOnNaN)
        if config.get("enable_progress_bar") is not False:
            defaults.append(ThroughputProgressBar)
        missing = [kind() for kind in defaults if not any(isinstance(callback, kind) for callback in given)]
        if config.get("enable_model_summary") is None:
            config["enable_model_summary"] = False  # BinarySummary says more
        if (
            self.subcommand == "fit"
            and SLURMEnvironment.detect()
            and not any(isinstance(callback, PreemptionCheckpoint) for callback in given)
        ):
            missing.append(PreemptionCheckpoint())
        # PreemptionCheckpoint has to be the first.
        config["callbacks"] = sorted(
            [*given, *missing], key=lambda callback: not isinstance(callback, PreemptionCheckpoint)
        )
        try:
            trainer = super()._instantiate_trainer(config, [])
        except MisconfigurationException as error:
            if not _NO_DEVICE.search(str(error)):
                raise
            kind = config["accelerator"]
            raise ValueError(
                f"trainer.accelerator is {kind!r}, but torch finds no such device here: use cpu, or auto"
            ) from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        watch_(trainer)
        return trainer

    def before_validate(self) -> None:
        """Says so where random weights would be measured."""
        config = self.config[self.subcommand]
        given = config.model.get("init_args") or {}
        if config.model.class_path == EXPORTED_CLASSIFIER:
            return
        if self.trainer.is_global_zero and not (
            config.get("ckpt_path") or given.get("weights") or given.get("pretrained")
        ):
            print("design-train: warning: no --ckpt_path given, so the network has random weights", file=sys.stderr)

    before_test = before_predict = before_validate

    def fit(self, **arguments: Any) -> None:
        """Trains, and says how a run that was stopped goes on. A requeued job goes on from where it was."""
        saved = Path(self.trainer.default_root_dir) / PREEMPTED
        if arguments.get("ckpt_path") == "hpc" and not list(saved.parent.glob("hpc_ckpt_*")):
            raise FileNotFoundError(
                f"ckpt_path 'hpc' is {str(saved)!r}, which does not exist: a run with PreemptionCheckpoint writes it"
            )
        if SLURMEnvironment.detect() and saved.is_file() and arguments.get("ckpt_path"):
            arguments["ckpt_path"] = "hpc"
        try:
            self.trainer.fit(**arguments)
        except (SIGTERMException, SystemExit):
            if SLURMEnvironment.detect():
                # SLURM sends one when another process has ended; this one keeps its code.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if self.trainer.is_global_zero:
                print(_how_to_go_on(self.trainer), file=sys.stderr)
            raise

    def after_fit(self) -> None:
        """Prints what came out, and the next commands."""
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # on every process: it is a collective
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            print(_outcome(self.trainer, folder))


def main(command: str, args: Sequence[str]) -> None:
    """Runs a command of Lightning."""
    run(command, args, DesignCLI, DesignTrainer)


def run(
    command: str, args: Sequence[str], cli: type[DesignCLI], trainer: type[Trainer], saves_config: bool = True
) -> None:
    """Runs a method of a trainer as a command: what `fit` understands of configurations, names and checkpoints holds for it.

    Args:
        command: the method's name.
        args: what follows it on the command line.
        cli: the command line, whose `subcommands` has the command.
        trainer: the class with the method.
        saves_config: whether the configuration is saved in the log folder.
    """
    if not {"-h", "--help"} & set(args):
        import_classes()
    _hush(command)
    check_checkpoint(args)
    check_linked(args)
    given = sys.argv
    # Not as LightningCLI's `args`: DDP starts its other processes with what sys.argv holds.
    sys.argv = [given[0], command, *_model_of_file(command, args), *_with_found_configs(args)]
    for path in files_of(sys.argv[1:]):
        check_keys(path)
    options: dict[str, Any] = (
        {"save_config_kwargs": {"overwrite": True}} if saves_config else {"save_config_callback": None}
    )
    try:
        cli(
            LightningModule,
            LightningDataModule,
            trainer_class=trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            **options,
        )
    except SIGTERMException as stopped:
        # Lightning's own ends with 0, and a script would go on with half a training.
        raise SystemExit(128 + signal.SIGTERM) from stopped
    except MisconfigurationException as error:
        # What was asked of the trainer is not to be had here: Lightning says what is.
        raise ValueError(str(error)) from error
    except USERS_ERRORS as error:
        from design_lightning.commands.errors import place_of

        if (ours := users_error(error)) and (place := place_of(str(ours), sys.argv[1:])):
            ours.add_note(place)
        raise
    finally:
        sys.argv = given


def load_weights(model: LightningModule, checkpoint: dict[str, Any], path: str) -> None:
    """Loads the weights of a checkpoint that was read from a path.

    Raises:
        ValueError: if they do not fit.
    """
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"ckpt_path {path!r} does not fit the model of the configuration: {reason[:200]}") from error


def import_classes() -> None:
    """Imports what configurations name by its bare name. Help does without: timm and torchvision take seconds to import."""
    from design_lightning import callbacks, data, training

    for package in (callbacks, data, training):
        for name in package.__all__:
            getattr(package, name)


def _model_of_file(command: str, args: Sequence[str]) -> list[str]:
    """Names the model where an exported file is the `--ckpt_path`, so that no configuration has to; one that does comes later."""
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        path = value if equals else "".join(args[i + 1 : i + 2])
        if option == "--ckpt_path" and command in MEASURING and is_exported(path):
            return [f"--model={EXPORTED_CLASSIFIER}", f"--model.path={path}"]
    return []


def _hush(command: str) -> None:
    """Leaves out what Lightning says to its own developers or advertises; its other warnings stay."""
    if command != "fit":
        warnings.filterwarnings("ignore", message="The dirpath has changed.*")
    for message in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*overridden `on_before_batch_transfer` in `LightningModule`.*",
        *([".*`srun` command is available.*"] if command != "fit" else []),
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )


def _with_found_configs(args: Sequence[str]) -> list[str]:
    """The arguments, with each configuration's name replaced by its path."""
    found: list[str] = []
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c") and equals:
            found.append(f"{option}={find_config(value)}")
        elif i and args[i - 1] in ("--config", "-c"):
            found.append(find_config(arg))
        else:
            found.append(arg)
    return found


def _resolved(name: str, value: Any) -> Any:
    """A setting as it takes effect: of `binary`, with the policy's values in place of nulls."""
    from design_lightning.surgery import BinaryConfig

    return (
        BinaryConfig.from_dict(dict(vars(value)))
        if name == "binary" and isinstance(value, Namespace)
        else value or None
    )


def _how_to_go_on(trainer: Trainer) -> str:
    checkpoint = trainer.checkpoint_callback
    path = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
    preempted = Path(trainer.default_root_dir) / PREEMPTED
    if preempted.is_file():
        path = str(preempted)
    stopped = f"stopped at step {trainer.global_step}"
    if not path:
        return f"{stopped}, before a checkpoint of this run was saved"
    return f"{stopped}; to go on from the last checkpoint: the same command with --ckpt_path {shlex.quote(path)}"


def _outcome(trainer: Trainer, folder: str) -> str:
    """The last lines of `fit`: the best score, or the last one; the checkpoint, the logs in `folder`, and the next commands."""
    from design_lightning.surgery import binary_layers

    checkpoint = trainer.checkpoint_callback
    path = getattr(checkpoint, "best_model_path", "") or getattr(checkpoint, "last_model_path", "")
    score = getattr(checkpoint, "best_model_score", None)
    monitor = getattr(checkpoint, "monitor", None)
    which = "best"
    if score is None:  # no checkpoint knows a best one
        which, score, monitor = "last", trainer.callback_metrics.get("val/top1"), "val/top1"
    lines = []
    if score is not None:
        shown = f"{float(score):.2%}" if monitor and "top" in monitor else f"{float(score):.4f}"
        lines.append(f"{which} {monitor}: {shown}")
    lines.append(f"checkpoint: {path or 'none was saved'}")
    lines.append(f"logs: {folder}")
    if path:
        given = f"--config {shlex.quote(f'{folder}/config.yaml')} --ckpt_path {shlex.quote(path)}"
        lines.append(f"next: design-train test {given}")
        if binary_layers(trainer.lightning_module):
            lines.append(f"then: design-train export {given}")
    return "\n".join(lines)
