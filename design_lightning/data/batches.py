"""Datasets that answer a list of indices with a whole batch; the loaders of `ImageData` read these.

torch's `DataLoader` hands all indices of a batch to `__getitems__` where there is one. What that returns is already the
batch, so these go with `collate_fn=as_is`.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from design_lightning.data.augmentation import Transform, augment_batch
from design_lightning.data.samples import Samples, TensorSamples
from design_lightning.data.sampling import IGNORE_LABEL

Seeds = np.ndarray
"""One seed an image: uint64 `[B]`."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def as_is(batch: Any) -> Any:
    """The `collate_fn` for a dataset whose `__getitems__` returns batches."""
    return batch


class Batches(Dataset):
    """Images of `samples`, cropped and augmented by a subclass's `images`."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def images(self, indices: Sequence[int], seeds: Seeds | None = None) -> Tensor:
        """The images at `indices`, each augmented by draws that follow from its own seed; without seeds by any draws.

        Returns:
            uint8 `[B, C, H, W]`, or float32, normalized.
        """
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int], seeds: Seeds | None = None) -> tuple[Tensor, Tensor]:
        return self.images(indices, seeds), self.samples.labels[torch.as_tensor(indices)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class TransformedBatches(Batches):
    """Every image decoded and passed through a transform.

    Args:
        samples: the images.
        transform: from uint8 `[C, H, W]` to what is stacked.
        channels: C, which is 1 or 3.
    """

    def __init__(self, samples: Samples, transform: Transform, channels: int) -> None:
        super().__init__(samples)
        self.transform = transform
        self.channels = channels

    def images(self, indices: Sequence[int], seeds: Seeds | None = None) -> Tensor:
        """uint8 `[B, C, S, S]`, or float32, as the transform gives them."""
        images = []
        for place, index in enumerate(indices):
            if seeds is not None:
                _seed_generators(int(seeds[place]))
            images.append(self.transform(self.samples.pixels(index, self.channels)))
        return torch.stack(images)


class TensorBatches(Batches):
    """Images in memory, cropped and flipped a batch at a time, without a loop over images.

    Args:
        samples: the images.
        padding: of the random crop, in pixels; None neither crops nor flips.
        hflip: the probability of a flip.
    """

    def __init__(self, samples: TensorSamples, padding: int | None = None, hflip: float = 0.0) -> None:
        super().__init__(samples)
        self._pixels = samples.images
        self.padding, self.hflip = padding, hflip

    def images(self, indices: Sequence[int], seeds: Seeds | None = None) -> Tensor:
        """uint8 `[B, C, H, W]`."""
        images = self._pixels[torch.as_tensor(indices)]
        if self.padding is None:
            return images
        draws = torch.rand(len(images), 3) if seeds is None else torch.from_numpy(uniforms(seeds, 3))
        return augment_batch(images, self.padding, self.hflip, draws)


class SeededBatches(Dataset):
    """Batches whose random transforms of an image depend on the seed, the epoch and the image, and on nothing else.

    Neither the number of processes, the size of their batches, the number of workers nor a resume within an epoch changes them.

    Args:
        batches: N samples, augmented by draws from seeds, or from the global generators of torch (CPU), numpy and Python.
        seed: of the draws.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches = batches
        self.seed = seed

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The batch at places of an `EpochSampler`: `epoch * N + index`."""
        count = len(self.batches)
        seeds = image_seeds(self.seed, np.asarray(places) // count, np.asarray(places) % count)
        with _generators_kept():
            return self.batches.__getitems__([place % count for place in places], seeds)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([place])
        return images[0], labels[0]


def image_seeds(seed: int, epochs: np.ndarray, indices: np.ndarray) -> Seeds:
    """A 64-bit seed for each of B images, uint64 `[B]`, of a seed and the images' epochs and indices, int64 `[B]`."""
    mixed = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    for numbers in (epochs, indices):
        mixed = splitmix64(mixed ^ numbers.astype(np.uint64))
    return mixed


def uniforms(seeds: Seeds, count: int) -> np.ndarray:
    """So many draws from `[0, 1)` for each of B seeds: float64 `[B, count]`."""
    states = seeds[:, None] + np.arange(count, dtype=np.uint64) * GOLDEN
    return (splitmix64(states) >> np.uint64(11)) * 2.0**-53


def splitmix64(states: Seeds) -> Seeds:
    """The numbers that a generator gives in these states, uint64 alike; for many images at once, where seeding a generator takes
    microseconds an image.

    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    z = states + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(
        seed >> 1
    )  # `torch.manual_seed` asks for every kind of device, which takes longer
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Afterwards the global generators go on as if nothing had been drawn."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class PaddedBatches(Dataset):
    """A dataset that answers indices past its end with its first image and `IGNORE_LABEL`; see `PaddedEvalSampler`.

    Args:
        batches: the N real samples.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        asked = torch.as_tensor(indices)
        padding = asked >= len(self.batches)
        images, labels = self.batches.__getitems__(asked.masked_fill(padding, 0).tolist())
        return images, labels.masked_fill(padding, IGNORE_LABEL)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class NamedBatches(Dataset):
    """The same images with their names in place of their labels: `([B, C, H, W], list of B strings)`."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        return self.batches.images(indices), [self.batches.samples.name(index) for index in indices]

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        images, names = self.__getitems__([index])
        return images[0], names[0]
