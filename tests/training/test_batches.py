"""What `DesignClassifier` refuses of its input, and that it refuses nothing else."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.training import DesignClassifier


@pytest.fixture
def model() -> DesignClassifier:
    return DesignClassifier("resnet18_cifar", num_classes=10, backbone_args={"width": 0.125}, input_size=(1, 32, 32))


@pytest.fixture
def trainer(tmp_path: Path) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def batches(images: Tensor, labels: Tensor | None = None, size: int = 4) -> DataLoader[Any]:
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def with_bad(numbers: list[int], value: float, count: int = 12) -> Tensor:
    images = torch.randn(count, 1, 32, 32)
    images[numbers, 0, 31, 0] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_error_counts_the_bad_images_and_numbers_them_in_one_line(
    model: DesignClassifier, trainer: lightning.Trainer, value: float
) -> None:
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        trainer.fit(model, batches(with_bad([1, 4, 11], value), size=12))
    message = str(error.value)
    assert "in 3 of 12 images of the train batch at step 0: numbers [1, 4, 11] of the batch" in message
    assert len(message.splitlines()) == 1


def test_infinities_of_both_signs_do_not_cancel(model: DesignClassifier, trainer: lightning.Trainer) -> None:
    images = with_bad([0], float("inf"))
    images[2, 0, 0, 0] = float("-inf")
    with pytest.raises(ValueError, match=r"in 2 of 4 images of the train batch at step 0: numbers \[0, 2\]"):
        trainer.fit(model, batches(images))


def test_no_more_than_eight_numbers_are_named(model: DesignClassifier, trainer: lightning.Trainer) -> None:
    images = with_bad(list(range(12)), float("nan"))
    with pytest.raises(ValueError, match=r"in 12 of 12 images .* numbers \[0, 1, 2, 3, 4, 5, 6, 7\] of the batch"):
        trainer.fit(model, batches(images, size=12))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_nan_stops_evaluation_and_prediction_too(
    model: DesignClassifier, trainer: lightning.Trainer, command: str
) -> None:
    with pytest.raises(ValueError, match=rf"in 1 of 4 images of the {command} batch: numbers \[3\]"):
        getattr(trainer, command)(model, batches(with_bad([3], float("nan"))))


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_huge_but_finite_images_pass(model: DesignClassifier, value: float) -> None:
    images = torch.full((4, 1, 32, 32), value)
    model.on_before_batch_transfer((images, torch.zeros(4, dtype=torch.int64)), 0)


def test_half_precision_images_whose_sum_would_overflow_pass(model: DesignClassifier) -> None:
    images = torch.full((4, 1, 32, 32), 6e4, dtype=torch.float16)
    model.on_before_batch_transfer([images, torch.zeros(4, dtype=torch.int64)], 0)


def test_batch_passes_as_the_same_object(model: DesignClassifier) -> None:
    batch = (torch.randn(2, 1, 32, 32), torch.tensor([0, 9]))
    assert model.on_before_batch_transfer(batch, 0) is batch
    assert batch[1].tolist() == [0, 9]


def test_a_batch_outside_a_trainer_is_a_batch(model: DesignClassifier) -> None:
    with pytest.raises(ValueError, match=r"in 1 of 2 images of the batch: numbers \[1\]"):
        model.on_before_batch_transfer((with_bad([1], float("nan"), 2), torch.tensor([0, 9])), 0)


@pytest.mark.parametrize("label", [10, 999])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_label_beyond_the_classes_stops_evaluation(
    model: DesignClassifier, trainer: lightning.Trainer, command: str, label: int
) -> None:
    labels = torch.tensor([0, label, 2, 3])
    with pytest.raises(
        ValueError, match=rf"label {label} in the {command} batch, but the model has 10 classes, 0 to 9"
    ):
        getattr(trainer, command)(model, batches(torch.randn(4, 1, 32, 32), labels))


@pytest.mark.parametrize("label", [-1, -100])
def test_padding_is_refused_in_training_only(model: DesignClassifier, trainer: lightning.Trainer, label: int) -> None:
    images, labels = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, label])
    with pytest.raises(ValueError, match=rf"label {label} in the train batch at step 0; only evaluation pads"):
        trainer.fit(model, batches(images, labels))
    trainer.validate(model, batches(images, labels), verbose=False)


def test_a_batch_of_nothing_but_padding_changes_no_figure(model: DesignClassifier, trainer: lightning.Trainer) -> None:
    images, labels = torch.randn(8, 1, 32, 32), torch.tensor([0, 1, 2, 3])
    padded = torch.cat([labels, torch.full((4,), -100)])
    whole = trainer.test(model, batches(images[:4], labels), verbose=False)[0]
    assert trainer.test(model, batches(images, padded), verbose=False)[0] == pytest.approx(whole)
    assert model.test_confusion is not None
    assert int(model.test_confusion.sum()) == 4
