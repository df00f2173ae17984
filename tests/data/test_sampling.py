import pytest
import torch

from design_lightning.data.batches import PaddedBatches, TensorBatches, as_is
from design_lightning.data.samples import TensorSamples, numbered
from design_lightning.data.sampling import IGNORE_LABEL, PaddedEvalSampler, stratified_split


def batches_of(count: int) -> TensorBatches:
    """Images whose one pixel is their own index, which is their label too."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return TensorBatches(
        TensorSamples(pixels, torch.arange(count), numbered("val", count)), mean=(0.0,), std=(1 / 255,)
    )


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
            assert torch.equal(images.flatten()[valid].round().long(), batch_labels[valid])
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
