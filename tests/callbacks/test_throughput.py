import time
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from design_lightning.callbacks import ThroughputProgressBar

PAUSE = 0.03
BATCH = 4


class Images(Dataset[tuple[Tensor, int]]):
    """24 images, each of which takes its time to load."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.pause / BATCH)
        return torch.zeros(3, 4, 4), index % 2


class Slow(nn.Module):
    """A network that takes its time."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.layer = nn.Linear(48, 2)

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.pause)
        logits: Tensor = self.layer(images.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("loading", "computing", "least", "most"),
    [(PAUSE, 0.0, 0.5, 1.0), (0.0, PAUSE, 0.0, 0.5)],
    ids=["slow data", "slow network"],
)
def test_share_of_waiting_tells_slow_data_from_a_slow_network(
    loading: float,
    computing: float,
    least: float,
    most: float,
    plain: Callable[[nn.Module], LightningModule],
    trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    bar = ThroughputProgressBar()
    data = DataLoader(Images(loading), batch_size=BATCH)
    trainer(bar, enable_progress_bar=True, max_epochs=2).fit(plain(Slow(computing)), data)
    assert least <= bar.waiting_share <= most
    assert 0 < bar.images_per_second <= BATCH / PAUSE
    shown = capsys.readouterr().out
    assert "img/s" in shown
    assert "wait" in shown


def test_nothing_is_measured_before_the_second_batch(
    plain: Callable[[nn.Module], LightningModule],
    trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = ThroughputProgressBar()
    data = DataLoader(Images(0), batch_size=BATCH)
    trainer(bar, enable_progress_bar=True, limit_train_batches=1).fit(plain(Slow(0)), data)
    assert (bar.images_per_second, bar.waiting_share) == (0, 0)
    assert "img/s" not in capsys.readouterr().out


def test_yaml_finds_it_by_its_bare_name(
    run_with_yaml: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1")
    run_with_yaml("fit", "ThroughputProgressBar", *options)
    assert "img/s" in capsys.readouterr().out


def test_metrics_stay_on_two_lines_of_eighty_columns(
    run_with_yaml: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1")
    run_with_yaml("fit", "ThroughputProgressBar", *options)
    lines = capsys.readouterr().out.splitlines()
    bar = next(i for i, line in enumerate(lines) if line.startswith("Epoch 0/0"))
    shown = " ".join(lines[bar : bar + 2])
    assert max(map(len, lines[bar : bar + 2])) <= 80
    for name in ("img/s: ", "wait: ", "train/loss: ", "val/top1: "):
        assert name in shown
