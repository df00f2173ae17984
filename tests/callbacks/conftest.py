from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from design_lightning.cli import main


class Plain(LightningModule):
    """Somebody's LightningModule, which knows nothing of this project."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def plain() -> Callable[[nn.Module], Plain]:
    return Plain


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Lightning's own Trainer, quiet, with what a test adds."""

    def make(*callbacks: Any, **kwargs: Any) -> Trainer:
        defaults: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        return Trainer(callbacks=list(callbacks), **{**defaults, **quiet, "enable_progress_bar": False, **kwargs})

    return make


@pytest.fixture
def run_with_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a few batches of a command with one callback, named in a YAML file as a user would."""

    def run(command: str, callback: str, *options: str, **arguments: Any) -> None:
        monkeypatch.chdir(tmp_path)
        config = {
            "trainer": {
                "accelerator": "cpu",
                "logger": False,
                "enable_checkpointing": False,
                "callbacks": [{"class_path": callback, "init_args": arguments}],
            },
            "model": {
                "class_path": "DesignClassifier",
                "init_args": {"backbone": "resnet20_cifar", "backbone_args": {"width": 0.25}},
            },
            "data": {"class_path": "FashionMNISTSubset", "init_args": {"batch_size": 8}},
        }
        Path("with_callback.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        main([command, "--config", "with_callback.yaml", *options])

    return run
