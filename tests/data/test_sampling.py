import random

import numpy as np
import pytest
import torch

from design_lightning.data import FashionMNISTSubset
from design_lightning.data.batches import PaddedBatches, SeededBatches, TensorBatches, as_is, splitmix64, uniforms
from design_lightning.data.samples import TensorSamples, numbered
from design_lightning.data.sampling import (
    IGNORE_LABEL,
    EpochSampler,
    PaddedEvalSampler,
    ResumableLoader,
    stratified_split,
)


def batches_of(count: int) -> TensorBatches:
    """Images whose one pixel is their own index, which is their label too."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return TensorBatches(TensorSamples(pixels, torch.arange(count), numbered("val", count)))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 11, 12, 13])
def test_every_sample_occurs_once_over_the_processes_and_each_has_equally_many(world, count):
    seen, batches_a_rank = [], []
    for rank in range(world):
        padded = PaddedBatches(batches_of(count))
        sampler = PaddedEvalSampler(padded, world, rank)
        loader = torch.utils.data.DataLoader(padded, batch_size=2, sampler=sampler, collate_fn=as_is)
        labels = []
        for images, batch_labels in loader:
            valid = batch_labels != IGNORE_LABEL
            assert torch.equal(images.flatten()[valid].long(), batch_labels[valid])
            assert (images.flatten()[~valid] == 0).all(), "padding shows sample 0"
            labels += batch_labels.tolist()
        assert len(labels) == len(sampler)
        batches_a_rank.append(len(labels))
        seen += [label for label in labels if label != IGNORE_LABEL]
    assert sorted(seen) == list(range(count))
    assert len(set(batches_a_rank)) == 1


def test_a_padded_dataset_also_answers_single_indices():
    padded = PaddedBatches(batches_of(3))
    assert padded[2][1] == 2
    assert padded[3][1] == IGNORE_LABEL
    assert len(padded) == 3


@pytest.mark.parametrize("val_size", [30, 0.1])
def test_a_carved_split_keeps_the_share_of_each_class(val_size):
    labels = torch.tensor([0] * 200 + [1] * 60 + [2] * 40)[torch.randperm(300)]
    train, val = stratified_split(labels, val_size, seed=0, class_names="abc")
    assert torch.bincount(labels[val]).tolist() == [20, 6, 4]
    assert sorted(train.tolist() + val.tolist()) == list(range(300))


def test_a_carved_split_has_exactly_the_size_asked_for():
    labels = torch.tensor([0] * 7 + [1] * 7 + [2] * 7)
    for val_size in range(3, 19):
        _, val = stratified_split(labels, val_size, seed=0, class_names="abc")
        assert len(val) == val_size


def test_a_carved_split_is_drawn_from_the_seed():
    labels = torch.arange(100) % 5
    first, again, other = (stratified_split(labels, 20, seed, "abcde")[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("val_size", [2, 8, 100, 0.01, 0.99])
def test_a_split_that_leaves_nothing_on_one_side_is_refused(val_size):
    with pytest.raises(ValueError, match=f"val_size={val_size} takes .* of 10 training images"):
        stratified_split(torch.arange(10) % 3, val_size, seed=0, class_names="abc")


def test_a_split_without_a_rare_class_is_refused_by_name():
    labels = torch.tensor([0] * 50 + [1])
    with pytest.raises(ValueError, match="0 of the 1 images of class 'rare'"):
        stratified_split(labels, 5, seed=0, class_names=["common", "rare"])


def test_a_resumed_loader_gives_the_rest_of_the_epoch_whatever_its_workers() -> None:
    def loader(workers: int = 0) -> ResumableLoader:
        data = FashionMNISTSubset(batch_size=500, num_workers=workers, image_size=28, padding=2)
        loader = data.train_dataloader()
        assert isinstance(loader, ResumableLoader)
        loader.sampler.set_epoch(3)
        return loader

    whole = [(images.sum().item(), labels) for images, labels in loader()]
    for stop, workers in ((1, 0), (len(whole) - 1, 1), (4, 2)):
        first, second = loader(workers), loader(workers)
        for _ in zip(range(stop), first, strict=False):
            pass
        second.start_behind(stop)
        rest = [(images.sum().item(), labels) for images, labels in second]
        assert len(rest) == len(whole) - stop
        for (total, labels), (expected_total, expected_labels) in zip(rest, whole[stop:], strict=True):
            assert total == expected_total
            assert torch.equal(labels, expected_labels)
        again = [labels for _, labels in second]
        assert len(again) == len(whole)


def test_another_batch_size_or_number_of_processes_or_images_within_an_epoch_is_refused() -> None:
    data = FashionMNISTSubset(batch_size=500, image_size=28)
    for batch_size, processes, images in ((1000, 1, 6000), (500, 2, 6000), (500, 1, 5999)):
        data.load_state_dict({"batches": 3, "batch_size": batch_size, "processes": processes, "images": images})
        with pytest.raises(
            ValueError,
            match=f"{images} images, {processes} processes with batches of {batch_size}, this run has 6000 images, 1 with 500",
        ):
            data.train_dataloader()


AUGMENTATIONS = ({"padding": 4}, {"padding": None}, {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5})


@pytest.mark.parametrize("options", AUGMENTATIONS, ids=("tensors", "resized", "policy"))
def test_two_processes_see_the_images_of_one_as_it_sees_them(options: dict) -> None:
    data = FashionMNISTSubset(image_size=28, seed=5, **options)
    batches = data.train_dataloader().dataset

    def dealt(rank: int, world: int) -> list[int]:
        sampler = EpochSampler(batches, world, rank, seed=5)
        sampler.set_epoch(2)
        return list(sampler)

    images, labels = batches.__getitems__(dealt(0, 1)[:12])
    for rank in (0, 1):
        halves = [batches.__getitems__(dealt(rank, 2)[start : start + 3]) for start in (0, 3)]
        assert torch.equal(torch.cat([half[0] for half in halves]), images[rank::2])
        assert torch.equal(torch.cat([half[1] for half in halves]), labels[rank::2])


@pytest.mark.parametrize("options", AUGMENTATIONS, ids=("tensors", "resized", "policy"))
def test_the_same_image_is_augmented_anew_with_the_epoch_the_seed_and_its_place(options: dict) -> None:
    def images(seed: int, *places: int) -> torch.Tensor:
        batches = FashionMNISTSubset(image_size=28, **options).train_dataloader().dataset
        return SeededBatches(batches.batches, seed).__getitems__(places)[0]

    count, first = 6000, images(0, 0, 1, 2, 3)
    assert torch.equal(first, images(0, 0, 1, 2, 3))
    assert not torch.equal(first, images(0, count, count + 1, count + 2, count + 3))
    assert not torch.equal(first, images(1, 0, 1, 2, 3))
    assert torch.equal(first, images(2**64, 0, 1, 2, 3)), "seeds count modulo 2^64"


def test_draws_are_those_of_the_published_generator_and_uniform() -> None:
    # The first two of java.util.SplittableRandom's algorithm from 1234567.
    states = np.array([1234567, 1234567 + 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973]
    draws = uniforms(splitmix64(np.arange(20000, dtype=np.uint64)), 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert np.abs(np.histogram(column, 10, (0, 1))[0] / 2000 - 1).max() < 0.1  # 4.7 standard deviations
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03


def test_augmentation_leaves_the_generators_outside_as_they_were() -> None:
    data = FashionMNISTSubset(batch_size=1000, num_workers=0, image_size=28, auto_augment="rand-m9", re_prob=0.5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    next(iter(data.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
