import csv
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from design_lightning.callbacks import PredictionWriter
from design_lightning.data import FashionMNISTSubset
from design_lightning.training import DesignClassifier

SCRIPT = '''
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from design_lightning.callbacks import ConfusionMatrixReport, PredictionWriter


class Images(Dataset):
    """Nine images: an odd number, so that one process has a batch more than the other."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.full((3,), float(index)), f"folder/{index}.jpg"


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 4)

    def predict_step(self, batch, batch_idx):
        images, paths = batch
        return {"paths": paths, "probabilities": self.layer(images).softmax(-1)}

    def test_step(self, batch, batch_idx):
        pass

    def on_test_epoch_end(self):
        self.test_confusion = torch.eye(4, dtype=torch.long)


if __name__ == "__main__":
    processes, folder = int(sys.argv[1]), sys.argv[2]
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[PredictionWriter(), ConfusionMatrixReport()],
    )
    data = DataLoader(Images(), batch_size=4)
    trainer.test(Plain(), data, verbose=False)
    trainer.predict(Plain(), data, return_predictions=False)
    trainer.test(Plain(), data, verbose=False)
'''


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_models_own_answers_in_the_order_of_the_data(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data = FashionMNISTSubset(batch_size=32)
    model = DesignClassifier(
        "resnet20_cifar", 10, backbone_args={"width": 0.25}, input_size=data.input_size, class_names=data.class_names
    )
    trainer(PredictionWriter()).predict(model, data)
    found = read(tmp_path / "predictions.csv")
    data.trainer = None
    batches = list(data.predict_dataloader())
    model.eval()
    with torch.no_grad():
        probabilities, labels = torch.cat([model(data.normalize(images)).softmax(-1) for images, _ in batches]).max(-1)
    assert [row["path"] for row in found] == [name for _, names in batches for name in names]
    assert len(found) == 1000
    assert [row["label"] for row in found] == [data.class_names[label] for label in labels]
    shown = torch.tensor([float(row["probability"]) for row in found])
    torch.testing.assert_close(shown, probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_predict_replaces_the_first(times: int, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    model = DesignClassifier("resnet20_cifar", 10, backbone_args={"width": 0.25}, input_size=(1, 32, 32))
    runner = trainer(PredictionWriter(str(tmp_path / "out" / "mine.csv")), limit_predict_batches=2)
    for _ in range(times):
        runner.predict(model, FashionMNISTSubset(batch_size=5))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.csv"]
    assert [row["path"] for row in read(tmp_path / "out" / "mine.csv")] == [f"test/{i:06d}" for i in range(10)]


def test_labels_are_numbers_where_there_are_no_class_names(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    model = DesignClassifier("resnet20_cifar", 10, backbone_args={"width": 0.25}, input_size=(1, 32, 32))
    trainer(PredictionWriter(), limit_predict_batches=1).predict(model, FashionMNISTSubset(batch_size=5))
    assert {row["label"] for row in read(tmp_path / "predictions.csv")} <= {str(i) for i in range(10)}


def test_other_predictions_are_left_alone_with_a_warning(
    plain: Callable[[nn.Module], Any], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module = plain(nn.Flatten())
    module.predict_step = lambda batch, batch_idx: batch[0].mean((1, 2, 3))
    with pytest.warns(UserWarning, match=r"no predictions\.csv is written: predict_step of Plain"):
        trainer(PredictionWriter(), limit_predict_batches=2).predict(module, FashionMNISTSubset(batch_size=5))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), "1", str(tmp_path / "1")])
    runpy.run_path(str(script), run_name="__main__")
    command = [sys.executable, str(script), "2", str(tmp_path / "2")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (read(tmp_path / str(n) / "predictions.csv") for n in (1, 2))
    assert [row["path"] for row in one] == [f"folder/{i}.jpg" for i in range(9)]
    assert two == one
    files = {path.name for path in (tmp_path / "2").iterdir()}
    assert files == {"predictions.csv", "confusion.csv", "confusion.png", "per_class.csv"}


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None], tmp_path: Path) -> None:
    run_with_yaml("predict", "PredictionWriter", "--trainer.limit_predict_batches", "2", path="mine.csv")
    assert len(read(tmp_path / "mine.csv")) == 16
