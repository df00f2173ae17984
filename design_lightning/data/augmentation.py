"""How an image becomes an input: timm's transforms on Pillow images, or a crop and flip on whole batches of bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

INTERPOLATIONS = ("bilinear", "bicubic", "random")


@dataclass(frozen=True)
class Augmentation:
    """The transform options of `ImageData`, which documents them.

    Raises:
        ValueError: if an option is out of range; names it.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int | None
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    color_jitter: float
    auto_augment: str | None
    re_prob: float
    crop_pct: float | None
    interpolation: str

    def __post_init__(self) -> None:
        if self.padding is not None and self.padding < 0:
            raise ValueError(f"padding={self.padding} must be at least 0, or null for a random resized crop")
        for name, probability in (("hflip", self.hflip), ("re_prob", self.re_prob)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}={probability} is a probability: it must be in 0..1")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct} must be above 0 and at most 1, or null for timm's 0.875")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={self.interpolation!r} must be one of {', '.join(INTERPOLATIONS)}")

    @property
    def trains_on_bytes(self) -> bool:
        """Whether training needs nothing but a padded crop and a flip, which `augment_batch` does for a whole batch."""
        return self.padding is not None and not (self.color_jitter or self.auto_augment or self.re_prob)

    def train_transform(self) -> Any:
        """A timm transform from a Pillow image to float `[C, H, W]`, normalized."""
        crop_and_flip, colour, finish = create_transform(
            self.image_size,
            is_training=True,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment,
            re_prob=self.re_prob,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            separate=True,
        )
        if self.padding is not None:
            resampling = InterpolationMode.BILINEAR if self.interpolation == "random" else self.interpolation
            crop_and_flip = transforms.Compose(
                [
                    transforms.Resize(self.image_size, InterpolationMode(resampling)),
                    transforms.RandomCrop(self.image_size, self.padding),
                    transforms.RandomHorizontalFlip(self.hflip),
                ]
            )
        return transforms.Compose([crop_and_flip, colour, finish])

    def eval_transform(self) -> Any:
        """A timm transform from a Pillow image to float `[C, H, W]`: resized, cropped at the centre, normalized."""
        return create_transform(
            self.image_size,
            is_training=False,
            crop_pct=self.crop_pct,
            interpolation="bilinear" if self.interpolation == "random" else self.interpolation,
            mean=self.mean,
            std=self.std,
        )


def augment_batch(images: Tensor, padding: int, hflip: float, generator: torch.Generator | None = None) -> Tensor:
    """Crops every image at its own place out of its zero-padded self, and flips some left to right.

    Args:
        images: uint8 `[B, C, H, W]`.
        padding: pixels of black on each side.
        hflip: the probability of a flip.
        generator: of the draws; None draws from torch's global one.

    Returns:
        uint8 `[B, C, H, W]`.
    """
    batch, _, height, width = images.shape
    flip = torch.rand(batch, generator=generator) < hflip
    top = torch.randint(2 * padding + 1, (batch,), generator=generator)
    left = torch.randint(2 * padding + 1, (batch,), generator=generator)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = torch.arange(batch)
    # Channels last, so that one index moves all channels of a pixel.
    pixels = padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def normalize_batch(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bytes to floats: `(images / 255 - mean) / std`.

    Args:
        images: uint8 `[B, C, H, W]`.
        mean: C values, of pixels in 0..1.
        std: C values.

    Returns:
        float32 `[B, C, H, W]`, contiguous.
    """
    scale = torch.tensor(std).mul(255).reciprocal()[:, None, None]
    shift = (torch.tensor(mean) / torch.tensor(std))[:, None, None]
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).sub_(shift)
