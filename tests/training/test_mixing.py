"""Mixup and cutmix in real training, and what they do to a batch."""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.cli import main
from design_lightning.training import DesignClassifier, Distillation, MixupCutmix, SquaredHinge

SMALL: dict[str, Any] = {
    "backbone": "resnet20_cifar",
    "backbone_args": {"width": 0.25},
    "num_classes": 10,
    "input_size": (1, 16, 16),
}


def trainer(folder: Path, *callbacks: Any, **arguments: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 1,
    }
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **arguments})


def batches(count: int = 8, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 16, 16, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=batch_size)


@pytest.fixture(autouse=True)
def _same_numbers_of_numpy() -> None:
    np.random.seed(0)


class Targets(nn.Module):
    """Cross entropy that remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.seen.append(labels.detach().clone())
        return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_mixup_blends_images_and_labels_alike(count: int) -> None:
    images, labels = torch.eye(count), torch.arange(count)  # an image is its own label
    kept = images.clone()
    pictures = images.view(count, 1, 1, count)
    mixed, targets = MixupCutmix(mixup=1.0)(pictures, labels, num_classes=count, epoch=0)
    torch.testing.assert_close(mixed.view(count, count), targets)
    assert torch.equal(pictures.view(count, count), kept)
    shares = targets.max(1).values
    assert bool((shares[: count - count % 2] < 1).all())
    if count % 2:
        assert targets[-1].tolist() == kept[-1].tolist()


def test_cutmix_pastes_a_box_whose_area_is_the_share_of_the_label() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    mixed, targets = MixupCutmix(cutmix=1.0)(images, torch.arange(4), num_classes=4, epoch=0)
    for i in range(4):
        values = mixed[i].unique().tolist()
        assert set(values) == {i, 3 - i}
        assert float(targets[i, i]) == pytest.approx(float((mixed[i] == i).float().mean()))


def test_half_of_the_batches_are_mixed_and_smoothing_stays() -> None:
    mixing = MixupCutmix(mixup=1.0, prob=0.5, label_smoothing=0.2)
    images, labels = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    smooth = 0.8 * torch.eye(5)[:2] + 0.2 / 5
    mixed = [mixing(images, labels, 5, epoch=0) for _ in range(200)]
    untouched = [torch.equal(x, images) for x, _ in mixed]
    assert 70 < sum(untouched) < 130
    for (_, targets), same in zip(mixed, untouched, strict=True):
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        if same:
            torch.testing.assert_close(targets, smooth)


def test_training_learns_soft_labels_until_the_off_epoch(tmp_path: Path) -> None:
    loss = Targets()
    model = DesignClassifier(**SMALL, loss=loss, mixing=MixupCutmix(mixup=1.0, cutmix=1.0, off_epoch=2))
    trainer(tmp_path, max_epochs=3).fit(model, batches())
    assert [targets.shape for targets in loss.seen] == [(4, 10)] * 6
    whole = [bool((targets.max(1).values == 1).all()) for targets in loss.seen]
    assert whole == [False] * 4 + [True] * 2


def test_training_accuracy_counts_the_class_with_the_larger_share(tmp_path: Path) -> None:
    """A network whose logits are the mean image of its input: with an image per class, its answer is the larger share."""

    class Reader(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return self.gain * images[:, 0, 0, :10]

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

    model = DesignClassifier(**SMALL, binary=None, mixing=MixupCutmix(mixup=1.0))
    model.backbone = Reader()
    images = torch.zeros(8, 1, 16, 16)
    images[:, 0, 0, :8] = torch.eye(8)
    run = trainer(tmp_path)
    run.fit(model, DataLoader(TensorDataset(images, torch.arange(8)), batch_size=4))
    assert float(run.callback_metrics["train/top1"]) == 1.0


def test_teacher_gets_the_mixed_images(tmp_path: Path) -> None:
    class Inputs(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.student: list[Tensor] = []
            self.teacher: list[Tensor] = []
            network = pl_module._distiller.teacher.network
            pl_module.backbone.register_forward_pre_hook(lambda _, args: self.student.append(args[0].clone()))
            network.register_forward_pre_hook(lambda _, args: self.teacher.append(args[0].clone()))

    inputs = Inputs()
    model = DesignClassifier(
        **SMALL,
        mixing=MixupCutmix(mixup=1.0),
        distillation=Distillation("resnet20_cifar", pretrained=False, weight=0.5),
    )
    trainer(tmp_path, inputs).fit(model, batches())
    assert len(inputs.teacher) == 2
    for (mine, its), (images, _) in zip(zip(inputs.student, inputs.teacher, strict=True), batches(), strict=True):
        assert torch.equal(mine, its)
        assert not torch.equal(mine, images)


@pytest.mark.parametrize("arguments", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_mixing_goes_with_other_options(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = DesignClassifier(**SMALL, channels_last=True, mixing=MixupCutmix(mixup=0.2, cutmix=1.0))
    run = trainer(tmp_path, **arguments)
    run.fit(model, batches(count=7))
    assert bool(torch.isfinite(run.callback_metrics["train/loss"]))


def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def make() -> DesignClassifier:
        torch.manual_seed(0)
        return DesignClassifier(**SMALL, mixing=MixupCutmix(mixup=1.0, cutmix=1.0, off_epoch=3))

    class Seed(lightning.Callback):
        """numpy's state is part of a checkpoint elsewhere; here each epoch sets it."""

        def __init__(self, stop: int | None = None) -> None:
            self.stop = stop

        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            np.random.seed(trainer.current_epoch)

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == self.stop

    whole = make()
    trainer(tmp_path, Seed(), max_epochs=4).fit(whole, batches())
    first = trainer(tmp_path, Seed(stop=1), max_epochs=4)
    first.fit(make(), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    trainer(tmp_path, Seed(), max_epochs=4).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    other = resumed.state_dict()
    for key, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)["hyper_parameters"]
    assert "mixing" not in stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "mixup is 0.0 and cutmix 0.0; give one of them an alpha above 0"),
        ({"mixup": -1.0, "cutmix": 2.0}, "mixup is -1.0"),
        ({"mixup": 1.0, "prob": 0.0}, "prob is 0.0"),
        ({"mixup": 1.0, "switch_prob": 2.0}, "switch_prob is 2.0"),
        ({"mixup": 1.0, "label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"mixup": 1.0, "off_epoch": 0}, "off_epoch is 0, so nothing would be mixed"),
    ],
)
def test_wrong_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixupCutmix(**arguments)


def test_losses_that_do_not_go_with_soft_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="SquaredHinge takes whole ones"):
        DesignClassifier(**SMALL, loss=SquaredHinge(), mixing=MixupCutmix(mixup=1.0))
    with pytest.raises(ValueError, match=r"label_smoothing 0.1 and mixing has 0.2; set one of the two"):
        DesignClassifier(
            **SMALL, loss=nn.CrossEntropyLoss(label_smoothing=0.1), mixing=MixupCutmix(mixup=1.0, label_smoothing=0.2)
        )


def test_mixing_of_a_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {"accelerator": "cpu", "fast_dev_run": True},
        "model": {
            "init_args": {
                "backbone_args": {"width": 0.125},
                "warmup_epochs": 0,
                "mixing": {"mixup": 0.2, "cutmix": 1.0, "off_epoch": 3},
            }
        },
        "data": {"init_args": {"batch_size": 4}},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "quickstart", "--config", "mine.yaml"])
