"""Options of `DesignClassifier`, from a YAML to what the optimizer, the schedule and the backbone make of them."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.binary import BinaryLayer
from design_lightning.cli import main
from design_lightning.training import CosineDecay, DesignClassifier, LinearDecay

SMALL: dict[str, Any] = {
    "backbone": "resnet18_cifar",
    "backbone_args": {"width": 0.125},
    "num_classes": 10,
    "input_size": (1, 32, 32),
}


class Rates(lightning.Callback):
    """The learning rates of the three groups in every batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fit(folder: Path, model: DesignClassifier, count: int = 16, **arguments: Any) -> tuple[lightning.Trainer, Rates]:
    """Trains on `count` images in batches of two."""
    rates = Rates()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [rates],
        "max_epochs": 2,
    }
    trainer = lightning.Trainer(default_root_dir=folder, **{**options, **arguments})
    images: DataLoader[Any] = DataLoader(
        TensorDataset(torch.randn(count, 1, 32, 32), torch.arange(count) % 10), batch_size=2
    )
    trainer.fit(model, images)
    return trainer, rates


def first_rates(rates: Rates) -> list[float]:
    assert all(len(set(groups)) == 1 and len(groups) == 3 for groups in rates.seen)
    return [groups[0] for groups in rates.seen]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.latent_weight_decay", "null"], [0.25, 0.25, 0.0]),
        (["--model.latent_weight_decay", "0.5"], [0.5, 0.25, 0.0]),
        ([], [0.0, 0.25, 0.0]),
    ],
)
def test_learning_rate_and_weight_decay_of_a_yaml_reach_the_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: list[float]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        """
trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, accelerator: cpu, log_every_n_steps: 1}
model:
  init_args:
    backbone_args: {width: 0.125}
    optimizer: {class_path: SGD, init_args: {lr: 0.03, weight_decay: 0.25, momentum: 0.5}}
    scheduler: null
    warmup_epochs: 0
data: {init_args: {batch_size: 4}}
"""
    )
    main(["fit", "--config", "quickstart", "--config", "mine.yaml", *arguments])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    (optimizer,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    groups = optimizer["param_groups"]
    assert [group["name"] for group in groups] == ["latent", "decay", "no_decay"]
    assert [group["weight_decay"] for group in groups] == expected
    assert [group["lr"] for group in groups] == [0.03] * 3
    assert [group["momentum"] for group in groups] == [0.5] * 3
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_an_optimizer_of_a_yaml_has_no_weight_decay_that_nobody_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        f"""
trainer: {{max_steps: 1, limit_val_batches: 1, accelerator: cpu}}
model:
  class_path: DesignClassifier
  init_args:
    backbone: resnet18_cifar
    backbone_args: {{width: 0.125}}
    latent_weight_decay: null
    optimizer: {{class_path: {name}, init_args: {{lr: 0.03}}}}
    scheduler: null
data: {{class_path: FashionMNISTSubset, init_args: {{batch_size: 4}}}}
"""
    )
    main(["fit", "--config", "mine.yaml"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (optimizer,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer["param_groups"]] == [(0.03, 0.0)] * 3


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("warmup_epochs", [0.5, 1.0])
def test_warm_up_in_epochs_goes_by_optimizer_steps(tmp_path: Path, accumulate: int, warmup_epochs: float) -> None:
    model = DesignClassifier(**SMALL, warmup_epochs=warmup_epochs, scheduler=LinearDecay)
    _, rates = fit(tmp_path, model, accumulate_grad_batches=accumulate)
    per_epoch = -(-8 // accumulate)
    warm_up, steps = round(warmup_epochs * per_epoch), 2 * per_epoch
    by_step = [(k + 1) / (warm_up + 1) for k in range(warm_up)]
    by_step += [1 - k / (steps - warm_up) for k in range(steps - warm_up)]
    expected = [by_step[epoch * per_epoch + batch // accumulate] for epoch in range(2) for batch in range(8)]
    assert first_rates(rates) == pytest.approx([1e-3 * rate for rate in expected])


def test_warm_up_in_steps_and_in_epochs_agree(tmp_path: Path) -> None:
    _, by_steps = fit(tmp_path, DesignClassifier(**SMALL, warmup_steps=4))
    _, by_epochs = fit(tmp_path, DesignClassifier(**SMALL, warmup_epochs=0.5))
    assert by_steps.seen == by_epochs.seen


def test_schedule_ends_with_training_whichever_limit_ends_it(tmp_path: Path) -> None:
    _, rates = fit(tmp_path, DesignClassifier(**SMALL, scheduler=LinearDecay), max_epochs=5, max_steps=10)
    assert first_rates(rates) == pytest.approx([1e-3 * (1 - k / 10) for k in range(10)])
    _, rates = fit(tmp_path, DesignClassifier(**SMALL, scheduler=LinearDecay), limit_train_batches=3)
    assert first_rates(rates) == pytest.approx([1e-3 * (1 - k / 6) for k in range(6)])


def test_schedule_by_epoch_holds_its_rate_within_an_epoch(tmp_path: Path) -> None:
    model = DesignClassifier(**SMALL, scheduler=LinearDecay, scheduler_interval="epoch")
    _, rates = fit(tmp_path, model)
    assert first_rates(rates) == pytest.approx([1e-3] * 8 + [0.5e-3] * 8)


@pytest.mark.parametrize("kind", [CosineDecay, LinearDecay])
def test_training_without_an_end_needs_another_schedule(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{kind.__name__} goes by the share of training done, but training has no end"
    ):
        fit(tmp_path, DesignClassifier(**SMALL, scheduler=kind), max_epochs=-1)


def test_one_step_moves_every_group_by_its_own_decay(tmp_path: Path) -> None:
    """At a gradient of zero SGD multiplies a weight by 1 - lr * decay, which shows the group of each weight."""

    class Nothing(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return 0 * logits.sum()

    model = DesignClassifier(
        **SMALL,
        loss=Nothing(),
        scheduler=None,
        latent_weight_decay=0.25,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5, weight_decay=0.5),
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(tmp_path, model, max_steps=1)
    latent = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BinaryLayer)}
    for name, parameter in model.named_parameters():
        factor = 0.875 if name in latent else 0.75 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


def test_channels_last_changes_the_memory_and_not_the_logits() -> None:
    coloured: Any = {**SMALL, "input_size": (3, 32, 32)}  # with one channel the two formats are the same
    torch.manual_seed(0)
    plain = DesignClassifier(**coloured).eval()
    torch.manual_seed(0)
    last = DesignClassifier(**coloured, channels_last=True).eval()
    seen: list[Tensor] = []
    last.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(last(images), plain(images))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    filters = [parameter for parameter in last.backbone.parameters() if parameter.dim() == 4]
    assert filters
    assert all(parameter.is_contiguous(memory_format=torch.channels_last) for parameter in filters)


def test_channels_last_trains_to_the_same_loss(tmp_path: Path) -> None:
    losses = []
    for channels_last in (False, True):
        lightning.seed_everything(0)
        trainer, _ = fit(tmp_path, DesignClassifier(**SMALL, channels_last=channels_last), max_steps=1)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_compiling_waits_for_training() -> None:
    model = DesignClassifier(**SMALL, compile=True)
    keys = list(model.state_dict())
    model.setup("validate")
    assert model.backbone._compiled_call_impl is None
    model.setup("fit")
    assert model.backbone._compiled_call_impl is not None
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("resnet18_cifa", "resnet18_cifar"), ("mobilenetv3_smal_050", "mobilenetv3_small_050"), ("vgg_smal", "vgg_small")],
)
def test_unknown_backbone_names_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown backbone '{asked}': did you mean .*'{nearest}'"):
        DesignClassifier(asked)


def test_an_argument_that_a_backbone_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="'resnet10t' has no argument 'width': take it out of backbone_args"):
        DesignClassifier("resnet10t", backbone_args={"width": 0.25})


@pytest.mark.parametrize("own", ["num_classes", "pretrained"])
def test_an_argument_of_its_own_is_refused_among_backbone_args(own: str) -> None:
    with pytest.raises(ValueError, match=f"backbone_args has '{own}', which is an argument of its own"):
        DesignClassifier("resnet18_cifar", num_classes=10, backbone_args={own: 1})


@pytest.mark.parametrize("count", [0, 9, 11])
def test_class_names_of_another_number_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes is 10, but there are {count} class names"):
        DesignClassifier(**SMALL, class_names=["name"] * count)


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_fewer_than_two_classes_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes is {count}; a classifier tells at least two classes apart"):
        DesignClassifier("resnet18_cifar", num_classes=count)


def test_plateau_scheduler_refuses_a_warm_up(tmp_path: Path) -> None:
    plateau: Any = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match="ReduceLROnPlateau goes by epochs and has no warm-up"):
        fit(tmp_path, DesignClassifier(**SMALL, scheduler=plateau, warmup_steps=2))
