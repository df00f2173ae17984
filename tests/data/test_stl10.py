from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from design_lightning.data import STL10


@pytest.fixture
def pixels() -> np.ndarray:
    """Uint8 `[N, C, H, W]`."""
    return np.random.default_rng(0).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)


@pytest.fixture
def root(tmp_path, pixels) -> Path:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split, count in (("train", 20), ("test", 10)):
        pixels[:count].transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{split}_y.bin")
    return tmp_path


def test_the_columns_of_the_file_become_rows(root, pixels):
    data = STL10(str(root), batch_size=4, num_workers=0)
    data.setup()
    train = data.samples("train")
    assert np.array_equal(train.images.numpy(), pixels)
    assert train.labels.tolist() == [*range(10), *range(10)]
    assert data.num_classes == 10
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 96, 96)
    assert data.samples("val") is data.samples("test")


def test_it_agrees_with_torchvision(root, monkeypatch):
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    theirs = datasets.STL10(str(root), split="test")
    ours = STL10(str(root)).samples("test")
    assert np.array_equal(ours.images.numpy(), theirs.data)
    assert ours.labels.tolist() == theirs.labels.tolist()


def test_validation_can_be_carved_from_training(root):
    data = STL10(str(root), val_size=0.5)
    assert torch.bincount(data.samples("val").labels).tolist() == [1] * 10


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no STL10 in .*train_X\.bin' is missing; set download=True"):
        STL10(str(tmp_path)).setup("fit")


def test_a_file_that_was_cut_short_is_named(root):
    path = root / "stl10_binary" / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"train_X\.bin .* has 552955 bytes, where the 20 labels .* need 552960"):
        STL10(str(root)).setup("fit")


def test_a_download_is_torchvisions(root, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "STL10", lambda root, split, download: calls.append((root, split, download)))
    STL10(str(root), download=True).prepare_data()
    assert calls == []
    STL10(str(tmp_path / "nowhere"), download=True).prepare_data()
    assert calls == [(str(tmp_path / "nowhere"), "test", True)]
