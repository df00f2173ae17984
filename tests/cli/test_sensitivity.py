"""`design-train sensitivity` on the packaged images: what it prints and writes, and how it fails."""

import contextlib
import csv
import io
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from design_lightning.cli import main

TINY = shlex.split(
    "--trainer.accelerator cpu --model.backbone resnet20_cifar --model.backbone_args '{width: 0.25}' --data.batch_size 16"
)
MEASURE = ["sensitivity", "--config", "quickstart", *TINY, "--limit", "2"]
QUICK = [*MEASURE, "--recalibrate", "2"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short training."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        steps = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"]
        main(["fit", "--config", "quickstart", *TINY, *steps, "--model.warmup_epochs", "0"])
    return folder


def of_run(fitted: Path, *options: str) -> list[str]:
    run = fitted / "runs" / "quickstart" / "version_0"
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    return ["sensitivity", "--config", str(run / "config.yaml"), "--ckpt_path", checkpoint, *options]


def test_measures_a_checkpoint_and_writes_table_picture_and_overrides(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    options = ("--limit", "2", "--keep", "2", "--recalibrate", "0", "--by", "loss", "--out", "found")
    main(of_run(fitted, *options))
    output, error = capsys.readouterr()
    assert "random weights" not in error
    assert "top-1 on 32 images" in output
    table = output.partition("paste below")[0].partition("written:")[0]
    assert max(map(len, table.splitlines())) <= 80
    with Path("found/sensitivity.csv").open(newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert len(rows) == 18
    stored = json.loads(Path("found/sensitivity.json").read_text())
    assert {row["layer"] for row in stored["rows"]} == set(rows)
    with Path(fitted / "runs/quickstart/version_0/metrics.csv").open(newline="") as file:
        logged = [row["val/top1"] for row in csv.DictReader(file) if row["val/top1"]]
    assert stored["binary_accuracy"] == pytest.approx(float(logged[-1]))
    block = yaml.safe_load(Path("found/overrides.yaml").read_text())
    if block["overrides"]:
        assert all(f"  {name}: null" in output.partition("and train:")[2] for name in block["overrides"])
    clear = [float(row["loss"]) for row in rows.values() if float(row["loss"]) > float(row["loss_error"])]
    assert ("above one standard error" in output) == (len(clear) < 2)
    assert [float(rows[name]["loss"]) for name in block["overrides"]] == sorted(clear, reverse=True)[:2]
    assert Path("found/sensitivity.png").stat().st_size > 10_000


def test_overrides_paste_into_a_configuration_that_trains(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(of_run(fitted, "--limit", "4", "--recalibrate", "4", "--out", "found"))
    overrides = yaml.safe_load(Path("found/overrides.yaml").read_text())
    kept = len(overrides["overrides"])
    Path("more.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"binary": overrides}}}))
    capsys.readouterr()
    steps = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--model.warmup_epochs", "0"]
    main(["fit", "--config", "quickstart", "--config", "more.yaml", *TINY, *steps])
    assert f"{18 - kept} of 20 layers are binary" in capsys.readouterr().out


def test_json_alone_is_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*QUICK, "--json"])
    output, error = capsys.readouterr()
    assert json.loads(output)["images"] == 32
    assert "no --ckpt_path given, so the network has random weights" in error
    assert Path("runs/quickstart/sensitivity/sensitivity.png").is_file()


@pytest.mark.slow
def test_recalibrates_batch_norm_on_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, images in ((["--recalibrate", "3", "--by", "gain"], 48), ([], 320)):
        main([*MEASURE, *options])
        output = " ".join(capsys.readouterr().out.split())
        assert f"batch norm: estimated anew on {images} training images for each measurement" in output


@pytest.mark.slow
def test_images_that_do_not_fit_are_said_to_be_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*QUICK, "--json"])
    held = json.loads(capsys.readouterr().out)
    main([*QUICK, "--json", "--memory", "1e-6"])
    output, error = capsys.readouterr()
    assert "each pass reads them anew: --memory allows more, --limit takes fewer" in error
    assert json.loads(output) == held


def test_overrides_of_the_configuration_are_in_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*QUICK, "--keep", "1", "--model.binary.overrides", "{layer1.*: {weight: sign}}"])
    block = yaml.safe_load(Path("runs/quickstart/sensitivity/overrides.yaml").read_text())["overrides"]
    assert next(iter(block.items())) == ("layer1.*", {"weight": "sign"})
    assert len(block) <= 2
    assert "standard error: 0, fewer than the 1 asked for" in capsys.readouterr().out or len(block) == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--limit", "0"], 1, "limit is 0, but must be at least 1"),
        (["--keep", "-1"], 1, "keep is -1, but must be at least 0"),
        (["--by", "size"], 2, "by: 'size' is none of 'loss', 'gain'"),
        (["--limit", "many"], 2, "limit: expected int, not 'many'"),
        (["--ckpt_path", "none.ckpt"], 1, "ckpt_path 'none.ckpt' does not exist"),
        (["--ckpt_path", "best"], 1, "ckpt_path 'best' is no file"),
        (
            ["--ckpt_path", "empty.ckpt"],
            1,
            "ckpt_path 'empty.ckpt' is no checkpoint of an earlier run: it has no state_dict",
        ),
        (["--ckpt_path", "other.ckpt"], 1, "ckpt_path 'other.ckpt' does not fit the model"),
        (["--model.binary", "null"], 1, "has no binary layer"),
    ],
)
def test_errors_are_one_line(
    options: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": {}}, "empty.ckpt")
    torch.save({"state_dict": {"backbone.fc.weight": torch.zeros(3, 3)}}, "other.ckpt")
    with pytest.raises(SystemExit) as exit_:
        main([*MEASURE, *options])
    assert exit_.value.code == code
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("design-train: error: ")
    assert message in line
