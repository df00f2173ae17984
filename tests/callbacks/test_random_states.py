"""`RandomStates`: a resumed run draws what an undisturbed one draws, from every generator."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.callbacks import RandomStates


class Draws(LightningModule):
    """Draws from each generator in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.drawn: list[tuple[float, ...]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.drawn.append(
            (torch.rand(()).item(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1))
        )
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(
    tmp_path: Path, epochs: int, seed: int, *callbacks: Callback, ckpt: Path | None = None
) -> tuple[Draws, Trainer]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    module = Draws()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **quiet
    )
    loader = DataLoader(TensorDataset(torch.randn(6, 2)), 2, generator=torch.Generator())
    trainer.fit(module, loader, ckpt_path=ckpt)
    return module, trainer


def test_every_generator_goes_on(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, 4, 0, RandomStates())
    _, trainer = fit(tmp_path, 2, 0, RandomStates())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(tmp_path, 4, 7, RandomStates(), ckpt=tmp_path / "two.ckpt")
    assert resumed.drawn == whole.drawn[6:]
    without, _ = fit(tmp_path, 4, 7, ckpt=tmp_path / "two.ckpt")
    assert without.drawn != whole.drawn[6:]


def test_the_state_is_plain(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, 1, 0, RandomStates())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["RandomStates"]
    assert len(stored["processes"]) == 1


def test_another_number_of_processes_is_said(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, 1, 0, RandomStates())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    stored: dict[str, Any] = torch.load(tmp_path / "one.ckpt", weights_only=True)
    state = stored["callbacks"]["RandomStates"]
    state["processes"] *= 2
    torch.save(stored, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="generators of 2 processes, this run has 1"):
        fit(tmp_path, 2, 0, RandomStates(), ckpt=tmp_path / "two.ckpt")
