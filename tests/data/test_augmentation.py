import pytest
import torch
from PIL import Image

from design_lightning.data.augmentation import Augmentation, augment_batch, normalize_batch


def augmentation(**options) -> Augmentation:
    defaults = {
        "image_size": 32,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "padding": 4,
        "scale": (0.5, 1.0),
        "ratio": (0.8, 1.2),
        "hflip": 0.5,
        "color_jitter": 0.0,
        "auto_augment": None,
        "re_prob": 0.0,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    return Augmentation(**{**defaults, **options})


def test_each_augmented_image_is_a_crop_of_the_padded_original_or_of_its_mirror():
    images = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    augmented = augment_batch(images, padding=2, hflip=0.5)
    found, flipped = set(), 0
    for image, result in zip(images, augmented, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        crops = {(y, x, f): padded[:, y : y + 6, x : x + 5] for y in range(5) for x in range(5) for f in (0, 1)}
        places = [place for place, crop in crops.items() if torch.equal(crop.flip(2) if place[2] else crop, result)]
        assert len(places) == 1
        found.add(places[0][:2])
        flipped += places[0][2]
    assert len(found) > 15, "the crops differ between images"
    assert 15 < flipped < 49


def test_no_padding_and_no_flip_change_nothing():
    images = torch.randint(0, 256, (8, 1, 6, 5), dtype=torch.uint8)
    assert torch.equal(augment_batch(images, padding=0, hflip=0.0), images)
    assert torch.equal(augment_batch(images, padding=0, hflip=1.0), images.flip(3))


def test_bytes_are_normalized_as_timm_does():
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    options = augmentation()
    by_timm = options.eval_transform()(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    ours = normalize_batch(pixels[None], options.mean, options.std)
    torch.testing.assert_close(ours[0], by_timm)
    assert ours.is_contiguous()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": None},
        {"interpolation": "random"},
        {"interpolation": "bicubic", "padding": None, "color_jitter": 0.4, "re_prob": 1.0},
        {"auto_augment": "rand-m9-mstd0.5"},
        {"auto_augment": "augmix-m3-w3", "padding": None},
    ],
)
def test_train_transforms_give_the_input_size_in_colour_and_in_grey(options, mode):
    channels = len(mode) if mode == "RGB" else 1
    transform = augmentation(mean=(0.5,) * channels, std=(0.2,) * channels, **options).train_transform()
    image = Image.fromarray(torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8).numpy()).convert(mode)
    for _ in range(10):
        result = transform(image)
        assert result.shape == (channels, 32, 32)
        assert result.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "on_bytes"),
    [
        ({}, True),
        ({"padding": 0}, True),
        ({"padding": None}, False),
        ({"auto_augment": "augmix-m3-w3"}, False),
        ({"re_prob": 0.1}, False),
        ({"color_jitter": 0.1}, False),
    ],
)
def test_only_a_padded_crop_and_flip_run_on_bytes(options, on_bytes):
    assert augmentation(**options).trains_on_bytes == on_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, "padding=-1"),
        ({"hflip": 1.5}, r"hflip=1.5"),
        ({"re_prob": -0.1}, r"re_prob=-0.1"),
        ({"crop_pct": 0.0}, r"crop_pct=0.0"),
        ({"interpolation": "cubic"}, "interpolation='cubic' must be one of bilinear, bicubic, random"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        augmentation(**options)
