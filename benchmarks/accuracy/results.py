"""The tables of the study: one CSV a phase, a row a run."""

import csv
import fcntl
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

from study import ROOT, Run

FOLDER = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """What is known of a run.

    Args:
        name: of the run; tells it from all others.
        phase, step, network, setting, arm, rate, seed: the run.
        split: `held-out` or `test`.
        top1: the share of the split that the network classifies rightly after the last step.
        train_loss: the mean of the logged losses of the last tenth of training (each tenth step is logged).
        diverged: whether training ended early because something was not finite; `top1` is that of chance then, and what cannot be
            told is 0.
        epochs, images: trained for, and on (each image as often as it was seen).
        seconds: from the start of the process to its end.
        config: a hash over configuration and options.
        commit: of the code; a + says that it was changed since.
        machine: the processor.
        command: makes the row anew, from the repository's root.
    """

    name: str
    phase: str
    step: str
    network: str
    setting: str
    arm: str
    rate: float
    seed: int
    split: str
    top1: float
    train_loss: float
    diverged: bool
    epochs: int
    images: int
    seconds: float
    config: str
    design_lightning: str
    torch: str
    python: str
    commit: str
    machine: str
    date: str
    command: str


COLUMNS = [column.name for column in fields(Row)]


def table(folder: Path, phase: str) -> Path:
    """The CSV of a phase."""
    return folder / f"accuracy_{phase}.csv"


def read(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a CSV by name; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def add(path: Path, row: Row) -> None:
    """Puts a row into a CSV, in place of an older one of that name. A reader sees the file before or after, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, wait=True):
        rows = read(path)
        rows[row.name] = {key: str(value) for key, value in asdict(row).items()}
        aside = path.with_suffix(".part")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows.values())
        aside.replace(path)


@dataclass(frozen=True)
class Results:
    """The rows of all phases."""

    rows: dict[str, dict[str, str]]

    @classmethod
    def of(cls, folder: Path, phases: Iterable[str]) -> "Results":
        """From the CSVs of a folder."""
        return cls({name: row for phase in phases for name, row in read(table(folder, phase)).items()})

    def has(self, run: Run) -> bool:
        """Whether a run is done, with the configuration that it has now."""
        return self.rows.get(run.name, {}).get("config") == run.config

    def top1(self, run: Run) -> float:
        """What a run that is done reached, from 0 to 1."""
        return float(self.rows[run.name]["top1"])

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that are not done."""
        return [run for run in runs if not self.has(run)]


@contextmanager
def claim(folder: Path, name: str, wait: bool = False) -> Iterator[IO[str] | None]:
    """Keeps other processes of this machine from a run; gives the lock, or None where another process has it.

    The system takes the lock back when the last process that has the file open ends, however it ends. So a run whose runner was
    killed stays claimed as long as its training, which is given the file, goes on.
    """
    with _lock(folder / name, wait) as lock:
        yield lock


@contextmanager
def _lock(what: Path, wait: bool) -> Iterator[IO[str] | None]:
    key = hashlib.sha256(str(what.resolve()).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"accuracy_{key}.lock").open("w") as lock:
        taken = False
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            taken = True
        yield lock if taken else None
