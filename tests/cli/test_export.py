"""`design-train export`, and `test` and `predict` with what it wrote, on the packaged images."""

import contextlib
import csv
import io
import json
import shlex
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.cli import main
from design_lightning.commands.export import first_images
from design_lightning.data import FashionMNISTSubset

TINY = shlex.split(
    "--trainer.accelerator cpu --model.backbone resnet20_cifar --model.backbone_args '{width: 0.25}' --data.batch_size 16"
)
FORMATS = {"packed": "net.packed.safetensors", "onnx": "net.onnx", "openvino": "net.xml"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short training, and in `shipped` what was exported of it."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        steps = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"]
        main(["fit", "--config", "quickstart", *TINY, *steps, "--model.warmup_epochs", "0"])
        output.truncate(0)
        options = ["--format", "onnx", "openvino", "packed", "--out", "shipped", "--name", "net", "--images", "20"]
        main(["export", *of_run(folder), *options])
        (folder / "printed").write_text(output.getvalue().replace("\0", ""))
    return folder


def of_run(folder: Path) -> list[str]:
    run = folder / "runs" / "quickstart" / "version_0"
    return ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]


def test_a_table_and_the_files(fitted: Path) -> None:
    output = (fitted / "printed").read_text()
    assert "compared with PyTorch on 20 images" in output
    assert max(map(len, output.partition("written:")[0].splitlines())) <= 80
    for name, file in FORMATS.items():
        assert (fitted / "shipped" / file).is_file()
        assert f"written: shipped/{file}" in output
        assert name in output
        about = dl.open_exported(fitted / "shipped" / file).about
        assert about.labels is not None
        assert about.labels[0] == "T-shirt/top"
        assert about.mean is not None
        assert about.training["backbone"] == "resnet20_cifar"
        assert about.training["global_step"] == 3


def test_test_and_predict_take_the_files(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def top1(*options: str) -> str:
        main(["test", *options, "--trainer.limit_test_batches", "2", "--trainer.logger", "false"])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "test/top1" in line)
        return line.split()[-2]

    expected = top1(*of_run(fitted))
    small = ["--data", "FashionMNISTSubset", "--data.image_size", "28", "--data.batch_size", "16"]
    for file in FORMATS.values():
        assert top1("--ckpt_path", str(fitted / "shipped" / file), *small) == expected
    config = of_run(fitted)[:2]
    assert top1(*config, f"--ckpt_path={fitted / 'shipped' / 'net.onnx'}") == expected
    for number, file in enumerate(("net.onnx", "net.packed.safetensors")):
        options = ["--trainer.limit_predict_batches", "1", "--trainer.default_root_dir", str(tmp_path / str(number))]
        main(["predict", *config, "--ckpt_path", str(fitted / "shipped" / file), *options, "--trainer.logger", "false"])
    tables = [list(csv.reader(next(tmp_path.rglob(f"{n}/**/predictions.csv")).open())) for n in "01"]
    assert len(tables[0]) == 17
    assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]


def test_json_and_half_precision(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main(
        ["export", *of_run(fitted), "--format=packed", "--dtype", "float16", "--images", "4", "--out", "half", "--json"]
    )
    (found,) = json.loads(capsys.readouterr().out)
    assert found["format"] == "packed"
    assert found["agreement"]["images"] == 4
    assert found["bytes"] == Path("half/model.packed.safetensors").stat().st_size
    assert found["bytes"] < (fitted / "shipped" / FORMATS["packed"]).stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onxx"], "unknown export format 'onxx': did you mean 'onnx'"),
        (["--images", "0"], "images is 0, but must be at least 1"),
        (["--dtype", "int8"], "dtype"),
    ],
)
def test_one_line_of_error(
    options: list[str], message: str, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["export", *of_run(fitted), *options])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("design-train: error"))
    assert message in line


def test_a_file_for_images_of_another_size(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(fitted / "shipped" / "net.onnx")
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", file, "--data", "FashionMNISTSubset", "--data.image_size", "32"])
    assert "net.onnx takes images of [1, 28, 28], but those of the data are [1, 32, 32]" in capsys.readouterr().err


def test_images_are_compared_as_a_network_gets_them() -> None:
    data = FashionMNISTSubset(batch_size=8)
    images, labels = first_images(data, 12)
    assert images is not None
    torch.testing.assert_close(images, data.normalize(data.samples("val").images[:12]))
    assert labels is not None
    assert labels.tolist() == data.samples("val").labels[:12].tolist()


def test_floats_of_somebodys_own_data_stay_as_they_are() -> None:
    given = torch.randn(12, 3, 4, 4)

    class Own(LightningDataModule):
        def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return DataLoader(TensorDataset(given, torch.arange(12)), batch_size=5)

    images, _ = first_images(Own(), 11)
    assert images is not None
    assert torch.equal(images, given[:11])
