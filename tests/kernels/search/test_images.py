"""Images from a folder: found, read lazily in batches of one size, and named where they do not serve."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from design_lightning.kernels.search import (
    ImageFolder,
    ImageTensor,
    SearchConfig,
    read_grey,
    read_image,
    search_kernels,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve noisy pictures in two sizes and three formats, in subfolders, among files that are no pictures."""
    generator = np.random.default_rng(0)
    for i in range(12):
        below = tmp_path / f"class{i % 2}"
        below.mkdir(exist_ok=True)
        pixels = generator.integers(0, 255, (10 + 4 * (i % 3 == 0), 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(below / f"{i}.{('png', 'JPG', 'webp')[i % 3]}")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / ".hidden" / "no.png")
    return tmp_path


def test_all_images_below_a_folder_are_found_in_an_order_of_the_seed(folder: Path) -> None:
    one, same, other = ImageFolder(folder), ImageFolder(folder), ImageFolder(folder, seed=1)
    assert len(one) == 12
    assert one.paths == same.paths
    assert one.paths != other.paths
    assert sorted(one.paths) == sorted(other.paths)
    assert ImageFolder(folder, limit=5).paths == one.paths[:5]


@pytest.mark.parametrize("pixels", [1, 300, 10_000])
def test_batches_hold_images_of_one_size_in_order(folder: Path, pixels: int) -> None:
    images = ImageFolder(folder)
    found, following = [], 0
    for first, batch in images.batches(pixels):
        assert first == following
        assert batch.numel() <= pixels or len(batch) == 1
        found += list(batch)
        following += len(batch)
    assert len(found) == 12
    assert all(image.equal(read_grey(path)) for image, path in zip(found, images.paths, strict=True))


def test_a_folder_is_searched_as_its_images(folder: Path) -> None:
    config = SearchConfig(filters=2, ties="off")
    assert search_kernels(folder, config).to_json() == search_kernels(str(folder), config).to_json()
    assert search_kernels(ImageFolder(folder, limit=7), config).images == 7


def test_a_large_image_is_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (400, 100), (255, 255, 255)).save(tmp_path / "wide.png")
    assert read_grey(tmp_path / "wide.png", 64).shape == (16, 64)
    assert read_grey(tmp_path / "wide.png").shape == (64, 256)
    assert read_grey(tmp_path / "wide.png").min() == 1


def test_sixteen_bits_are_the_image_of_eight(tmp_path: Path) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(pixels.astype(np.int32) * 257).save(tmp_path / "32.tif")
    for name in ("16.png", "32.tif"):
        assert read_grey(tmp_path / name).equal(read_grey(tmp_path / "8.png"))
        assert np.asarray(read_image(tmp_path / name, "RGB")).tolist() == np.stack([pixels] * 3, -1).tolist()
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(ValueError, match=r"real.tif' is no image that can be read: its numbers .*save it with 8"):
        read_grey(tmp_path / "real.tif")


def test_a_photo_is_upright(tmp_path: Path) -> None:
    image = Image.new("L", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_grey(tmp_path / "turned.jpg").shape == (20, 10)


@pytest.mark.parametrize(("size", "expected"), [(1, 6), (25, 6), (50, 3), (1000, 1)])
def test_a_tensor_comes_in_batches(size: int, expected: int) -> None:
    batches = list(ImageTensor(torch.rand(6, 5, 5)).batches(size))
    assert len(batches) == expected
    assert sum(len(batch) for _, batch in batches) == 6


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image folder '.*nowhere'"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no image: looked for .jpg"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image file '.*no.png'"):
        read_grey(tmp_path / "no.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png' is no image that can be read"):
        search_kernels(tmp_path)
    with pytest.raises(ValueError, match="limit is 0"):
        ImageFolder(tmp_path, limit=0)
    with pytest.raises(ValueError, match="max_side is 2"):
        ImageFolder(tmp_path, max_side=2)
    with pytest.raises(ValueError, match="max_side is -3"):
        read_grey(tmp_path / "broken.png", -3)
