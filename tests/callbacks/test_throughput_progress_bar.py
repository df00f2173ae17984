from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from design_lightning.callbacks import Throughput, ThroughputProgressBar


def test_it_shows_what_throughput_measures(
    plain: Callable[..., Any],
    trainer: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Measured(Throughput):
        images_per_second = 321.4
        waiting = 0.25

    monkeypatch.setenv("COLUMNS", "120")
    data = DataLoader([(torch.zeros(48), 0)] * 8, batch_size=2)
    run = trainer(ThroughputProgressBar(), Measured(), enable_progress_bar=True)
    run.fit(plain(nn.Linear(48, 2)), data)
    shown = capsys.readouterr().out
    assert "img/s: 321" in shown
    assert "wait: 25%" in shown


def test_without_a_throughput_it_says_what_to_add(plain: Callable[..., Any], trainer: Callable[..., Any]) -> None:
    run = trainer(ThroughputProgressBar(), enable_progress_bar=True)
    with pytest.raises(ValueError, match=r"the Trainer has none: add Throughput\(\)"):
        run.fit(plain(nn.Linear(48, 2)), DataLoader([(torch.zeros(48), 0)] * 8, batch_size=2))


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
