"""What goes wrong by the user's hand ends in one clear line, with the nearest right name and a non-zero code."""

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from design_lightning.cli import DEBUG, main
from design_lightning.training import DesignClassifier

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
        ([*QUICK, "--ckpt_pth", "x"], 2, "unknown option 'ckpt_pth': did you mean 'ckpt_path'?"),
        (["submit", "--config", "quickstart", "--nodez", "2"], 2, "unknown option 'nodez': did you mean 'nodes'"),
        (
            ["benchmark", "training", "--model", "resnet81"],
            1,
            "timm has no network 'resnet81': did you mean 'resnet18'",
        ),
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
    message = (
        "design-train: error: trainer.accelerator is 'cuda', but torch finds no such device here: use cpu, or auto"
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("model:\n  init_args:\n    backbone: resnet81\n", "unknown backbone 'resnet81': did you mean 'resnet18'"),
        ("model:\n  init_args:\n    binary: {kernel: 2x2_v9}\n", "unknown kernel '2x2_v9': did you mean '2x2_v2'"),
        ("model:\n  init_args:\n    binary: {estimator: stee}\n", "unknown estimator 'stee': did you mean 'ste'"),
        ("model:\n  init_args:\n    binary: {skip: [frist]}\n", "skip: 'frist': did you mean 'first'?"),
        ("model:\n  init_args:\n    binary: {policy: papr}\n", "policy: 'papr': did you mean 'paper'?"),
        ("model:\n  init_args:\n    loss: CrossEntropLoss\n", "'CrossEntropLoss': did you mean 'CrossEntropyLoss'"),
        ("data:\n  init_args:\n    batch_size: 0\n", "batch_size=0 must be at least 1"),
        ("trainer:\n  min_epochs: 1\n  strategy: ddpp\n", "trainer.strategy is 'ddpp': did you mean 'ddp'"),
        ("trainer:\n  min_epochs: 1\n  accelerator: gpuu\n", "trainer.accelerator is 'gpuu': did you mean 'gpu'?"),
    ],
)
def test_an_overlay_is_named_with_the_line(yaml: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(yaml)
    with pytest.raises(SystemExit):
        main([*QUICK, "--config", "mine.yaml"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert "(mine.yaml, line 3)" in line


def test_files_that_are_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    Path("indent.yaml").write_text("trainer:\n  max_epochs: 3\n bad: 4\n")
    Path("list.yaml").write_text("- 1\n- 2\n")
    for args, message in (
        ("indent.yaml", "indent.yaml, line 3: not YAML"),
        ("list.yaml", "list.yaml holds no `key: value`"),
    ):
        with pytest.raises(SystemExit):
            main([*QUICK, "--config", args])
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "model:\n  init_args:\n    binary: [kernel, 2x2_v1]\n",
            "binary is a list, where `key: value` pairs should stand",
        ),
        ("model:\n  init_args:\n    binary: reactnet\n", "binary is 'reactnet', where `key: value` pairs should stand"),
        ("model:\n\n  init_args: 3\n", "init_args is '3', where `key: value` pairs should stand"),
        ("seed_everything: 1\n\ntrainer:\n  - max_epochs\n", "trainer is a list, where"),
        ("seed_everything: 1\n\ntrainer:\n", "trainer is empty, where"),
        ("seed_everything: 1\n\ndata: 5\n", "data is '5', where"),
        ("trainer:\n  max_epochs: 2\n  max_epochs: 3\n", "'max_epochs' stands twice, in line 2 already: leave one"),
        ("model:\n  init_args:\n    binary: {scale: 1.0, scale: 0.5}\n", "'scale' stands twice, in line 3 already"),
        (
            "trainer:\n  min_epochs: 1\n  logger: TensorBordLogger\n",
            "'TensorBordLogger': did you mean 'TensorBoardLogger'?",
        ),
        ("trainer:\n  min_epochs: 1\n  limit_test_batches: i\n", "expected int or float, not 'i'"),
        (
            "model:\n  init_args:\n    binary: {max_epoch: 3}\n",
            "unknown option 'max_epoch': known are activation, activ",
        ),
        ("data:\n  init_args:\n    batchsize: 3\n", "unknown option 'batchsize': did you mean 'batch_size'?"),
        (
            "model:\n  init_args:\n    optimizer: {class_path: Adam, init_args: {learning_rate: 1}}\n",
            "unknown option 'learning_rate': known are amsgrad, betas, capturable",
        ),
        (
            "trainer:\n  callbacks:\n    - {class_path: LatentWeightClipping, init_args: {lr: 1}}\nmodel:\n  init_args:\n"
            "    optimizer: {class_path: Adam, init_args: {lr: 1}}\n",
            "unknown option 'lr': known are bound, layers",
        ),
    ],
)
def test_a_key_is_looked_at_where_it_stands(yaml: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yml").write_text(yaml)
    with pytest.raises(SystemExit):
        main([*QUICK, "--config", "mine.yml"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert "(mine.yml, line 3)" in line


def test_an_anchor_may_be_used_twice(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "model:\n  init_args:\n    binary:\n      overrides: {layer4.*: &float {weight: recu}, layer3.*: *float}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, "--config", "mine.yaml", "--print_config"])
    assert not ended.value.code
    assert capsys.readouterr().out.count("weight: recu") == 2


ONE_STEP = [*QUICK, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--model.warmup_epochs", "0"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_a_batch_that_would_fit(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training_step(*_: object) -> None:
        raise error

    monkeypatch.setattr(DesignClassifier, "training_step", training_step)
    monkeypatch.setattr("design_lightning.commands.checks.capacity_of", lambda device: 20_000_000)
    with pytest.raises(SystemExit):
        main([*ONE_STEP, "--data.batch_size", "512"])
    found = re.search(
        r"out of memory on cpu with batch_size 512: about (\d+) would fit; --data.batch_size (\d+) "
        r"--trainer.accumulate_grad_batches (\d+) keeps the images of a step",
        capsys.readouterr().err,
    )
    assert found
    fitting, again, share = map(int, found.groups())
    assert fitting == again < 256
    assert share == -(-512 // fitting)


class WorkersKilled(Callback):
    """At the first step the processes that load images are killed."""

    def on_train_batch_start(self, *_: Any) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)


@pytest.mark.own_process
@pytest.mark.slow
def test_a_killed_process_of_the_loader_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.num_workers", "1", "--data.batch_size", "4", "--trainer.limit_val_batches", "0"]
    with pytest.raises(SystemExit) as ended:
        main(
            [*QUICK, *options, "--model.backbone_args.width", "0.125", f"--trainer.callbacks+={__name__}.WorkersKilled"]
        )
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"design-train: error: DataLoader worker \(pid.* A system kills where memory runs out: set data\.num_workers",
        error,
    )


def test_other_runtime_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(DesignClassifier, "training_step", training_step)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(ONE_STEP)


def test_what_early_stopping_and_optimizers_refuse_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    stopping = '--trainer.callbacks=[{"class_path": "EarlyStopping", "init_args": {"monitor": "val/top2"}}]'
    for options, message in (
        ([stopping], "conditioned on metric `val/top2` which is not available"),
        (["--model.optimizer.lr", "-1"], "the optimizer refuses its arguments: Invalid learning rate: -1.0"),
    ):
        with pytest.raises(SystemExit):
            main([*ONE_STEP, *options])
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_classes_of_data_configuration_and_checkpoint_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    Path("seven.yaml").write_text("model: {init_args: {num_classes: 7}}\n")
    main([*ONE_STEP, "--config", "seven.yaml"])
    output, notices = capsys.readouterr()
    assert "num_classes is 10, as the data has; the configuration's 7 is left aside" in notices
    path = next(line for line in output.splitlines() if line.startswith("checkpoint: ")).partition(": ")[2]
    checkpoint = torch.load(path, weights_only=True)
    names = checkpoint["hyper_parameters"]["class_names"]
    measure = ["validate", *QUICK[1:], "--trainer.limit_val_batches", "1", "--ckpt_path", "other.ckpt"]
    for other, message in (
        ({"num_classes": 7}, "other.ckpt tells 7 classes apart, but the data has 10"),
        ({"class_names": names[::-1]}, "10 of 10 class names differ"),
    ):
        torch.save({**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], **other}}, "other.ckpt")
        with pytest.raises(SystemExit):
            main(measure)
        assert message in capsys.readouterr().err.splitlines()[-1]
    checkpoint["hyper_parameters"]["class_names"] = ["shirt", *names[1:]]
    torch.save(checkpoint, "other.ckpt")
    main(measure)
    assert f"1 of 10 class names differ, such as 'shirt' in the checkpoint and {names[0]!r} in the data" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("binary", ["{}", "null"])
def test_a_network_that_cannot_take_the_images(binary: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--model.backbone", "test_vit", "--model.backbone_args", "null", "--model.binary", binary]
    with pytest.raises(SystemExit):
        main([*QUICK, *network])
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "error: test_vit cannot take images of 1x28x28: give the data another image_size, or the network its own"
        in line
    )
    assert "Input height (28) should be divisible by patch size (16)" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.logger", "false", "--trainer.default_root_dir", "/proc/x"],
            "trainer.default_root_dir is '/proc/x', which",
        ),
        (["--trainer.logger.save_dir", "/proc/x"], "save_dir of CSVLogger is '/proc/x', which cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_written(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*ONE_STEP, *options])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(ValueError, match="unknown backbone 'resnet81'"):
        main([*QUICK, "--model.backbone", "resnet81"])
