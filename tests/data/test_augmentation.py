import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import pil_to_tensor

from design_lightning.data import FashionMNISTSubset
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
    augmented = augment_batch(images, padding=2, hflip=0.5, draws=torch.rand(len(images), 3))
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
    images, draws = torch.randint(0, 256, (8, 1, 6, 5), dtype=torch.uint8), torch.rand(8, 3)
    assert torch.equal(augment_batch(images, padding=0, hflip=0.0, draws=draws), images)
    assert torch.equal(augment_batch(images, padding=0, hflip=1.0, draws=draws), images.flip(3))


def test_bytes_are_normalized_as_timm_does():
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    options = augmentation()
    by_timm = create_transform(32, is_training=False, crop_pct=1.0, mean=options.mean, std=options.std)
    ours = normalize_batch(pixels[None], options.mean, options.std)
    torch.testing.assert_close(ours[0], by_timm(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
    assert ours.is_contiguous()


def photograph(height: int, width: int) -> Image.Image:
    """Real images side by side, enlarged, in colours of their own."""
    images = FashionMNISTSubset().samples("val").images[:48, 0].unflatten(0, (3, 4, 4))
    mosaic = images.permute(1, 3, 2, 4, 0).reshape(128, 128, 3).contiguous().numpy()
    return Image.fromarray(mosaic).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("image_size", "crop_pct"), [(224, None), (96, 1.0), (160, 0.95)])
@pytest.mark.parametrize("size", [(375, 500), (300, 200), (40, 60), (224, 224)])
def test_evaluation_gives_the_pixels_of_timm_and_pillow_but_for_rounding(size, image_size, crop_pct, interpolation):
    image = photograph(*size)
    options = {"crop_pct": crop_pct, "interpolation": interpolation}
    ours = augmentation(image_size=image_size, **options).eval_transform()(pil_to_tensor(image))
    theirs = create_transform(image_size, is_training=False, use_prefetcher=True, **options)(image)
    assert ours.dtype == theirs.dtype == torch.uint8
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() <= 0.1


def test_training_crops_colours_and_flips_as_timm_does():
    """In the mean over many draws, because the two draw from generators of their own."""
    image = photograph(90, 120)
    options = {"scale": (0.2, 0.6), "ratio": (0.5, 2.0), "hflip": 0.3, "color_jitter": 0.4}
    ours = augmentation(padding=None, **options).train_transform()
    theirs = create_transform(32, is_training=True, use_prefetcher=True, interpolation="bilinear", **options)

    def moments(draws: list[Tensor]) -> Tensor:
        images = torch.stack(draws).float()
        return torch.stack([images.mean(), images.std(), images.mean((1, 2, 3)).std(), images.std((1, 2, 3)).std()])

    draws = 1500
    torch.testing.assert_close(
        moments([ours(pil_to_tensor(image)) for _ in range(draws)]),
        moments([theirs(image) for _ in range(draws)]),
        rtol=0.06,
        atol=0,
    )


def test_colour_jitter_is_the_one_that_timm_builds():
    image = photograph(64, 64)
    *_, jitter = augmentation(color_jitter=0.4).train_transform().transforms
    theirs = ColorJitter(0.4, 0.4, 0.4)
    for seed in range(20):
        torch.manual_seed(seed)
        ours = jitter(pil_to_tensor(image))
        torch.manual_seed(seed)
        difference = ours.int() - pil_to_tensor(theirs(image)).int()
        assert difference.abs().max() <= 4, "each of three steps rounds"


def test_random_interpolation_draws_bilinear_or_bicubic_for_each_image():
    image = pil_to_tensor(photograph(90, 90))

    def results(interpolation: str, draws: int) -> set[bytes]:
        transform = augmentation(interpolation=interpolation, padding=0, hflip=0.0).train_transform()
        return {transform(image).numpy().tobytes() for _ in range(draws)}

    assert results("random", 20) == results("bilinear", 1) | results("bicubic", 1)
    assert results("bilinear", 1) != results("bicubic", 1)


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
        {"auto_augment": "3a", "color_jitter": 0.4, "re_prob": 1.0},
    ],
)
def test_train_transforms_give_the_input_size_in_colour_and_in_grey(options, mode):
    channels = len(mode) if mode == "RGB" else 1
    transform = augmentation(mean=(0.5,) * channels, std=(0.2,) * channels, **options).train_transform()
    image = torch.randint(0, 256, (channels, 50, 70), dtype=torch.uint8)
    before = image.clone()
    for _ in range(10):
        result = transform(image)
        assert result.shape == (channels, 32, 32)
        assert result.dtype == (torch.float32 if options.get("re_prob") else torch.uint8)
    assert torch.equal(image, before)


def test_erased_images_are_normalized_and_erased_by_their_mean_colour():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    options = augmentation(padding=0, hflip=0.0, re_prob=1.0)
    erased = options.train_transform()(image)
    whole = normalize_batch(image[None], options.mean, options.std)[0]
    hole = (erased != whole).any(0) & ~torch.isclose(erased, whole, atol=1e-5).all(0)
    assert 0 < hole.sum() < hole.numel()
    assert (erased[:, hole] == 0).all()
    torch.testing.assert_close(erased[:, ~hole], whole[:, ~hole])


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, True),
        ({"padding": 0}, True),
        ({"padding": None}, False),
        ({"auto_augment": "augmix-m3-w3"}, False),
        ({"re_prob": 0.1}, False),
        ({"color_jitter": 0.1}, False),
    ],
)
def test_only_a_padded_crop_and_flip_run_on_whole_batches(options, whole):
    assert augmentation(**options).only_crops_and_flips == whole


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
