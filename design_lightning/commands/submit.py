"""`design-train submit`: a training as a job of a SLURM cluster, whose script and configuration stand in a folder of its own.

sbatch is called as a user would call it, and not through submitit, which pickles a Python function and requeues that: here the
job is a command with a configuration, to be read, edited and submitted again by hand.
"""

import dataclasses
import datetime
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from design_lightning.commands.checks import check_trainer
from design_lightning.commands.lightning import DesignCLI, run
from design_lightning.commands.slurm import Request, answers, check_cluster, script
from design_lightning.commands.slurm import run as run_slurm
from design_lightning.training.trainer import DesignTrainer

OWN = ("folder", "dry_run")
"""The options of this command that are no part of a request."""


class SubmitTrainer(DesignTrainer):
    """The Trainer of this command, which trains nothing."""

    def submit(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        nodes: int = 1,
        gpus: int = 1,
        tasks: int | None = None,
        cpus: int = 8,
        time: str = "24:00:00",
        partition: str | None = None,
        name: str = "design-train",
        extra: dict[str, str] | None = None,
        folder: str | None = None,
        dry_run: bool = False,
    ) -> None:
        """Writes a job's script and configuration, and submits it; nothing is submitted that `fit` or the cluster would refuse.

        Args:
            model: as of `fit`.
            datamodule: as of `fit`.
            ckpt_path: a checkpoint to start from; a requeued job goes on from its own.
            weights_only: as of `fit`.
            nodes: how many machines.
            gpus: GPUs of each node, with one process each; 0 trains on CPUs.
            tasks: processes on each node, where there are no GPUs.
            cpus: CPU cores of each process.
            time: until the job's end, as SLURM writes it; a requeued job gets it anew.
            partition: the cluster's default if not given.
            name: of the job.
            extra: other options of sbatch, such as `--extra.account vision --extra.mem 200G`.
            folder: of the job alone; if not given, a new one below default_root_dir, called by date and time.
            dry_run: print the script, and write and submit nothing.

        Raises:
            ValueError: if the configuration, the request or the cluster does not allow it.
            FileNotFoundError: if there is no SLURM here.
        """


class SubmitCLI(DesignCLI):
    """The command line of this command: configurations and errors as those of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one command."""
        return {"submit": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        """Looks at the request first: the network may take a while to build."""
        config = self.config["submit"]
        values = {each.name: config[each.name] for each in dataclasses.fields(Request)}
        self.request = Request(**{**values, "extra": dict(values["extra"] or {})})
        check_trainer(config.trainer)
        if not config.dry_run or answers():
            check_cluster(self.request)
        else:
            print("no SLURM answers here, so the request is not compared with a cluster", file=sys.stderr)
        super().before_instantiate_classes()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """A trainer of one process, which finds what is wrong with its arguments where there may be no GPU."""
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False}
        return super()._instantiate_trainer({**config, **here, "logger": False}, callbacks)

    def submit(self, **_: Any) -> None:
        """Writes and submits."""
        config = self.config["submit"]
        folder = self._folder(config).absolute()
        if folder.exists():
            raise ValueError(
                f"folder {str(folder)!r} exists; a job that it is of goes on with: sbatch {folder}/train.sbatch"
            )
        arguments = ["--config", str(folder / "config.yaml")]
        text = script(self.request, folder, arguments)
        if config.dry_run:
            print(text, end="")
            return
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(self._frozen(config, folder), encoding="utf-8")
        (folder / "train.sbatch").write_text(text, encoding="utf-8")
        try:
            job = run_slurm("sbatch", "--parsable", str(folder / "train.sbatch")).strip().partition(";")[0]
        except (OSError, ValueError):
            shutil.rmtree(folder)  # made a moment ago, by us
            raise
        print(f"job: {job}\nlog: {folder / f'slurm-{job}.log'}\nfolder: {folder}")

    @staticmethod
    def _folder(config: Namespace) -> Path:
        if config.folder:
            return Path(config.folder)
        now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        return Path(config.trainer.default_root_dir or "runs") / f"{config.name}_{now}"

    def _frozen(self, config: Namespace, folder: Path) -> str:
        """What `fit` is to do, as it is now: what is edited later changes no job that waits."""
        frozen = config.clone()
        for name in (*OWN, *(each.name for each in dataclasses.fields(Request))):
            del frozen[name]
        frozen.pop("config", None)
        trainer = frozen.trainer
        trainer.default_root_dir = str(folder)
        trainer.num_nodes, trainer.devices = self.request.nodes, self.request.processes
        trainer.accelerator = "gpu" if self.request.gpus else "cpu"
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        for logger in loggers:
            if isinstance(logger, Namespace) and "save_dir" in logger.get("init_args", {}):
                logger.init_args.save_dir = str(folder)
        return str(self._parser("submit").dump(frozen, skip_none=False, skip_validation=True))


def main(command: str, args: Sequence[str]) -> None:
    """Runs the command."""
    run(command, _with_flag(args), SubmitCLI, SubmitTrainer, saves_config=False)


def _with_flag(args: Sequence[str]) -> list[str]:
    """The arguments as jsonargparse takes them: `--dry-run` as `--dry_run=true`."""
    return ["--dry_run=true" if arg in ("--dry-run", "--dry_run") else arg for arg in args]
