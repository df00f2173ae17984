"""Bop against a slow reference, and in real training."""

import copy
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.binary import BinaryLinear
from design_lightning.surgery import binary_layers
from design_lightning.training import Bop, CosineDecay, DesignClassifier, PerGroupOptimizer, parameter_groups


def test_flips_are_those_of_a_slow_reference() -> None:
    rates, threshold = [0.3, 0.1, 0.5, 0.2] * 10, 0.2
    start = torch.randn(4, 3, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = Bop([weight], lr=rates[0], threshold=threshold)
    w, m = np.where(start.numpy() >= 0, 1.0, -1.0), np.zeros((4, 3))
    assert np.array_equal(weight.detach().numpy(), w)
    flips = 0
    for rate in rates:
        gradient = torch.randn(4, 3, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient
        optimizer.step()
        for i in range(4):
            for j in range(3):
                m[i, j] = (1 - rate) * m[i, j] + rate * gradient.numpy()[i, j]
                if abs(m[i, j]) > threshold and np.sign(m[i, j]) == np.sign(w[i, j]):
                    w[i, j] = -w[i, j]
                    flips += 1
        assert np.array_equal(weight.detach().numpy(), w)
    assert flips > 10


def test_bop_finds_the_binary_weights_that_made_the_data() -> None:
    images = torch.randn(64, 32)
    truth = torch.where(torch.randn(4, 32) > 0, 1.0, -1.0)
    layer = BinaryLinear(32, 4, bias=False, activation=None, weight="sign")
    optimizer = Bop(layer.parameters(), lr=0.1, threshold=1e-2)
    assert not torch.equal(layer.weight, truth)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(images), images @ truth.T).backward()
        optimizer.step()
    assert torch.equal(layer.weight, truth)


def test_a_zero_becomes_plus_one_and_a_weight_without_gradient_stays() -> None:
    weight, other = nn.Parameter(torch.tensor([0.0, -0.0, -3.0])), nn.Parameter(torch.ones(1))
    optimizer = Bop([weight, other], lr=1.0, threshold=0.0)
    assert weight.tolist() == [1, 1, -1]
    weight.grad = torch.tensor([0.0, 1.0, -1.0])
    optimizer.step()
    assert weight.tolist() == [1, -1, 1]
    assert other.tolist() == [1]


def test_weights_that_were_loaded_later_become_signs_with_the_next_step() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = Bop(layer.parameters())
    layer.load_state_dict({"weight": torch.full((2, 3), -0.25)})
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert set(layer.weight.flatten().tolist()) == {-1.0}


def test_state_goes_on_where_it_was() -> None:
    def steps(weight: nn.Parameter, optimizer: Bop, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            weight.grad = torch.randn(50, generator=generator)
            optimizer.step()

    whole = nn.Parameter(torch.randn(50))
    one = Bop([whole], lr=0.2, threshold=0.1)
    steps(whole, one, 5, seed=1)
    half = nn.Parameter(whole.detach().clone())
    two = Bop([half], lr=0.9, threshold=0.5)
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # torch shares the tensors of what it loads
    assert (two.param_groups[0]["lr"], two.param_groups[0]["threshold"]) == (0.2, 0.1)
    steps(whole, one, 5, seed=2)
    steps(half, two, 5, seed=2)
    assert torch.equal(whole, half)


def test_closure_is_called_with_gradients_and_its_result_returned() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = Bop([weight], lr=1.0, threshold=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 3
    assert weight.tolist() == [-1] * 3


def test_scheduler_moves_the_adaptivity_rate() -> None:
    optimizer = Bop([nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = CosineDecay(optimizer, total_steps=2)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 1.5}, "lr is 1.5; Bop averages gradients at a rate from 0 to 1"),
        ({"lr": -0.1}, "lr is -0.1"),
        ({"threshold": -1.0}, "threshold is -1.0; give 0"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bop([nn.Parameter(torch.ones(1))], **arguments)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at a rate of 0.0001 in torch.bfloat16; keep the weights in float32"):
        Bop([nn.Parameter(torch.ones(1, dtype=torch.bfloat16))])


def test_groups_that_are_not_latent_are_refused_before_a_weight_changes() -> None:
    model = nn.Sequential(BinaryLinear(8, 4, activation=None, weight="sign"), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"group 'decay' \+-1, .* use PerGroupOptimizer\(latent: Bop, rest: another"):
        Bop(parameter_groups(model))
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value) if isinstance(value, torch.Tensor) else True
    latent, *_, rest = parameter_groups(model)
    optimizer = Bop([latent])
    with pytest.raises(ValueError, match="group 'no_decay'"):
        optimizer.add_param_group(rest)
    assert len(Bop([{"params": [nn.Parameter(torch.ones(2))]}]).param_groups) == 1


@pytest.mark.parametrize("weight", ["recu", "irnet"])
def test_binarizers_that_standardise_are_refused(weight: str) -> None:
    model = DesignClassifier(
        "resnet20_cifar",
        num_classes=4,
        binary=dl.BinaryConfig(weight=weight),
        backbone_args={"width": 0.25},
        scheduler=None,
        optimizer=lambda groups: PerGroupOptimizer(groups, latent=Bop, rest=torch.optim.Adam),
    )
    with pytest.raises(ValueError, match=rf"layer1.0.conv1 has weight: {weight}, .* use sign, xnor or learned"):
        model.configure_optimizers()


class Flips(lightning.Callback):
    """How many latent weights flipped in each step, and that they are +-1."""

    def __init__(self) -> None:
        self.count: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before = {name: layer.weight.detach().clone() for name, layer in binary_layers(pl_module).items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        flipped = 0
        for name, layer in binary_layers(pl_module).items():
            assert set(layer.weight.unique().tolist()) == {-1.0, 1.0}
            flipped += int((layer.weight != self.before[name]).sum())
        self.count.append(flipped)
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bop_learns_with_adam_beside_it(tmp_path: Path, precision: Any) -> None:
    labels = torch.arange(16) % 4
    images = torch.randn(4, 1, 16, 16)[labels] + 0.3 * torch.randn(16, 1, 16, 16)
    model = DesignClassifier(
        "resnet20_cifar",
        num_classes=4,
        binary=dl.BinaryConfig(weight="sign"),
        backbone_args={"width": 0.25},
        input_size=(1, 16, 16),
        optimizer=lambda groups: PerGroupOptimizer(
            groups,
            latent=lambda latent: Bop(latent, lr=0.1, threshold=1e-6),
            rest=lambda rest: torch.optim.Adam(rest, lr=1e-2),
        ),
    )
    flips = Flips()
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        callbacks=[flips],
        precision=precision,
        max_epochs=50,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=16))
    assert sum(flips.count) > 0
    assert flips.losses[-1] < 0.7 * flips.losses[0]
