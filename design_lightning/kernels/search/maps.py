"""The maps that a search thresholds: simulated from images, as the authors of DeSign did."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from design_lightning.kernels.search.alphabet import Alphabet
from design_lightning.kernels.search.images import Images

Reference = Literal["relu", "grey"]
Progress = Callable[[int, int], None]
PIXELS = 1 << 21
"""How many values of maps are looked at in one go: about 200 MB of work space."""


@dataclass(frozen=True)
class MapBatch:
    """Some maps of some images.

    Args:
        values: [B, C, H, W], what is compared with the levels.
        reference: [B, C, H, W] or [B, 1, H, W], the full-precision map of the scores, with 1 for the highest level.
        units: [C], the unit (filter, or layer) of each channel. Scores are averaged over units.
        images: [B], the number of each image.
    """

    values: Tensor
    reference: Tensor
    units: Tensor
    images: Tensor


class Maps(Protocol):
    """Maps that can be gone through several times."""

    @property
    def units(self) -> Sequence[str]:
        """The name of each unit."""
        ...

    @property
    def image_count(self) -> int:
        """How many images there are."""
        ...

    def __iter__(self) -> Iterator[MapBatch]: ...


class SimulatedMaps:
    """Binarized images after random filters: SPEC's procedure.

        b = +1 where grey >= mean(grey) of the image, else -1;   map = ReLU(conv3x3(b, f)), f a filter of random +-1

    The convolution has no padding, so that a map is two pixels smaller than its image and takes the values 0, 1, 3, 5, 7, 9.
    For an alphabet in standard deviations the convolution is standardised filter by filter over all images, as a batch norm
    would, and comes without ReLU.

    Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.

    Args:
        images: gone through once, and a time before to standardise.
        alphabet: whose domain the maps have.
        reference: `relu`: the map after ReLU, divided by the highest level. `grey`: the image, without its border.
        filters: how many random filters for each seed.
        seeds: of the filters. A unit is a filter of a seed.
        device: where to compute.
        progress: of the time before: called with the number of images done and of all.

    Raises:
        ValueError: while reading, if an image is smaller than the filter, or all images are constant.
    """

    def __init__(
        self,
        images: Images,
        alphabet: Alphabet,
        reference: Reference = "relu",
        filters: int = 16,
        seeds: Sequence[int] = (0,),
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self._images = images
        self._progress = progress
        self._alphabet = alphabet
        self._reference = reference
        self._device = device
        self.filters = torch.cat([random_filters(filters, seed) for seed in seeds])
        self.units = [f"seed {seed}, filter {i}" for seed in seeds for i in range(filters)]
        self.image_count = len(images)

    def __iter__(self) -> Iterator[MapBatch]:
        standardised = self._alphabet.standardised
        mean, deviation = self._standardisation() if standardised else (torch.empty(0), torch.empty(0))
        for first, grey, chosen, convolved in self._convolved():
            values = (convolved - mean[chosen]) / deviation[chosen] if standardised else convolved.relu()
            reference = grey[:, None, 1:-1, 1:-1] if self._reference == "grey" else values.relu() / self._alphabet.peak
            images = torch.arange(first, first + len(grey))
            yield MapBatch(values, reference, torch.arange(chosen.start, chosen.stop), images)

    def _convolved(self) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
        """The first image's number, grey images, the filters used, and what they give [B, C, H - 2, W - 2]."""
        for first, images in self._images.batches(PIXELS // 4):
            if min(images.shape[1:]) < 3:
                height, width = images.shape[1:]
                raise ValueError(f"image {first} has {height}x{width} pixels, but the filters need 3x3; leave it out")
            grey = images.to(self._device)
            binary = binarized(grey).unsqueeze(1)
            step = max(1, PIXELS // grey.numel())
            for start in range(0, len(self.filters), step):
                chosen = slice(start, min(start + step, len(self.filters)))
                yield first, grey, chosen, F.conv2d(binary, self.filters[chosen].to(self._device))

    def _standardisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each filter over all images: [C, 1, 1]."""
        sums = torch.zeros(3, len(self.filters), dtype=torch.float64)
        for first, grey, chosen, convolved in self._convolved():
            exact = convolved.double()
            sums[0, chosen] += exact[:, 0].numel()
            sums[1, chosen] += exact.sum((0, 2, 3)).cpu()
            sums[2, chosen] += exact.square().sum((0, 2, 3)).cpu()
            if self._progress is not None:
                self._progress(first + len(grey), self.image_count)
        mean = sums[1] / sums[0]
        deviation = (sums[2] / sums[0] - mean.square()).clamp_min(0).sqrt()
        if not bool((deviation > 0).all()):
            raise ValueError("every image is constant, so its maps have no standard deviation; use other images")
        shape = (-1, 1, 1)
        return mean.float().view(shape).to(self._device), deviation.float().view(shape).to(self._device)


def random_filters(count: int, seed: int) -> Tensor:
    """Filters [count, 1, 3, 3] of random +-1."""
    bits = torch.randint(0, 2, (count, 1, 3, 3), generator=torch.Generator().manual_seed(seed))
    return bits.float() * 2 - 1


def binarized(grey: Tensor) -> Tensor:
    """+1 where a grey image [..., H, W] is at least its own mean, else -1."""
    return torch.where(grey >= grey.double().mean((-2, -1), keepdim=True), 1.0, -1.0)
