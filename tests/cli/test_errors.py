"""What goes wrong by the user's hand ends in one clear line, with the nearest right name and a non-zero code."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from design_lightning.cli import DEBUG, main

BAD_FILES = {
    "option.yaml": (
        "model:\n  class_path: DesignClassifier\n  init_args:\n    binary:\n      kernal: 2x2_v1\ndata: FashionMNISTSubset\n"
    ),
    "callback.yaml": "model: DesignClassifier\ndata: FashionMNISTSubset\ntrainer:\n  callbacks:\n    - class_path: EarlyStoping\n",
    "stages.yaml": (
        "model: DesignClassifier\ndata: FashionMNISTSubset\ntrainer:\n  callbacks:\n    - class_path: TwoStageTraining\n"
        "      init_args:\n        stages: [{stage: activations, until: soon}, {stage: both}]\n"
    ),
    "trainer.yaml": "trainer:\n  max_epocs: 3\n",
    "broken.yaml": "trainer: [\n",
}
QUICK = ["fit", "--config", "quickstart", "--trainer.accelerator", "cpu"]


@pytest.fixture(autouse=True)
def _in_a_folder_with_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in BAD_FILES.items():
        Path(name).write_text(text)
    for folder in (
        "half/train/cat",
        "half/train/dog",
        "half/val/cat",
        "half/val/dog",
        "lone/train/cat",
        "lone/val/cat",
    ):
        (tmp_path / folder).mkdir(parents=True)
        if folder != "half/train/dog":
            Image.new("RGB", (32, 32)).save(tmp_path / folder / "0.jpg")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["fti"], 2, "unknown command 'fti': did you mean 'fit'?"),
        (
            ["fit", "--config", "quikstart"],
            1,
            "no configuration 'quikstart', neither a file nor a packaged recipe: did you mean 'quickstart'?",
        ),
        (["fit", "quickstart"], 2, "unexpected 'quickstart': did you mean --config quickstart?"),
        (["fit"], 2, "no data, model given: start from a recipe with --config NAME"),
        ([*QUICK, "--model.backbone", "resnet81"], 1, "unknown backbone 'resnet81': did you mean 'resnet18'"),
        (
            [*QUICK, "--model.binary.kernal", "2x2_v2"],
            2,
            "unknown option 'model.binary.kernal': did you mean 'kernel'?",
        ),
        ([*QUICK, "--model.binary.kernel", "2x2_v9"], 1, "unknown kernel '2x2_v9': did you mean '2x2_v2'"),
        ([*QUICK, "--model.binary.weight", "xnr"], 1, "unknown weight binarizer 'xnr': did you mean 'xnor'?"),
        ([*QUICK, "--model.binary.estimator", "stee"], 1, "unknown estimator 'stee': did you mean 'ste'"),
        (
            [*QUICK, "--model.binary.padding_value", "2"],
            2,
            "model.binary.padding_value: '2' is none of 0, 1, -1, 'replicate'",
        ),
        ([*QUICK, "--data", "CIFR10"], 2, "data: unknown class 'CIFR10': did you mean 'CIFAR10'"),
        ([*QUICK, "--data.root", "x"], 2, "'data.root' is no argument of the class chosen there"),
        ([*QUICK, "--trainer.max_epochs", "two"], 2, "trainer.max_epochs: expected int, not 'two'"),
        ([*QUICK, "--model.optimizer", "SDG"], 2, "model.optimizer: unknown class 'SDG': did you mean 'SGD'?"),
        ([*QUICK, "--model.optimizer.lr", "high"], 2, "model.optimizer.lr: expected float, not 'high'"),
        (
            [*QUICK, "--model.scheduler", "ReduceLROnPlateau"],
            2,
            "several classes are called 'ReduceLROnPlateau': write torch.optim.lr_scheduler.ReduceLROnPlateau or lightning",
        ),
        ([*QUICK, "--model.scheduler", "StepLR"], 2, "step_size is missing: a class that you chose needs it"),
        (
            ["fit", "--config", "stages.yaml"],
            2,
            "until: 'soon' is none of 'plateau', nor int or float (stages.yaml, line 7)",
        ),
        (
            [*QUICK, "--trainer.callbacks+=EarlyStoping"],
            2,
            "trainer.callbacks: unknown class 'EarlyStoping': did you mean 'EarlyStopping'?",
        ),
        ([*QUICK, "--trianer.max_epochs", "2"], 2, "unknown option 'trianer.max_epochs': did you mean 'trainer'?"),
        ([*QUICK, "--trainer.max_epoch", "2"], 2, "unknown option 'trainer.max_epoch': did you mean 'max_epochs'"),
        ([*QUICK, "--model.num_classes", "7"], 1, "model.num_classes comes from the data"),
        (
            ["fit", "--config", "option.yaml"],
            2,
            "unknown option 'kernal': did you mean 'kernel'? (option.yaml, line 5)",
        ),
        (
            ["fit", "--config", "callback.yaml"],
            2,
            "unknown class 'EarlyStoping': did you mean 'EarlyStopping'? (callback.yaml, line 5)",
        ),
        (["fit", "--config", "trainer.yaml"], 2, "unknown option 'trainer.max_epocs': did you mean 'max_epochs'"),
        (["fit", "--config", "broken.yaml"], 2, "broken.yaml"),
        (["fit", "--config", "resnet20_cifar10", "--data.root", "nowhere"], 1, "no CIFAR10 in 'nowhere'"),
        (["fit", "--config", "resnet18_imagenet", "--data.root", "nowhere"], 1, "nowhere"),
        (["fit", "--config", "resnet18_imagenet", "--data.root", "half"], 1, "dog"),
        (["fit", "--config", "resnet18_imagenet", "--data.root", "lone"], 1, "num_classes is 1"),
        (["validate", "--config", "quickstart", "--ckpt_path", "none.ckpt"], 1, "ckpt_path 'none.ckpt' does not exist"),
        (
            [*QUICK, "--model.binary.kernel", "[[[0.1]],[[0.2]],[[0.3]]]"],
            1,
            "kernel has 3 channels, but the input has 16, not a multiple of 3",
        ),
    ],
)
def test_one_line(args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("design-train: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert len(lines[0]) < 420
    assert stopped.value.code == code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_accelerator_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*QUICK[:-1], "cuda"])
    assert "design-train: error: `CUDAAccelerator` can not run on your system" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(ValueError, match="unknown backbone 'resnet81'"):
        main([*QUICK, "--model.backbone", "resnet81"])
