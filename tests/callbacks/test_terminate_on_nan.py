"""A loss that is NaN ends the run at once, with its cause named, and the last good checkpoint is kept."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.callbacks import PreemptionCheckpoint, TerminateOnNaN
from design_lightning.cli import main
from design_lightning.data import FashionMNISTSubset, ImageFolder
from design_lightning.training import DesignClassifier

Make = Callable[..., Trainer]


class Brightest(nn.Module):
    """Divides each image by its largest pixel: 0 / 0 where it is black."""

    def forward(self, images: Tensor) -> Tensor:
        return images / images.amax((1, 2, 3), keepdim=True)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def loader(count: int = 24, bad: dict[int, float] | None = None) -> DataLoader:
    """Batches of 4; image i of `bad` has the value in a pixel."""
    images = torch.randn(count, 1, 2, 2)
    for index, value in (bad or {}).items():
        images[index, 0, 0, 0] = value
    return DataLoader(TensorDataset(images, torch.arange(count) % 3), batch_size=4)


def good(path: Path) -> int:
    """The step of a checkpoint of finite weights."""
    stored = torch.load(path, weights_only=True)
    tensors = [value for value in stored["state_dict"].values() if isinstance(value, Tensor)]
    assert all(value.isfinite().all() for value in tensors)
    return stored["global_step"]


def test_the_first_layer_and_the_images_are_named_and_weights_and_checkpoints_stay(
    plain: Callable[..., LightningModule], trainer: Make, tmp_path: Path
) -> None:
    # 3e38 is finite, its products are not: the loss of the third batch, in the first layer, for the last of its images.
    module = plain(network())
    torch.nn.init.constant_(module.network[1].weight, 2.0)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1, save_on_exception=True)
    run = trainer(TerminateOnNaN(), checkpoint, enable_checkpointing=True)
    with pytest.raises(ValueError, match="the training loss is nan") as raised:
        run.fit(module, loader(bad={11: 3e38}))
    message = str(raised.value)
    assert "in epoch 0, step 2, batch 2: " in message
    assert "is that of network.1 (Linear), for 1 of 4 images: numbers 3 of the batch. " in message
    assert f"The last good checkpoint is {tmp_path / 'last.ckpt'}. " in message
    assert "lower learning rate" in message
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert good(tmp_path / "last.ckpt") == 2
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert "log" not in vars(module)


def test_weights_that_are_not_finite_are_named_before_layers(
    plain: Callable[..., LightningModule], trainer: Make
) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.network[4].bias.data[1] = torch.inf

    match = (
        r"batch 3: the weights of network\.4\.bias are not finite since the step before\. No checkpoint had been saved"
    )
    with pytest.raises(ValueError, match=match):
        trainer(TerminateOnNaN(), Break()).fit(plain(network()), loader())


def test_a_loss_that_is_nan_behind_finite_layers_is_told_as_such(trainer: Make) -> None:
    class Loss(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.log("train/loss", 1.0, on_epoch=True)
            return self.network(batch[0]).square().mean() * (torch.nan if batch_idx == 1 else 1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        ValueError, match="batch 1: the weights and the outputs of all layers are finite, so look at the"
    ):
        trainer(TerminateOnNaN()).fit(Loss(), loader())


def test_each_batch_of_an_accumulation_is_looked_at(plain: Callable[..., LightningModule], trainer: Make) -> None:
    module = plain(network())
    with pytest.raises(ValueError, match=r"epoch 0, step 1, batch 4: .* numbers 1 of the batch"):
        trainer(TerminateOnNaN(), accumulate_grad_batches=3).fit(module, loader(bad={17: torch.nan}))
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_weights_that_a_finite_loss_made_nan_are_not_saved(trainer: Make, tmp_path: Path) -> None:
    class Root(LightningModule):
        """The root of 0 is finite, its derivative is not."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.weight * (batch_idx < 2)).square().sum().sqrt()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer(PreemptionCheckpoint(every_n_steps=1), TerminateOnNaN())
    with pytest.raises(
        ValueError, match=r"step 3 is not written, .* not finite: weight\. The last good .*hpc_ckpt_1\.ckpt"
    ):
        run.fit(Root(), loader())
    assert good(tmp_path / "hpc_ckpt_1.ckpt") == 2


class Divides(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.brightest = Brightest()
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.classifier(self.brightest(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def black_image(folder: Path) -> Path:
    """Two classes of eight images of noise, one of them black; returns its path."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(1, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    path = folder / "train" / "dog" / "3.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def images(folder: str | Path) -> ImageFolder:
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "padding": 0, "color_jitter": 0.0}
    return ImageFolder(str(folder), batch_size=2, num_workers=0, image_size=8, **plain)


def test_the_file_is_named(trainer: Make, tmp_path: Path) -> None:
    path = black_image(tmp_path / "images")
    with pytest.raises(
        ValueError, match=rf"that of brightest \(Brightest\), for 1 of 2 images: {re.escape(str(path))}\."
    ):
        trainer(TerminateOnNaN(), limit_val_batches=0).fit(Divides(), images(tmp_path / "images"))


TWO_PROCESSES = """
import os, sys
sys.path.insert(0, sys.argv[1])
from lightning.pytorch import Trainer
from test_terminate_on_nan import Divides, images
from design_lightning.callbacks import TerminateOnNaN

if __name__ == "__main__":
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 1, "limit_val_batches": 0}
    trainer, model = Trainer(callbacks=[TerminateOnNaN()], **options, **off), Divides()
    try:
        trainer.fit(model, images(sys.argv[2]))
    except ValueError as error:
        finite = all(bool(each.isfinite().all()) for each in model.parameters())
        # In one piece: two processes share the pipe.
        os.write(1, f"{trainer.global_rank} of 2, {finite}: {error}\\n".encode())
"""


@pytest.mark.slow
def test_two_processes_end_together_with_the_cause_of_the_one(tmp_path: Path) -> None:
    path = black_image(tmp_path / "images")
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "run.py", str(Path(__file__).parent), "images"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    lines = sorted(line for line in result.stdout.splitlines() if " of 2, " in line)
    assert len(lines) == 2, result.stderr
    causes = {line.partition(": ")[2] for line in lines}
    assert len(causes) == 1
    assert re.search(rf"batch \d, process [01]: .*brightest \(Brightest\), .*{path.name}", causes.pop())
    assert all(f"{rank} of 2, True: " in line for rank, line in enumerate(lines))


class Overflow(Callback):
    """Has a batch norm multiply by what float32 can just hold."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            pl_module.backbone.layer3[2].bn2.weight.data.fill_(3e38)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_layer_of_a_binary_network_is_named(compiled: bool, trainer: Make) -> None:
    model = DesignClassifier("resnet20_cifar", 10, input_size=(1, 32, 32), backbone_args={"width": 0.25})
    if compiled:
        model.backbone.compile(backend="eager")  # a graph, as with every backend, without the minutes that code takes
    data = FashionMNISTSubset(batch_size=8, num_workers=0)
    match = r"step 2, batch 2: .* that of backbone\.layer3\.2\.bn2 \(BatchNorm2d\), for"
    with pytest.raises(ValueError, match=match):
        trainer(TerminateOnNaN(), Overflow()).fit(model, data)


def test_fit_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    init = {"backbone": "resnet20_cifar", "backbone_args": {"width": 0.25}}
    init["optimizer"] = {"class_path": "SGD", "init_args": {"lr": 1e30}}
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}}
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": False, "callbacks": [checkpoint]},
        "model": {"class_path": "DesignClassifier", "init_args": init},
        "data": {"class_path": "FashionMNISTSubset", "init_args": {"batch_size": 8, "num_workers": 0}},
    }
    Path("diverges.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "diverges.yaml", "--trainer.enable_progress_bar", "false"])
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    pattern = (
        r"error: the checkpoint of epoch 0, step 2 is not .*bn1\.running_var.*The last good checkpoint is (\S+)\. Try"
    )
    found = re.search(pattern, line)
    assert found, line
    assert good(Path(found.group(1))) == 1


def test_weights_that_are_nan_behind_a_sign_are_found_though_the_loss_is_finite(
    plain: Callable[..., LightningModule], trainer: Make
) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                pl_module.network[1].weight.data[0, 0] = torch.nan

    layers = [nn.Flatten(), nn.Linear(4, 5), dl.BinaryLinear(5, 5, activation=dl.Sign(layout="NHWC")), nn.Linear(5, 3)]
    module = plain(nn.Sequential(*layers))
    match = r"training loss is [0-9.]+ in epoch 0, step 2, batch 2: the weights of network\.1\.weight are not finite"
    with pytest.raises(ValueError, match=match):
        trainer(TerminateOnNaN(), Break()).fit(module, loader())
