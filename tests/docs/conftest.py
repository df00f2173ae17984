import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SINFO = "\n".join(f"main*|n{i}|gpu:a100:8|64|2-00:00:00|up|1-infinite" for i in range(4))


def _images(root: Path, classes: tuple[str, ...], size: int, count: int) -> None:
    for split in ("train", "val"):
        for i, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for j in range(count):
                noise = Image.effect_noise((size, size), 60 + 10 * j)
                Image.merge("RGB", [noise.point(lambda v, i=i: (v + 20 * i) % 256)] * 3).save(
                    root / split / name / f"{j}.jpg"
                )


def _cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `sinfo`, with one partition of nodes of 8 GPUs and of 64 processors."""
    folder.mkdir()
    sinfo = folder / "sinfo"
    sinfo.write_text(f"#!/bin/sh\ncat <<'END'\n{SINFO}\nEND\n", encoding="utf-8")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: data of the right kind, a configuration, a checkpoint that only exists."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    _images(tmp_path / "data" / "cifar10", CIFAR10, 32, 2)
    _images(tmp_path / "data" / "imagenet", ("n01440764", "n01443537"), 64, 2)
    _images(tmp_path / "DIR", ("n01440764", "n01443537"), 64, 2)
    shutil.copytree(tmp_path / "data" / "cifar10" / "val", tmp_path / "IMAGES")
    Image.effect_noise((64, 48), 80).save(tmp_path / "photo.jpg")
    (tmp_path / "checkpoint.ckpt").touch()
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "model.xml").touch()
    _cluster(tmp_path / "bin", monkeypatch)
    (tmp_path / "mine.yaml").write_text("trainer: {max_epochs: 2}\n")
    return tmp_path


@pytest.fixture
def trained(world: Path) -> Callable[[], None]:
    """Makes a run of two steps, whose configuration and checkpoint stand where the pages say."""

    def train() -> None:
        from design_lightning.cli import main

        main(["fit", "--config", "quickstart", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"])
        shutil.copytree(world / "runs" / "quickstart", world / "runs" / "NAME")
        shutil.copy(
            world / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt", world / "checkpoint.ckpt"
        )

    return train
