"""How an image becomes an input: torchvision's transforms on bytes, a crop and flip of whole batches, the normalisation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import floor

import torch
from timm.data import create_transform
from timm.data.constants import DEFAULT_CROP_PCT
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

INTERPOLATIONS = ("bilinear", "bicubic", "random")
Transform = Callable[[Tensor], Tensor]


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
    def only_crops_and_flips(self) -> bool:
        """Whether training needs nothing but a padded crop and a flip, which `augment_batch` does for a whole batch."""
        return self.padding is not None and not (self.color_jitter or self.auto_augment or self.re_prob)

    def train_transform(self) -> Transform:
        """From an image, uint8 `[C, H, W]`, to uint8 `[C, S, S]`; to normalized float32 where `re_prob` is above 0.

        timm's policies work on Pillow images, its random erasing on normalized floats, everything else on bytes.
        """
        if self.interpolation == "random":
            crop = v2.RandomChoice([self._train_crop("bilinear"), self._train_crop("bicubic")])
        else:
            crop = self._train_crop(self.interpolation)
        steps: list[Transform] = [crop, v2.RandomHorizontalFlip(self.hflip)]
        if self.auto_augment:
            _, policy, _ = create_transform(
                self.image_size,
                is_training=True,
                color_jitter=self.color_jitter or None,
                auto_augment=self.auto_augment,
                interpolation=self.interpolation,
                mean=self.mean,
                separate=True,
            )
            steps += [v2.ToPILImage(), policy, v2.PILToTensor()]
        elif self.color_jitter:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.re_prob:
            normalize = v2.Normalize(self.mean, self.std)
            steps += [v2.ToDtype(torch.float32, scale=True), normalize, RandomErasing(self.re_prob, device="cpu")]
        return v2.Compose(steps)

    def _train_crop(self, interpolation: str) -> Transform:
        mode = InterpolationMode(interpolation)
        if self.padding is None:
            return v2.RandomResizedCrop(self.image_size, self.scale, self.ratio, mode)
        return v2.Compose([v2.Resize(self.image_size, mode), v2.RandomCrop(self.image_size, self.padding)])

    def eval_transform(self) -> Transform:
        """From an image, uint8 `[C, H, W]`, to uint8 `[C, S, S]`: resized, and cropped at the centre."""
        mode = InterpolationMode("bilinear" if self.interpolation == "random" else self.interpolation)
        size = floor(self.image_size / (self.crop_pct or DEFAULT_CROP_PCT))
        return v2.Compose([v2.Resize(size, mode), v2.CenterCrop(self.image_size)])


def augment_batch(images: Tensor, padding: int, hflip: float, draws: Tensor) -> Tensor:
    """Crops every image at its own place out of its zero-padded self, and flips some left to right.

    Args:
        images: uint8 `[B, C, H, W]`.
        padding: pixels of black on each side.
        hflip: the probability of a flip.
        draws: three numbers an image, uniform in `[0, 1)`: of its flip, its top and its left; `[B, 3]`.

    Returns:
        uint8 `[B, C, H, W]`.
    """
    batch, _, height, width = images.shape
    flip = draws[:, 0] < hflip
    top, left = (draws[:, 1:] * (2 * padding + 1)).long().unbind(1)
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
        float32 `[B, C, H, W]`, contiguous, on the device of the images.
    """
    scale, shift = _scale_and_shift(mean, std, images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).sub_(shift)


@cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What bytes are multiplied by, and what is then subtracted: float32 `[C, 1, 1]`."""
    with torch.inference_mode(False):  # kept for training, too
        scale = torch.tensor(std).mul(255).reciprocal()
        shift = torch.tensor(mean) / torch.tensor(std)
    return scale[:, None, None].to(device), shift[:, None, None].to(device)
