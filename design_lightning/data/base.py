"""The data module that every data set here extends: splits, transforms and loaders."""

from abc import ABC, abstractmethod
from collections.abc import Sized
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from design_lightning.data.augmentation import Augmentation, normalize_batch
from design_lightning.data.batches import (
    Batches,
    NamedBatches,
    PaddedBatches,
    SeededBatches,
    TensorBatches,
    TransformedBatches,
    as_is,
)
from design_lightning.data.folders import unlabelled_images
from design_lightning.data.reading import ImageLoader, ImageReader
from design_lightning.data.samples import Samples, TensorSamples
from design_lightning.data.sampling import (
    EpochSampler,
    PaddedEvalSampler,
    ResumableLoader,
    leave_sigterm_to_parent,
    stratified_split,
)

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}


class ImageData(LightningDataModule, ABC):
    """Loaders for image classification; subclasses say where the images are.

    Training, validation and test batches are `(images, labels)`: uint8 `[B, C, H, W]` and int64 `[B]`. Prediction batches
    are `(images, names)`, the names a list of B paths (`val/000123` where the images are not files). A Trainer that is given
    this data module calls `on_after_batch_transfer`, so its model gets float32 images, normalized on the device they were
    moved to; who reads a loader without a Trainer calls `normalize`.

    With several processes the evaluation loaders pad the last batches by samples labelled -100 (`IGNORE_LABEL`), so
    that each process has equally many; a model that masks negative labels counts every image once.

    Training order follows from `seed` and the epoch that Lightning sets, and the augmentation of an image from these and the image:
    neither the number of workers nor that of processes changes them. Two processes of 64 images a batch train on the batches of one
    with 128. A run that is resumed within an epoch goes on with the next batch.

    Image files are decoded and transformed by torchvision; the policies of `auto_augment` are timm's. Images held in memory
    that need only a padded crop and a flip are augmented a batch at a time, several times faster.

    An image that cannot be read (missing, cut short, no image, of an absurd size) is left out, counted once and named in a
    warning: in training the next one of the split stands in for it, in evaluation it is labelled -100, in prediction it has no
    row. Where images are held in memory it is an error.

    Args:
        batch_size: images a batch, in each process.
        num_workers: processes that load images, for each training process and loader; 0 loads in the training process.
        image_size: height and width of the model's input, in pixels.
        padding: crop `image_size` pixels at random out of the image padded by this many black pixels on each side
            (CIFAR's way); null crops and resizes a random part (`scale`, `ratio`: ImageNet's way).
        scale: range of the area of the random part, as a fraction of the image.
        ratio: range of the aspect ratio of the random part.
        hflip: probability that a training image is flipped left to right.
        color_jitter: strength of timm's random brightness, contrast and saturation; 0 for none. timm leaves it out
            where `auto_augment` is set.
        auto_augment: timm's policy string, for example `rand-m9-mstd0.5` or `augmix-m3-w3`; null for none.
        re_prob: probability of erasing a random rectangle of a training image. timm erases it from normalized images, so
            above 0 the training loader yields float32.
        crop_pct: for evaluation the shorter side is resized to `image_size / crop_pct` and the centre is cropped; null
            is timm's 0.875.
        interpolation: of every resize: `bilinear`, `bicubic`, or `random` (for training only; evaluation is bilinear
            then).
        mean: subtracted from pixels in 0..1, one value a channel.
        std: the pixels are divided by it, one value a channel, above 0.
        val_size: carve a validation split from the training images, with the same share of each class: a number of
            images, or a fraction below 1; null uses the data set's own validation images, or its test images where it
            has no others.
        predict_root: `predict` reads all images below this folder; null reads the validation images.
        seed: of the validation split, the training order and the augmentation.
        drop_last: leave out the last training batch of an epoch if it is smaller.
        pin_memory: load into page-locked memory; null does where there is a CUDA device.
        max_damaged: the share of the images of a split that may be damaged, from 0 to 1; one more and the run ends. 0 ends it at
            the first, and all of a split at any. Prediction ends where all are damaged.

    Raises:
        ValueError: if an argument is out of range.
    """

    channels: int = 3

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 2,
        image_size: int = 224,
        padding: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        crop_pct: float | None = None,
        interpolation: str = "bilinear",
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        val_size: int | float | None = None,
        predict_root: str | None = None,
        seed: int = 0,
        drop_last: bool = True,
        pin_memory: bool | None = None,
        max_damaged: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", image_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.channels:
                raise ValueError(
                    f"{name}={values} has {len(values)} values, where images have {self.channels} channels"
                )
        if not 0 <= max_damaged <= 1:
            raise ValueError(f"max_damaged={max_damaged} is a share of the images: it must be in 0..1")
        if min(std) <= 0:
            raise ValueError(f"std={std} must be above 0 in every channel, because pixels are divided by it")
        if val_size is not None and not (val_size > 0 and (isinstance(val_size, int) or val_size < 1)):
            raise ValueError(
                f"val_size={val_size} must be a number of images (5000), a fraction between 0 and 1 (0.1), or null"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.val_size = val_size
        self.predict_root = predict_root
        self.seed = seed
        self.drop_last = drop_last
        self.pin_memory = pin_memory
        self.max_damaged = max_damaged
        self.readers: dict[str, ImageReader] = {}
        """Of each split whose images are decoded as they are needed; they know the damaged ones."""
        self.augmentation = Augmentation(
            image_size,
            self.mean,
            self.std,
            padding,
            scale,
            ratio,
            hflip,
            color_jitter,
            auto_augment,
            re_prob,
            crop_pct,
            interpolation,
        )
        self._samples: dict[str, Samples] = {}
        self._place: dict[str, Any] | None = None

    @abstractmethod
    def _find_class_names(self) -> tuple[str, ...]:
        """The class names in the order of the labels, found without opening an image."""

    @abstractmethod
    def _load(self, split: str) -> Samples:
        """The data set's own split; `val` is only asked for where `val_size` is None."""

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in the order of the labels. Opens no image; raises what finding the data raises."""
        return self._find_class_names()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """`(C, H, W)` of a model's input."""
        return self.channels, self.image_size, self.image_size

    def samples(self, split: str) -> Samples:
        """The images and labels of `train`, `val` or `test` before any transform; loaded once, then kept.

        Raises:
            FileNotFoundError: if the data set is missing; says how to get it.
            ValueError: if there is no such split, a label is out of range, or a class has no training image.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; use {', '.join(SPLITS)}")
        if split not in self._samples:
            if self.val_size is not None and split != "test":
                whole = self._checked("train", self._load("train"))
                kept, held_out = stratified_split(whole.labels, self.val_size, self.seed, self.class_names)
                self._samples["train"], self._samples["val"] = whole.subset(kept), whole.subset(held_out)
            else:
                self._samples[split] = self._checked(split, self._load(split))
        return self._samples[split]

    def _checked(self, split: str, samples: Samples) -> Samples:
        if not len(samples):
            raise ValueError(f"the {split} split of {type(self).__name__} has no images")
        outside = samples.labels[(samples.labels < 0) | (samples.labels >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"{len(outside)} labels of the {split} split are not in 0..{self.num_classes - 1}, for example {int(outside[0])}"
            )
        empty = (torch.bincount(samples.labels, minlength=self.num_classes) == 0).nonzero()[:, 0].tolist()
        if split == "train" and empty:
            raise ValueError(
                f"no training image of class {', '.join(repr(self.class_names[label]) for label in empty)}"
            )
        return samples

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits of `fit`, `validate` or `test`; the loaders load what is missing by themselves."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
        for split in SPLITS if stage is None else needed[stage]:
            self.samples(split)

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented.

        Raises:
            ValueError: if there would be no batch.
        """
        samples, (world, rank) = self.samples("train"), self._processes()
        share = -(-len(samples) // world)
        if self.drop_last and share < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {share} training images of a process, and drop_last leaves out "
                "incomplete batches: choose a smaller batch_size, or drop_last=False"
            )
        augmentation = self.augmentation
        batches: Batches
        if augmentation.only_crops_and_flips and self._held_as_input(samples):
            batches = TensorBatches(samples, augmentation.padding, augmentation.hflip)
        else:
            batches = TransformedBatches(self._reader("train", samples), augmentation.train_transform(), training=True)
        sampler = self._train_sampler(samples, world, rank)
        loader = self._loader(SeededBatches(batches, self.seed), sampler, rank, ResumableLoader, self.drop_last)
        self._go_on(cast(ResumableLoader, loader))
        return loader

    def _train_sampler(self, samples: Samples, world: int, rank: int) -> EpochSampler:
        """The order of training, and the part of this process."""
        return EpochSampler(cast(Dataset, samples), world, rank, self.seed)

    def training_names(self, batch: int) -> list[str]:
        """The names of the images of a batch, counted from 0, of this process in the Trainer's epoch; not of other samplers."""
        samples = self.samples("train")
        sampler = self._train_sampler(samples, *self._processes())
        sampler.set_epoch(0 if self.trainer is None else self.trainer.current_epoch)
        indices = sampler.order()[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [samples.name(index) for index in indices]

    def normalize(self, images: Tensor) -> Tensor:
        """The images of a batch as a model takes them, on the device where they are.

        Args:
            images: uint8 `[B, C, H, W]`; floats are normalized already.

        Returns:
            float32 `[B, C, H, W]`: `(images / 255 - mean) / std`.
        """
        return normalize_batch(images, self.mean, self.std) if images.dtype == torch.uint8 else images

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Any, ...]:
        """A batch of the loaders, `(images, labels)` or `(images, names)`, its images normalized, in the Trainer's precision."""
        images, *others = batch
        images = self.normalize(images)
        if self.trainer is not None:
            images = self.trainer.precision_plugin.convert_input(images)
        return images, *others

    def state_dict(self) -> dict[str, Any]:
        """The place within a training epoch: how many of its batches are done."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return {}
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = progress.processed
        is_within = 0 < done < trainer.num_training_batches
        return {"batches": done, **self._dealt(len(self.samples("train")))} if is_within else {}

    def _dealt(self, images: int) -> dict[str, int]:
        """What the batches of a training epoch depend on, besides the seed."""
        return {"images": images, "processes": self._processes()[0], "batch_size": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Has the next training loader go on from there, or the one that is there where the strategy loads checkpoints late."""
        self._place = state_dict
        if self.trainer is not None and self.trainer.strategy.restore_checkpoint_after_setup:
            loader = self.trainer.train_dataloader
            if isinstance(loader, ResumableLoader):
                self._go_on(loader)

    def _go_on(self, loader: ResumableLoader) -> None:
        place, self._place = self._place, None
        if not place:
            return
        here = self._dealt(len(cast(Sized, loader.dataset)))
        there = {name: place.get(name) for name in here}
        if there != here:
            raise ValueError(
                f"the checkpoint stopped within an epoch of {there['images']} images, {there['processes']} processes with batches "
                f"of {there['batch_size']}, this run has {here['images']} images, {here['processes']} with {here['batch_size']}; "
                "resume with the same, or from a checkpoint of an epoch's end"
            )
        loader.start_behind(place["batches"])

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """In order, names in place of labels; Lightning deals the batches to the processes, and repeats none."""
        samples = self.samples("val") if self.predict_root is None else unlabelled_images(Path(self.predict_root))
        batches = NamedBatches(self._eval_batches("predict", samples))
        return self._loader(batches, SequentialSampler(batches), rank=0)

    def _eval_loader(self, split: str) -> DataLoader:
        batches, (world, rank) = self._eval_batches(split, self.samples(split)), self._processes()
        if world == 1:
            return self._loader(batches, SequentialSampler(batches), rank)
        padded = PaddedBatches(batches)
        return self._loader(padded, PaddedEvalSampler(padded, world, rank), rank)

    def _eval_batches(self, split: str, samples: Samples) -> Batches:
        if self.augmentation.crop_pct == 1 and self._held_as_input(samples):
            return TensorBatches(samples)
        return TransformedBatches(self._reader(split, samples), self.augmentation.eval_transform(), training=False)

    def _reader(self, split: str, samples: Samples) -> ImageReader:
        """The reader of a split: the same one for each of its loaders, so that an image is named once."""
        if split not in self.readers or self.readers[split].samples is not samples:
            limit = None if split == "predict" else self.max_damaged
            self.readers[split] = ImageReader(samples, self.channels, SPLIT_NAMES[split], limit)
        return self.readers[split]

    def _loader(
        self,
        dataset: Dataset,
        sampler: Sampler,
        rank: int,
        kind: type[ImageLoader] = ImageLoader,
        drop_last: bool = False,
    ) -> DataLoader:
        return kind(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=leave_sigterm_to_parent,
            collate_fn=as_is,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed + rank),
        )

    def _held_as_input(self, samples: Samples) -> TypeGuard[TensorSamples]:
        """Whether the images are bytes in memory, of the size and channels of the input."""
        return isinstance(samples, TensorSamples) and samples.images.shape[1:] == self.input_size

    def _processes(self) -> tuple[int, int]:
        """The number of processes, and the rank of this one."""
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0
