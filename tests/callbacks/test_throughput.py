import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from design_lightning.callbacks import Throughput, ThroughputProgressBar

BATCH = 4


class Clock:
    """A clock that goes on by itself between two batches and within them, so that shares are known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("design_lightning.callbacks.throughput.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Images(Dataset[tuple[Tensor, int]]):
    """24 images, each of which takes its time to load."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.clock.now += self.seconds
        return torch.zeros(3, 4, 4), index % 2


class Network(nn.Module):
    """A network that takes its time."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.layer = nn.Linear(48, 2)

    def forward(self, images: Tensor) -> Tensor:
        self.clock.now += self.seconds
        logits: Tensor = self.layer(images.flatten(1))
        return logits


Make = Callable[..., Any]


@pytest.mark.parametrize("bar", [False, True])
def test_each_epoch_logs_its_share_of_waiting_and_its_speed(
    bar: bool, clock: Clock, plain: Make, trainer: Make, tmp_path: Path
) -> None:
    data = DataLoader(Images(clock, 0.25), batch_size=BATCH)
    callbacks = [Throughput(), ThroughputProgressBar()] if bar else [Throughput()]
    run = trainer(*callbacks, enable_progress_bar=bar, max_epochs=2, logger=CSVLogger(tmp_path))
    run.fit(plain(Network(clock, 3.0)), data)
    with (Path(run.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/waiting"]]
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    for row in rows:
        assert float(row["train/waiting"]) == pytest.approx(0.25)  # 1 s of loading, 3 s of computing a batch
        assert float(row["train/images_per_second"]) == pytest.approx(1.0)


def test_validation_within_an_epoch_is_no_waiting(clock: Clock, plain: Make, trainer: Make) -> None:
    class Validated(type(plain(nn.Flatten()))):  # type: ignore[misc]  # a class of the fixture
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 100

    data = DataLoader(Images(clock, 0.25), batch_size=BATCH)
    run = trainer(Throughput(), val_check_interval=2)
    run.fit(Validated(Network(clock, 1.0)), data, DataLoader(Images(clock, 0.0), batch_size=BATCH))
    assert run.callback_metrics["train/waiting"] == pytest.approx(0.5)


def test_an_epoch_of_one_batch_logs_nothing(clock: Clock, plain: Make, trainer: Make, capsys: Any) -> None:
    measured = Throughput()
    data = DataLoader(Images(clock, 1.0), batch_size=BATCH)
    run = trainer(measured, ThroughputProgressBar(), enable_progress_bar=True, limit_train_batches=1)
    run.fit(plain(Network(clock, 1.0)), data)
    assert (measured.images_per_second, measured.waiting) == (0, 0)
    assert "train/waiting" not in run.callback_metrics
    assert "img/s" not in capsys.readouterr().out


@pytest.mark.own_process
@pytest.mark.slow
def test_two_processes_log_the_sum_of_their_speeds(tmp_path: Path, plain: Make, trainer: Make) -> None:
    class Fixed(Throughput):
        """Of each process, other figures."""

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self._images, self._computing = 10 * (1 + trainer.global_rank), 1.0
            self._waiting = (0.0, 1.0)[trainer.global_rank]
            super().on_train_epoch_end(trainer, pl_module)

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found = [float(trainer.callback_metrics[f"train/{name}"]) for name in ("images_per_second", "waiting")]
            (tmp_path / f"{trainer.global_rank}").write_text(str(found))

    data = DataLoader([(torch.zeros(48), 0)] * 8, batch_size=2)
    trainer(Fixed(), devices=2, strategy="ddp_fork").fit(plain(nn.Linear(48, 2)), data)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [str([20.0, 0.25])] * 2  # 10 / 1 s + 20 / 2 s


def test_a_run_without_a_bar_is_measured_too(run_with_yaml: Make, tmp_path: Path) -> None:
    options = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    options += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "CSVLogger"]
    options += ["--trainer.logger.save_dir", str(tmp_path)]
    run_with_yaml("fit", "Throughput", *options)
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "train/waiting" in metrics.read_text().splitlines()[0]
