from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from design_lightning.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES


def _class_folders(root: Path, classes: tuple[str, ...], images: int, size: int) -> Path:
    """`root/train/<class>/0.jpg, ...` and one image a class below `root/val/`."""
    rng = np.random.default_rng(0)
    for split, number in (("train", images), ("val", 1)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return root


def _stl10(root: Path) -> Path:
    """torchvision's layout: uint8 columns of 3 x 96 x 96, labels from 1 to 10."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 10)):
        rng.integers(0, 256, (number, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{split}_X.bin")
        (np.arange(number) % 10 + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """From the class name of a data module to the arguments that give it a few images of the real format."""
    home = tmp_path_factory.mktemp("data")
    make = {
        "CIFAR10": lambda root: _class_folders(root, CIFAR10_CLASSES, images=2, size=32),
        "CIFAR100": lambda root: _class_folders(root, CIFAR100_CLASSES, images=1, size=32),
        "ImageFolder": lambda root: _class_folders(root, ("n01440764", "n01443537"), images=3, size=224),
        "STL10": _stl10,
    }

    def arguments(name: str) -> list[str]:
        if name == "FashionMNISTSubset":
            return []
        assert name in make, f"no tiny data for {name}: add some here, so that its recipes are tested"
        root = home / name
        if not root.exists():
            make[name](root)
        return ["--data.root", str(root)]

    return arguments
