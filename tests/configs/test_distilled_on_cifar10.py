"""Two stages with distillation on real images, by the packaged YAML alone: first the teacher, then the student."""

import csv
import zipfile
from pathlib import Path

import pytest
import torch

from design_lightning.cli import main
from design_lightning.training import DesignClassifier

ROOT = Path(__file__).parents[2]
FOLDER, ARCHIVE = ROOT / "data/cifar10", ROOT.parent / "shared/data/cifar10-imagefolder.zip"
TRIAL = ["--config", "overlays/trial", "--model.backbone_args.width", "0.5", "--trainer.log_every_n_steps", "5"]


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """A tenth of CIFAR-10: 500 training and 100 validation images a class."""
    if (FOLDER / "train").is_dir():
        for file in sorted(FOLDER.glob("*/*/*.jpg"))[::10]:
            link = tmp_path / "cifar10" / file.relative_to(FOLDER)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    elif ARCHIVE.is_file():
        with zipfile.ZipFile(ARCHIVE) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            archive.extractall(tmp_path, names[::10])
    else:
        pytest.skip("there is no CIFAR-10 as class folders: unpack it into data/cifar10")
    return tmp_path / "cifar10"


def column(metrics: Path, name: str) -> list[float]:
    with metrics.open(newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.slow
def test_two_stages_with_distillation_from_yaml_alone(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = ["--data.root", str(cifar10), "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", "float_resnet20_cifar10", *TRIAL, *rest])
    main(["fit", "--config", "distilled_resnet20_cifar10", *TRIAL, *rest, "--data.batch_size", "128"])

    steps = 5_000 // 128
    assert f"stage 1 of 2: activations, from step 0 to {2 * steps}, learning rate 0.0025" in caplog.text
    assert f"stage 2 of 2: both, from step {2 * steps} to {4 * steps}, learning rate 0.0025" in caplog.text
    log = tmp_path / "runs/distilled_resnet20_cifar10/version_0"
    stages, rates = column(log / "metrics.csv", "stage"), column(log / "metrics.csv", "lr-Adam/latent")
    assert len(stages) == len(rates) == 4 * steps // 5
    half = stages.index(2.0)
    assert set(stages[:half]) == {1.0}
    assert set(stages[half:]) == {2.0}
    assert rates[half - 1] < 0.1 * rates[half]
    loss = column(log / "metrics.csv", "train/distillation")
    assert loss == column(log / "metrics.csv", "train/loss")
    assert sum(loss[half - 5 : half]) < sum(loss[:5])
    assert sum(loss[-5:]) < sum(loss[half : half + 5])
    assert column(log / "metrics.csv", "val/top1")[-1] > 0.2, "chance is 0.1"

    best = {path.name for path in (log / "checkpoints").iterdir()}
    assert best == {"best_of_stage_1.ckpt", "best_of_stage_2.ckpt", "last.ckpt"}
    network = DesignClassifier.load_from_checkpoint(log / "checkpoints/best_of_stage_2.ckpt").backbone
    weight = network.layer1[0].conv1.weight_binarizer(network.layer1[0].conv1.weight)
    assert all(len(filter_.abs().unique()) == 1 for filter_ in weight.detach().flatten(1).to(torch.float64))
