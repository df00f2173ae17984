"""Losses against loops over images and classes, alone and through `DesignClassifier`."""

import math
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.training import DesignClassifier, SquaredHinge


def classifier(loss: nn.Module) -> DesignClassifier:
    arguments: Any = {"backbone_args": {"width": 0.125}, "input_size": (1, 32, 32), "num_classes": 10}
    torch.manual_seed(0)
    return DesignClassifier("resnet18_cifar", loss=loss, **arguments)


def measured(model: DesignClassifier) -> tuple[float, Tensor, Tensor]:
    """The loss that validation reports, and the logits and labels that it is of."""
    images, labels = torch.randn(6, 1, 32, 32), torch.tensor([0, 9, 3, 3, 5, 1])
    batches: DataLoader[Any] = DataLoader(TensorDataset(images, labels), batch_size=4)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    reported = trainer.validate(model, batches, verbose=False)[0]["val/loss"]
    with torch.no_grad():
        return reported, model.eval()(images), labels


def hinge_by_loops(logits: Tensor, labels: Tensor, margin: float) -> float:
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        for k in range(logits.shape[1]):
            sign = 1 if k == label else -1
            total += max(0.0, margin - sign * float(logits[i, k])) ** 2
    return total / logits.numel()


def smoothed_by_loops(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    total, classes = 0.0, logits.shape[1]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for k, value in enumerate(row):
            share = smoothing / classes + (1 - smoothing) * (k == label)
            total -= share * (value - log_sum)
    return total / len(labels)


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_squared_hinge_is_the_sum_of_its_formula(margin: float, classes: int) -> None:
    logits, labels = 2 * torch.randn(5, classes), torch.randint(classes, (5,))
    loss = SquaredHinge(margin)(logits, labels)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(hinge_by_loops(logits, labels, margin), rel=1e-5)


def test_squared_hinge_has_the_gradient_of_its_formula() -> None:
    logits = (2 * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 3, 1])
    SquaredHinge()(logits, labels).backward()
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        for k in range(4):
            sign = 1 if k == int(labels[i]) else -1
            expected[i, k] = -2 * sign * max(0.0, 1 - sign * float(logits[i, k].detach())) / 12
    torch.testing.assert_close(logits.grad, expected)


def test_squared_hinge_costs_nothing_beyond_the_margin_on_the_right_side() -> None:
    logits = torch.tensor([[1.0, -1.0], [-5.0, 7.0]])
    assert float(SquaredHinge()(logits, torch.tensor([0, 1]))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_squared_hinge_keeps_the_type_of_the_logits(dtype: torch.dtype) -> None:
    assert SquaredHinge()(torch.zeros(2, 3, dtype=dtype), torch.tensor([0, 1])).dtype == dtype


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_classifier_measures_smoothed_cross_entropy(smoothing: float) -> None:
    model = classifier(nn.CrossEntropyLoss(label_smoothing=smoothing))
    reported, logits, labels = measured(model)
    assert reported == pytest.approx(smoothed_by_loops(logits, labels, smoothing), rel=1e-5)


def test_classifier_measures_the_squared_hinge() -> None:
    reported, logits, labels = measured(classifier(SquaredHinge()))
    assert reported == pytest.approx(hinge_by_loops(logits, labels, 1.0), rel=1e-5)
