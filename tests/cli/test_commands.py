"""The commands through `main`, from a recipe's name to the files that each command leaves."""

import contextlib
import csv
import importlib.metadata
import io
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import design_lightning as dl
from design_lightning.cli import main
from design_lightning.commands.plugins import GROUP

NAMES = sorted(
    path.relative_to(Path(__file__).parents[2] / "configs").with_suffix("").as_posix()
    for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml")
)
FIT = shlex.split(
    "fit --config quickstart --trainer.accelerator cpu --trainer.max_epochs 2 --trainer.limit_train_batches 3 "
    "--trainer.limit_val_batches 2 --trainer.limit_test_batches 2 --trainer.limit_predict_batches 2 "
    "--data.batch_size 16 --trainer.log_every_n_steps 1"
)
FIELDS = ("best val/top1", "checkpoint", "logs", "next", "then")


@dataclass(frozen=True)
class Run:
    """What `fit` left behind."""

    folder: Path
    output: str

    @property
    def facts(self) -> dict[str, str]:
        """The last lines, `name: value`."""
        lines = (line.partition(": ") for line in self.output.splitlines()[-len(FIELDS) :])
        return {name: value for name, _, value in lines}

    @property
    def logs(self) -> Path:
        return self.folder / self.facts["logs"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One short training of the recipe that a newcomer runs first."""
    folder = tmp_path_factory.mktemp("fitted")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(folder)
        main(FIT)
    return Run(folder, output.getvalue())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def resolved(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    """The configuration that a command would run with."""
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--print_config"])
    assert exit_.value.code in (0, None)
    config: dict[str, dict[str, object]] = yaml.safe_load(capsys.readouterr().out)
    return config


# Recipes


def test_recipes_lists_every_packaged_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines[1:] if re.match(r"\S+ ", line)]
    assert listed[: len(NAMES)] == NAMES
    assert max(map(len, lines)) <= 80
    for fact in ("resnet18_cifar", "FashionMNISTSubset", "arXiv:2405.02220"):
        assert any(fact in line for line in lines), f"{fact} is broken in mid-word"


@pytest.mark.parametrize("spelling", ["resnet20_cifar10", "resnet20_cifar10.yaml", "configs/resnet20_cifar10.yaml"])
def test_a_recipe_is_found_from_any_directory(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = resolved(["fit", "--config", spelling], capsys)["model"]
    assert isinstance(model["init_args"], dict)
    assert model["init_args"]["backbone"] == "resnet20_cifar"


def test_a_file_of_that_name_comes_before_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"model": {"class_path": "DesignClassifier"}, "data": {"class_path": "FashionMNISTSubset"}}
    Path("quickstart.yaml").write_text(yaml.safe_dump(own | {"trainer": {"max_epochs": 77}}), encoding="utf-8")
    assert resolved(["fit", "--config=quickstart.yaml"], capsys)["trainer"]["max_epochs"] == 77
    assert resolved(["fit", "--config=quickstart"], capsys)["trainer"]["max_epochs"] == 8


def test_an_unknown_recipe_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "resnet20_cifar01"])
    assert exit_.value.code
    (line,) = capsys.readouterr().err.splitlines()
    assert "'resnet20_cifar01'" in line
    assert "did you mean 'resnet20_cifar10'" in line


# Plugins


def test_a_broken_plugin_is_named_and_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good_plugin.py").write_text(
        "from lightning.pytorch import Callback\n\n\nclass CallbackOfAPlugin(Callback):\n    pass\n", encoding="utf-8"
    )
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('made for another version')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plugins = [importlib.metadata.EntryPoint(name, f"{name}_plugin", GROUP) for name in ("broken", "good")]
    real = importlib.metadata.entry_points

    def entry_points(**selection: str) -> object:
        return plugins if selection.get("group") == GROUP else real(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    with pytest.warns(UserWarning, match=r"'broken' \(broken_plugin\) .*RuntimeError: made for another version"):
        config = resolved(["fit", "--config", "quickstart", "--trainer.callbacks+=CallbackOfAPlugin"], capsys)
    assert "good_plugin.CallbackOfAPlugin" in str(config["trainer"]["callbacks"])


# Training, and what comes after it


def test_fit_ends_with_the_best_accuracy_the_checkpoint_the_logs_and_the_next_commands(fitted: Run) -> None:
    assert tuple(fitted.facts) == FIELDS
    best = max(float(row["val/top1"]) for row in read(fitted.logs / "metrics.csv") if row["val/top1"])
    assert fitted.facts["best val/top1"] == f"{best:.2%}"
    checkpoint = fitted.folder / fitted.facts["checkpoint"]
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["backbone"] == "resnet18_cifar"
    assert fitted.facts["next"].startswith("design-train test --config ")


@pytest.mark.parametrize(("monitor", "which"), [(None, "last"), ("val/top1", "best")])
def test_the_accuracy_is_called_best_where_a_checkpoint_monitors_it(
    monitor: str | None, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"monitor": monitor, "mode": "max"}}
    callbacks = {"trainer": {"callbacks": [checkpoint]}}
    Path("callbacks.yaml").write_text(yaml.safe_dump(callbacks), encoding="utf-8")
    main([*FIT, "--config", "callbacks.yaml", "--trainer.max_epochs", "1", "--model.warmup_epochs", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[-5:]] == [f"{which} val/top1", *FIELDS[1:]]


def test_fit_leaves_checkpoints_the_configuration_and_the_metrics(fitted: Run) -> None:
    assert {path.name for path in (fitted.logs / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    config = yaml.safe_load((fitted.logs / "config.yaml").read_text(encoding="utf-8"))
    assert (config["trainer"]["max_epochs"], config["data"]["init_args"]["batch_size"]) == (2, 16)
    rows = read(fitted.logs / "metrics.csv")
    assert len([row for row in rows if row["train/loss"]]) == 2 * 3
    assert len([row for row in rows if row["val/top1"]]) == 2


def test_fit_shows_what_is_binary_and_how_fast_it_is(fitted: Run) -> None:
    assert "1-bit" in fitted.output
    assert "img/s" in fitted.output


def test_the_next_command_of_fit_tests_class_by_class(
    fitted: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitted.folder)
    program, *arguments = shlex.split(fitted.facts["next"])
    assert program == "design-train"
    main(arguments)
    output = capsys.readouterr().out
    assert "accuracy by class" in output
    found = re.search(r"written: (\S+)/confusion\.png", output)
    assert found
    folder = Path(found.group(1))
    matrix = [[int(cell) for name, cell in row.items() if name != "class"] for row in read(folder / "confusion.csv")]
    assert len(matrix) == 10
    assert sum(map(sum, matrix)) == 2 * 16
    assert (folder / "confusion.png").stat().st_size > 10_000
    tested = next(row for row in read(folder / "metrics.csv") if row.get("test/top1"))
    assert float(tested["test/top1"]) == pytest.approx(sum(matrix[i][i] for i in range(10)) / 32)


def test_the_command_after_that_exports(
    fitted: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitted.folder)
    program, *arguments = shlex.split(fitted.facts["then"])
    assert (program, arguments[0]) == ("design-train", "export")
    main([*arguments, "--images", "16", "--format", "packed"])  # all of them take long
    assert "compared with PyTorch on 16 images" in capsys.readouterr().out
    assert Path("runs/quickstart/exported/model.packed.safetensors").is_file()


def after(fitted: Run, command: str, *options: str) -> list[str]:
    config = str(Path(fitted.facts["logs"]) / "config.yaml")
    return [command, "--config", config, "--ckpt_path", fitted.facts["checkpoint"], *options]


def test_validate_measures_what_fit_measured(
    fitted: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitted.folder)
    main(after(fitted, "validate", "--trainer.logger.init_args.version", "validated"))
    (row,) = read(fitted.logs.parent / "validated" / "metrics.csv")
    assert f"{float(row['val/top1']):.2%}" == fitted.facts["best val/top1"]
    assert "val/top1" in capsys.readouterr().out


def test_predict_writes_a_row_an_image(
    fitted: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitted.folder)
    main(after(fitted, "predict"))
    found = re.search(r"written: (\S+predictions\.csv) \(32 images\)", capsys.readouterr().out)
    assert found
    rows = read(Path(found.group(1)))
    assert len({row["path"] for row in rows}) == len(rows) == 32
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.slow
def test_fit_on_two_processes_ends_with_one_outcome(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("design-train")
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    command = [
        str(program),
        *FIT,
        *options,
        "--model.backbone_args.width",
        "0.125",
        "--trainer.limit_train_batches",
        "2",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("next: design-train test") == 1


def test_fit_without_a_checkpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.callbacks", "null", "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", "1"]
    main([*FIT, "--model.warmup_epochs", "0", *options])
    output = capsys.readouterr().out
    assert "checkpoint: none was saved" in output
    assert "next:" not in output


def test_validate_of_a_missing_checkpoint_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["validate", "--config", "quickstart", "--ckpt_path", "runs/none.ckpt"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "'runs/none.ckpt' does not exist" in line


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_measuring_random_weights_is_said(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    limit = [f"--trainer.limit_{'val' if command == 'validate' else command}_batches", "1"]
    main([command, "--config", "quickstart", "--trainer.accelerator", "cpu", *limit, "--data.batch_size", "4"])
    assert "no --ckpt_path given, so the network has random weights" in capsys.readouterr().err


def test_measuring_a_checkpoint_warns_of_nothing(
    fitted: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitted.folder)
    main(after(fitted, "validate"))
    assert "random weights" not in capsys.readouterr().err


OWN_DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

class OwnData(LightningDataModule):
    def loader(self):
        return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = loader
"""


def test_next_command_works_with_data_that_knows_no_classes_and_a_kernel_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    dl.ThresholdKernel([[0.2, 0.6]], name="mine").to_json("kernel.json")
    Path("own.yaml").write_text("model: {class_path: DesignClassifier, init_args: {num_classes: 3}}\n")
    network = ["--model.backbone", "resnet20_cifar", "--model.backbone_args", "{width: 0.25}"]
    rest = ["--data", "own_data.OwnData", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", "own.yaml", *network, "--model.binary.kernel", "kernel.json", *rest])
    printed = capsys.readouterr()
    assert "OwnData has no num_classes: the model has 3" in printed.err
    (tmp_path / "kernel.json").unlink()
    command = shlex.split(printed.out.partition("next: design-train ")[2].splitlines()[0])
    main(command)
    assert "test/top1" in capsys.readouterr().out


def test_saved_configuration_holds_what_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(FIT)
    saved = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())["model"]["init_args"]
    assert saved["num_classes"] == 10
    assert saved["input_size"] == [1, 28, 28]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)])
@pytest.mark.slow
def test_a_fit_that_is_stopped_is_no_success_and_says_how_to_go_on(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    program = Path(sys.executable).with_name("design-train")
    short = ["--trainer.max_epochs", "9999", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    with subprocess.Popen(
        ["env", "--default-signal=INT", str(program), *FIT[:5], *short],  # in the background a shell ignores it
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while not list(tmp_path.rglob("last.ckpt")) and time.monotonic() < deadline:
                time.sleep(0.2)
            process.send_signal(sent)
            printed, _ = process.communicate(timeout=120)
        finally:
            process.kill()  # where it did not end
    assert process.returncode == code
    stopped = printed.partition("stopped at step ")[2]
    assert "to go on from the last checkpoint: the same command with --ckpt_path " in stopped
    assert (tmp_path / stopped.partition("--ckpt_path ")[2].split()[0]).is_file()
