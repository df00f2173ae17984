from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeTree = Callable[..., Path]


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Makes `root/<split>/<class>/0.jpg, 1.jpg, ...` out of {split: {class: number}}, each image of its own colours."""

    def make(splits: dict[str, dict[str, int]], size: tuple[int, int] = (40, 32), name: str = "tree") -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / name
        for split, classes in splits.items():
            for class_name, number in classes.items():
                folder = root / split / class_name
                folder.mkdir(parents=True)
                for index in range(number):
                    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{index}.jpg")
        return root

    return make
