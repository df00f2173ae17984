"""A checkpoint is written whole or not at all; a file-size limit stands in for a full disk."""

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from design_lightning.cli import main
from design_lightning.training import AtomicCheckpointIO


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    path, io = tmp_path / "deep" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.zeros(100_000)}}, path)
    with at_most(20_000), pytest.raises(OSError, match=r"last\.ckpt cannot be written \(.*too large\); the one before"):
        io.save_checkpoint({"state_dict": {"w": torch.ones(100_000)}}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert not io.load_checkpoint(path)["state_dict"]["w"].any()
    io.save_checkpoint({"state_dict": {"w": torch.ones(100_000)}}, path)
    assert io.load_checkpoint(path)["state_dict"]["w"].all()
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_the_first_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with at_most(20_000), pytest.raises(OSError, match="there was none before it"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.ones(100_000)}, tmp_path / "first.ckpt")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_pickled_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"w": lambda: None}, tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


class FullDisk(Callback):
    """From the second epoch on nothing of the size of a checkpoint can be written."""

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_ends_fit_in_one_line_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--trainer.accelerator cpu --trainer.max_epochs 3 --trainer.limit_train_batches 2 --data.num_workers 0"
    network = ["--model.backbone", "test_resnet", "--model.backbone_args", "null", "--data.batch_size", "8"]
    latest = '--trainer.callbacks+={"class_path": "ModelCheckpoint", "init_args": {"filename": "latest"}}'
    disk = [f"--trainer.callbacks+={__name__}.FullDisk", latest, "--trainer.limit_val_batches", "1"]
    with at_most(10**12), pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart", *options.split(), *network, *disk])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("design-train: error: the checkpoint ")
    assert "cannot be written" in error
    checkpoints = tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints"
    for file in checkpoints.iterdir():
        assert torch.load(file, weights_only=True)["global_step"] == 2
    assert {file.name for file in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt", "latest.ckpt"}


def test_a_requeued_job_names_its_checkpoint_where_that_is_missing_or_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--trainer.accelerator cpu --trainer.default_root_dir . --data.num_workers 0 --ckpt_path hpc"
    fit = ["fit", "--config", "quickstart", *options.split(), "--model.backbone_args.width", "0.125"]
    with pytest.raises(SystemExit):
        main(fit)
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("design-train: error: ckpt_path 'hpc' is 'hpc_ckpt_1.ckpt', which does not exist")
    )
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(100_000)}}, tmp_path / "hpc_ckpt_1.ckpt")
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes((tmp_path / "hpc_ckpt_1.ckpt").read_bytes()[:200_000])
    with pytest.raises(SystemExit) as ended:
        main(fit)
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"design-train: error: \S*hpc_ckpt_1\.ckpt is no checkpoint of an earlier run: it is cut off", error
    )
