import gzip
import importlib.util
import os
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from design_lightning.data import FashionMNIST, FashionMNISTSubset
from design_lightning.data.idx import read_idx, write_idx

EMBEDDED = resources.files("design_lightning.data") / "fashion_mnist_subset"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_fashion_mnist_subset.py"
SOURCE = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
needs_source = pytest.mark.skipif(
    not SOURCE.is_dir(),
    reason=f"{SOURCE} is missing: install Debian's dataset-fashion-mnist, or set FASHION_MNIST to the folder of its files",
)


def make_source(folder: Path, train: int = 40, test: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(1, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return folder


def load_script():
    spec = importlib.util.spec_from_file_location("make_fashion_mnist_subset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_embedded_subset_is_small_balanced_and_licensed():
    data = FashionMNISTSubset()
    assert torch.bincount(data.samples("train").labels).tolist() == [600] * 10
    assert torch.bincount(data.samples("val").labels).tolist() == [100] * 10
    assert sum(len(file.read_bytes()) for file in EMBEDDED.iterdir()) < 4_000_000
    assert "Copyright (c) 2017 Zalando SE" in (EMBEDDED / "LICENSE").read_text()


def test_the_embedded_images_are_normalized_to_about_zero_and_one():
    data = FashionMNISTSubset(image_size=28, padding=0, batch_size=6000)
    images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (6000, 1, 28, 28)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_32_pixels_have_a_black_border(channels):
    data = FashionMNISTSubset(channels=channels)
    images = data.samples("train").images
    assert images.shape == (6000, *data.input_size) == (6000, channels, 32, 32)
    assert images[:, :, :2].max() == images[:, :, :, -2:].max() == 0
    batch, _ = next(iter(data.train_dataloader()))
    assert batch.shape == (128, channels, 32, 32)
    assert torch.equal(batch[:, 0], batch[:, -1])


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="channels=2 must be 1"):
        FashionMNISTSubset(channels=2)


def test_the_order_of_the_classes_is_that_of_torchvision():
    assert FashionMNISTSubset().class_names == tuple(datasets.FashionMNIST.classes)


@pytest.mark.parametrize("layout", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("gzipped", [True, False])
def test_the_whole_data_set_is_read_from_either_layout(tmp_path, layout, gzipped):
    folder = make_source(tmp_path / layout)
    if not gzipped:
        for path in folder.glob("*.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    data = FashionMNIST(str(tmp_path), val_size=20)
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [20, 20, 20]


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no FashionMNIST in .*train-labels-idx1-ubyte.*download=True"):
        FashionMNIST(str(tmp_path)).setup("fit")


def test_a_split_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="the test split of FashionMNIST has no images"):
        FashionMNIST(str(make_source(tmp_path, test=0))).setup("test")


def test_a_download_is_torchvisions(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "FashionMNIST", lambda root, download: calls.append((root, download)))
    FashionMNIST(str(make_source(tmp_path / "here")), download=True).prepare_data()
    assert calls == []
    FashionMNIST(str(tmp_path / "nowhere"), download=True).prepare_data()
    assert calls == [(str(tmp_path / "nowhere"), True)]


@pytest.mark.parametrize("content", [b"", b"no data", b"\0\0\x0d\x01\0\0\0\0"])
def test_a_file_of_another_format_is_named(tmp_path, content):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="labels is no IDX file of bytes"):
        read_idx(path)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(b"\0\0\x08\x01\0\0\0\x05abc")
    with pytest.raises(ValueError, match="labels holds 3 bytes, where its header promises 5"):
        read_idx(path)


def test_the_script_writes_the_same_bytes_again(tmp_path):
    script, source = load_script(), make_source(tmp_path / "source", train=7000, test=1500)
    written = []
    for output, seed in ((tmp_path / "first", 0), (tmp_path / "second", 0), (tmp_path / "third", 1)):
        script.make_subset(source, output, seed)
        written.append({path.name: path.read_bytes() for path in sorted(output.iterdir())})
    assert len(written[0]) == 4
    assert written[0] == written[1]
    assert written[0] != written[2]


@needs_source
def test_the_script_makes_the_embedded_subset(tmp_path):
    load_script().make_subset(SOURCE, tmp_path, seed=0)
    made = sorted(tmp_path.iterdir())
    assert len(made) == 4
    for path in made:
        embedded = EMBEDDED / path.name
        assert np.array_equal(read_idx(path), read_idx(embedded)), path.name
        assert path.read_bytes() == embedded.read_bytes(), (
            f"{path.name} holds the same data, compressed by another zlib"
        )
