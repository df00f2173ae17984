"""What all tests share: one thread a worker, and small real data."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from alone import run_alone
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test with the mark `own_process` in one.

    torch refuses to fork where other tests have used autograd's threads, and a signal that nobody handles ends the process.
    """
    if pyfuncitem.get_closest_marker("own_process") is None or os.environ.get("OWN_PROCESS") == "1":
        return None
    failure = run_alone(pyfuncitem.nodeid, pyfuncitem.config.rootpath)
    assert not failure, failure
    return True


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def make_image_tree(root: Path, classes: Sequence[str], images: dict[str, int], size: int) -> Path:
    """Writes `root/<split>/<class>/N.jpg`: a colour of its own for each class, and noise."""
    generator = np.random.default_rng(0)
    for split, count in images.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                base = np.array([40 + 170 * (label % 2), 40 + 20 * (label % 10), 128])
                pixels = np.clip(base + generator.normal(0, 30, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.fixture
def image_tree(tmp_path: Path) -> Path:
    """An ImageFolder tree of 224-pixel JPEGs: two classes, eight training and three validation images each."""
    return make_image_tree(tmp_path / "images", ("cat", "dog"), {"train": 8, "val": 3}, 224)


@pytest.fixture
def cifar10_tree(tmp_path: Path) -> Path:
    """CIFAR-10 as class folders: four training images and one validation image a class."""
    return make_image_tree(tmp_path / "cifar10", CIFAR10_CLASSES, {"train": 4, "val": 1}, 32)
