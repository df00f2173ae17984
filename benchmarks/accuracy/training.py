"""One run: the subprocess of `design-train`, and its figures as a row."""

import csv
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import yaml
from results import Row
from study import ROOT, Run

LOGS = Path("runs/accuracy")
NOT_FINITE = "the training loss is "
"""What the error of a training that diverged says."""
DIVERGED = {"top1": 0.1, "train_loss": float("nan"), "epochs": 0, "images": 0}
CODE = ("design_lightning", "callbacks", "benchmarks/accuracy")


class FailedError(Exception):
    """A command ended with an error."""


def train(run: Run, phase: str, data: str, claim: IO[str] | None = None) -> Row:
    """Trains, and reads what came out.

    Args:
        run: what to train.
        phase: for the row.
        data: the folder of CIFAR-10, as the command names it.
        claim: an open file that the process shall keep open.

    Raises:
        FailedError: if the training ended with an error other than divergence.
    """
    command = run.command(data)
    logs = ROOT / LOGS / run.name
    shutil.rmtree(logs, ignore_errors=True)  # so that no figure of an earlier try is read
    start = time.perf_counter()
    diverged = False
    try:
        call(command, logs / "output.txt", claim)
    except FailedError as error:
        if NOT_FINITE not in str(error):
            raise
        diverged = True
    seconds = time.perf_counter() - start
    epochs = run.budget.of(run.network)["trainer.max_epochs"]
    figures = dict(DIVERGED) if diverged else read_metrics(logs, epochs)
    return Row(
        name=run.name,
        phase=phase,
        step=run.step,
        network=run.network.name,
        setting=run.setting.name,
        arm=run.arm.name,
        rate=run.rate,
        seed=run.seed,
        split=run.budget.split,
        diverged=diverged,
        seconds=round(seconds, 1),
        config=run.config,
        design_lightning=version("design-lightning"),
        torch=version("torch"),
        python=platform.python_version(),
        commit=commit(),
        machine=machine(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=shown(command),
        **figures,
    )


def call(command: list[str], output: Path, claim: IO[str] | None = None) -> None:
    """Runs `design-train ...` on one core, from the repository's root, its output into a file.

    Raises:
        FailedError: with the last line of the output, if it ends with an error.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with output.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", "design_lightning", *command[1:]],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[claim.fileno()] if claim else [],
        )
    if done.returncode:
        lines = output.read_text(encoding="utf-8").strip().splitlines()
        raise FailedError(f"exit code {done.returncode}: {lines[-1] if lines else 'no output'} (see {output})")


def shown(command: list[str]) -> str:
    """A command as one types it."""
    return f"OMP_NUM_THREADS=1 {shlex.join(command)}"


def read_metrics(logs: Path, epochs: int) -> dict[str, Any]:
    """`top1`, `train_loss`, `epochs` and `images` from what Lightning logged.

    Raises:
        FailedError: if the last epoch was not measured.
    """
    with (logs / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    data = yaml.safe_load((logs / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    steps = max(int(row["step"]) for row in rows) + 1
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    measured = [row for row in rows if row.get("val/top1")]
    if len(measured) != 1 or int(measured[0]["epoch"]) != epochs - 1:
        raise FailedError(f"{logs / 'metrics.csv'}: measured {len(measured)} times, not once after epoch {epochs - 1}")
    return {
        "top1": round(float(measured[0]["val/top1"]), 6),
        "train_loss": round(fmean(losses[-max(len(losses) // 10, 1) :]), 4),
        "epochs": epochs,
        "images": steps * data["batch_size"],
    }


def commit() -> str:
    """The code's commit, with a + if it was changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def machine() -> str:
    """The processor by its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
