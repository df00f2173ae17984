"""An image file as bytes: torchvision's decoders give Pillow's pixels, and Pillow decodes the rest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from design_lightning.data import FashionMNISTSubset
from design_lightning.data.samples import FileSamples, TensorSamples, numbered

WIDTH, HEIGHT = 75, 50  # no multiple of a JPEG's blocks


def photograph() -> Image.Image:
    """Real images in the three channels, and noise."""
    images = FashionMNISTSubset(image_size=28).samples("val").images[:3, 0].permute(1, 2, 0).numpy()
    enlarged = np.asarray(Image.fromarray(images).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(int)
    noise = np.random.default_rng(0).integers(-20, 20, enlarged.shape)
    return Image.fromarray(np.clip(enlarged + noise, 0, 255).astype(np.uint8))


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16))


def animation(path: Path) -> None:
    photograph().save(path, save_all=True, append_images=[photograph().rotate(180)])


Save = Callable[[Path], None]
KINDS: dict[str, Save] = {
    "jpeg.jpg": lambda path: photograph().save(path),
    "jpeg_444.jpg": lambda path: photograph().save(path, quality=95, subsampling=0),
    "progressive.jpg": lambda path: photograph().save(path, progressive=True),
    "grey.jpg": lambda path: photograph().convert("L").save(path),
    "cmyk.jpg": lambda path: photograph().convert("CMYK").save(path),
    "rgb.png": lambda path: photograph().save(path),
    "rgba.png": lambda path: with_alpha(photograph()).save(path),
    "grey.png": lambda path: photograph().convert("L").save(path),
    "grey_alpha.png": lambda path: with_alpha(photograph().convert("L")).save(path),
    "palette.png": lambda path: photograph().quantize(16).save(path),
    "transparent_palette.png": lambda path: photograph().quantize(64).save(path, transparency=3),
    "one_bit.png": lambda path: photograph().convert("1").save(path),
    "sixteen_bits.png": lambda path: sixteen_bits().save(path),
    "lossy.webp": lambda path: photograph().save(path),
    "rgba.webp": lambda path: with_alpha(photograph()).save(path),
    "animated.webp": animation,
    "animated.gif": animation,
    "still.gif": lambda path: photograph().save(path),
    "bitmap.bmp": lambda path: photograph().save(path),
    "strips.tiff": lambda path: photograph().save(path),
    "called_a.png": lambda path: photograph().save(path, format="JPEG"),
}


def one_file(path: Path) -> FileSamples:
    return FileSamples(str(path.parent), [path.name], torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_pillow(tmp_path, kind, channels):
    KINDS[kind](tmp_path / kind)
    pixels = one_file(tmp_path / kind).pixels(0, channels)
    with Image.open(tmp_path / kind) as image:
        expected = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (channels, HEIGHT, WIDTH)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["jpeg.jpg", "rgb.png", "lossy.webp", "bitmap.bmp"])
def test_a_damaged_file_is_named(tmp_path, kind, channels):
    path = tmp_path / kind
    KINDS[kind](path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=rf"cannot read the image .*{kind}: "):
        one_file(path).pixels(0, channels)


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b""), lambda path: path.mkdir(), lambda path: None])
def test_what_is_no_file_or_empty_is_named(tmp_path, write):
    write(tmp_path / "image.jpg")
    with pytest.raises(OSError, match=r"cannot read the image .*image\.jpg: "):
        one_file(tmp_path / "image.jpg").pixels(0, 3)


def test_an_unknown_format_is_said_without_the_buffer(tmp_path):
    (tmp_path / "no.jpg").write_text("text")
    with pytest.raises(OSError, match=r"cannot read the image .*no\.jpg: it is no image of a known format$"):
        FileSamples(str(tmp_path), ["no.jpg"], torch.tensor([0])).pixels(0, 3)


def test_a_name_that_is_no_text_is_read_too(tmp_path):
    path = Path(str(tmp_path)) / "caf\udce9.jpg"  # Latin-1 bytes, as an old archive may have
    photograph().save(tmp_path / "image.jpg")
    (tmp_path / "image.jpg").rename(path)
    assert one_file(path).pixels(0, 3).shape == (3, HEIGHT, WIDTH)


def test_images_in_memory_give_themselves_and_their_grey_in_three_channels():
    images = torch.randint(0, 256, (2, 1, 4, 5), dtype=torch.uint8)
    samples = TensorSamples(images, torch.zeros(2, dtype=torch.int64), numbered("val", 2))
    assert torch.equal(samples.pixels(1, 1), images[1])
    assert torch.equal(samples.pixels(1, 3), images[1].expand(3, -1, -1))
