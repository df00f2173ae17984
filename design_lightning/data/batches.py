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
from design_lightning.data.reading import ImageReader
from design_lightning.data.samples import Samples, TensorSamples
from design_lightning.data.sampling import IGNORE_LABEL

Seeds = np.ndarray
"""One seed an image: uint64 `[B]`."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def as_is(batch: Any) -> Any:
    """The `collate_fn` for a dataset whose `__getitems__` returns batches."""
    return batch


class Batches(Dataset):
    """Images of `samples`, cropped and augmented by a subclass's `images`; those that have none are labelled `IGNORE_LABEL`."""

    reader: ImageReader | None = None
    """Keeps account of damaged images, where any can be."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def images(self, indices: Sequence[int], seeds: Seeds | None = None) -> tuple[Tensor, Tensor]:
        """The images at `indices`, each augmented by draws that follow from its own seed; without seeds by any draws.

        Returns:
            uint8 `[B, C, H, W]`, or float32, normalized; and int64 `[B]`: the sample of each image, -1 for none.
        """
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int], seeds: Seeds | None = None) -> tuple[Tensor, Tensor]:
        images, places = self.images(indices, seeds)
        return images, self.samples.labels[places].masked_fill(places < 0, IGNORE_LABEL)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class TransformedBatches(Batches):
    """Every image decoded and passed through a transform.

    A damaged image is left out without a batch becoming smaller, as other processes wait for equally many. In training the next
    readable one stands in for it, with its own label, so that no loss, mixing or metric has to know; which one depends on the
    files alone. In evaluation, where each image counts once, it becomes black and has no sample.

    Args:
        reader: of the images.
        transform: from uint8 `[C, H, W]` to what is stacked.
        training: whether the next image stands in for a damaged one.
    """

    reader: ImageReader

    def __init__(self, reader: ImageReader, transform: Transform, training: bool) -> None:
        super().__init__(reader.samples)
        self.reader = reader
        self.transform = transform
        self.training = training

    def images(self, indices: Sequence[int], seeds: Seeds | None = None) -> tuple[Tensor, Tensor]:
        """uint8 `[B, C, S, S]`, or float32, as the transform gives them; and int64 `[B]`."""
        images, places = [], []
        for number, index in enumerate(indices):
            place, pixels = self._image(index)
            if seeds is not None:
                _seed_generators(int(seeds[number]))
            images.append(self.transform(pixels))
            places.append(place)
        return torch.stack(images), torch.tensor(places)

    def _image(self, index: int) -> tuple[int, Tensor]:
        if self.training:
            found = self.reader.read_next(index)
            if found is not None:
                return found
        elif (pixels := self.reader.read(index)) is not None:
            return index, pixels
        return -1, torch.zeros(self.reader.channels, 32, 32, dtype=torch.uint8)


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

    def images(self, indices: Sequence[int], seeds: Seeds | None = None) -> tuple[Tensor, Tensor]:
        """uint8 `[B, C, H, W]`, and the indices, int64 `[B]`."""
        places = torch.as_tensor(indices)
        images = self._pixels[places]
        if self.padding is None:
            return images, places
        draws = torch.rand(len(images), 3) if seeds is None else torch.from_numpy(uniforms(seeds, 3))
        return augment_batch(images, self.padding, self.hflip, draws), places


class SeededBatches(Dataset):
    """Batches whose random transforms of an image depend on the seed, the epoch and the image, and on nothing else.

    Neither the number of processes, the size of their batches, the number of workers nor a resume within an epoch changes them.

    Args:
        batches: N samples, augmented by draws from seeds, or from the global generators of torch (CPU), numpy and Python.
        seed: of the draws.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self.batches = batches
        self.reader = batches.reader
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
    torch.default_generator.manual_seed(seed >> 1)  # `torch.manual_seed` asks every kind of device, which takes longer
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
        self.reader = batches.reader

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
    """The same images with their names in place of their labels: `([B, C, H, W], list of B strings)`, without damaged ones."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.reader = batches.reader

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        images, places = self.batches.images(indices)
        readable = places >= 0
        if not readable.all():
            images, places = images[readable], places[readable]
        return images, [self.batches.samples.name(place) for place in places.tolist()]

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        images, names = self.__getitems__([index])
        return images[0], names[0]
