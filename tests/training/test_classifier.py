"""`DesignClassifier` by real training, real checkpoints and real processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.data import FashionMNISTSubset
from design_lightning.surgery import binary_layers
from design_lightning.training import CosineDecay, DesignClassifier, SquaredHinge

NARROW: dict[str, Any] = {
    "backbone": "resnet18_cifar",
    "backbone_args": {"width": 0.125},
    "num_classes": 10,
    "input_size": (1, 32, 32),
}


def trainer(folder: Path, **arguments: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return lightning.Trainer(
        default_root_dir=folder, **{"enable_checkpointing": False, "max_epochs": 1, **quiet, **arguments}
    )


def loader(images: Tensor, labels: Tensor | None = None) -> DataLoader[Any]:
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def test_training_learns_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    def train(steps: int) -> tuple[float, float, dict[str, Tensor]]:
        lightning.seed_everything(0)
        data = FashionMNISTSubset(batch_size=25)
        model = DesignClassifier(**NARROW, warmup_steps=5, optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3))
        run = trainer(tmp_path, limit_train_batches=steps, limit_val_batches=10)
        before = run.validate(model, data, verbose=False)[0]["val/loss"]
        run.fit(model, data)
        return before, float(run.callback_metrics["val/loss"]), model.state_dict()

    before, after, _ = train(80)
    assert after < 0.8 * before
    _, after, state = train(15)
    _, again, repeated = train(15)
    assert again == after
    for key, value in state.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, repeated[key]), key


@pytest.mark.parametrize(
    "binary",
    [
        None,
        dl.BinaryConfig(),
        dl.BinaryConfig(
            kernel=[[0.1, 0.9]], weight="recu", companion="rprelu", stage="activations", overrides={"fc": {"skip": []}}
        ),
    ],
)
def test_checkpoint_rebuilds_the_network_with_no_other_input(tmp_path: Path, binary: dl.BinaryConfig | None) -> None:
    model = DesignClassifier(**NARROW, binary=binary, class_names=list("abcdefghij"), mean=[0.5], std=[0.25])
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, loader(torch.randn(8, 1, 32, 32)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["format_version"] == 1
    assert stored["pretrained"] is False
    again = DesignClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.binary_config == binary
    assert again.class_names == tuple("abcdefghij")
    x = torch.randn(3, 1, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert {layer.stage for layer in binary_layers(again).values()} <= {binary.stage if binary else ""}


def test_stage_two_starts_from_the_weights_of_stage_one(tmp_path: Path) -> None:
    one = DesignClassifier(**NARROW, binary=dl.BinaryConfig(stage="activations"))
    run = trainer(tmp_path, max_steps=2)
    run.fit(one, loader(torch.randn(8, 1, 32, 32)))
    run.save_checkpoint(tmp_path / "one.ckpt")
    two = DesignClassifier(**NARROW, binary=dl.BinaryConfig(stage="both"), weights=str(tmp_path / "one.ckpt"))
    assert {layer.stage for layer in binary_layers(two).values()} == {"both"}
    latent = dict(one.named_parameters())
    assert all(torch.equal(p, latent[n]) for n, p in two.named_parameters())
    with pytest.raises(FileNotFoundError, match=r"weights 'none.ckpt' is no file"):
        DesignClassifier(**NARROW, weights="none.ckpt")
    with pytest.raises(ValueError, match="are of another network"):
        DesignClassifier(**{**NARROW, "backbone_args": {"width": 0.25}}, weights=str(tmp_path / "one.ckpt"))


def test_stage_two_keeps_its_own_kernel_and_takes_another_weight_binarizer(tmp_path: Path) -> None:
    stage_one = dl.BinaryConfig(kernel="2x2_v1", scale=0.0, weight="learned", stage="activations")
    one = DesignClassifier(**NARROW, binary=stage_one)
    run = trainer(tmp_path, max_steps=2)
    run.fit(one, loader(torch.randn(8, 1, 32, 32)))
    run.save_checkpoint(tmp_path / "one.ckpt")
    stage_two = dl.BinaryConfig(kernel="2x2_v2", weight="xnor")
    with pytest.warns(UserWarning, match="16 tensors of weight binarizers and activations differ"):
        two = DesignClassifier(**NARROW, binary=stage_two, weights=str(tmp_path / "one.ckpt"))
    layer: Any = next(iter(binary_layers(two).values()))
    assert torch.equal(layer.activation.levels, dl.ThresholdKernel.named("2x2_v2").tensor())
    assert float(layer.activation.scale) == 1.0
    assert torch.equal(layer.weight, next(iter(binary_layers(one).values())).weight)


def test_resume_with_more_epochs_goes_on_along_the_longer_schedule(tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    images = loader(torch.randn(8, 1, 32, 32))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(DesignClassifier(**NARROW), images)
    run.save_checkpoint(tmp_path / "a.ckpt")
    longer = trainer(tmp_path, max_epochs=4, callbacks=[Watch()])
    longer.fit(DesignClassifier(**NARROW), images, ckpt_path=tmp_path / "a.ckpt")
    assert len(rates) == 4
    assert rates[-1] > 0


@pytest.mark.parametrize("name", ["CosineDecay", "ReduceLROnPlateau"])
def test_schedules_by_epoch(tmp_path: Path, name: str) -> None:
    kinds: dict[str, Any] = {
        "CosineDecay": CosineDecay,
        "ReduceLROnPlateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    }
    model = DesignClassifier(**NARROW, scheduler=kinds[name], scheduler_interval="epoch")
    run = trainer(tmp_path, max_epochs=2)
    images = loader(torch.randn(8, 1, 32, 32))
    run.fit(model, images, images)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0 if name == "CosineDecay" else 1e-3)


def test_loss_with_class_weights_does_not_hinder_a_checkpoint(tmp_path: Path) -> None:
    model = DesignClassifier(**NARROW, loss=nn.CrossEntropyLoss(weight=torch.ones(10)))
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, loader(torch.randn(4, 1, 32, 32)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    DesignClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_warm_up_in_epochs_counts_epochs_whatever_ends_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=4, max_steps=6)
    run.fit(DesignClassifier(**NARROW, warmup_epochs=1), loader(torch.randn(16, 1, 32, 32)))
    assert run.lr_scheduler_configs[0].scheduler.warm_up_steps == 4


def test_loss_with_parameters_of_its_own_is_trained(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.factor * logits, labels)

    loss = Scaled()
    trainer(tmp_path, max_steps=2).fit(DesignClassifier(**NARROW, loss=loss), loader(torch.randn(8, 1, 32, 32)))
    assert float(loss.factor) != 1.0


def test_what_could_have_no_effect_or_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label -1 in the train batch at step 0"):
        trainer(tmp_path).fit(DesignClassifier(**NARROW), loader(torch.randn(2, 1, 32, 32), torch.tensor([-1, 2])))
    model = DesignClassifier(**NARROW, optimizer=torch.optim.Rprop, latent_weight_decay=0.1)
    with pytest.raises(ValueError, match="Rprop has no weight decay"):
        trainer(tmp_path).fit(model, loader(torch.randn(2, 1, 32, 32)))
    with pytest.raises(ValueError, match="backbone_args must be plain values"):
        DesignClassifier("resnet18", backbone_args={"norm_layer": nn.BatchNorm2d})


def test_predictions_without_paths_are_numbered(tmp_path: Path) -> None:
    batches: Any = trainer(tmp_path).predict(DesignClassifier(**NARROW), loader(torch.randn(6, 1, 32, 32)))
    assert [path for batch in batches for path in batch["paths"]][-1] == "batch 1, image 1"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_batch_stops_training(tmp_path: Path, bad: float) -> None:
    images = torch.randn(8, 1, 32, 32)
    images[5, 0, 3, 4] = bad
    with pytest.raises(
        ValueError, match=r"NaN or infinity in 1 of 4 images of the train batch at step 1: numbers \[1\]"
    ):
        trainer(tmp_path).fit(DesignClassifier(**NARROW), loader(images))


def test_label_out_of_range_stops_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label 10 in the train batch at step 0, but the model has 10 classes, 0 to 9"):
        trainer(tmp_path).fit(
            DesignClassifier(**NARROW), loader(torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 10, 2]))
        )


def test_wrong_arguments_name_what_would_be_right() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet81': did you mean 'resnet18'"):
        DesignClassifier("resnet81")
    with pytest.raises(ValueError, match="num_classes is 10, but there are 2 class names"):
        DesignClassifier(**NARROW, class_names=["a", "b"])
    with pytest.raises(ValueError, match="set one of the two"):
        DesignClassifier(**NARROW, warmup_steps=1, warmup_epochs=1)
    with pytest.raises(ValueError, match="scheduler_interval: step"):
        DesignClassifier(**NARROW, warmup_steps=1, scheduler_interval="epoch")


def test_padding_labels_count_nowhere(tmp_path: Path) -> None:
    model = DesignClassifier(**NARROW)
    images, labels = torch.randn(6, 1, 32, 32), torch.tensor([0, 1, 2, 3, 4, 5])
    whole = trainer(tmp_path).validate(model, loader(images, labels), verbose=False)[0]
    padded = torch.cat([images, images[:1].expand(6, -1, -1, -1)]), torch.cat([labels, torch.full((6,), -100)])
    assert trainer(tmp_path).validate(model, loader(*padded), verbose=False)[0] == pytest.approx(whole)


def test_test_keeps_the_confusion_matrix(tmp_path: Path) -> None:
    model = DesignClassifier(**NARROW)
    images, labels = torch.randn(6, 1, 32, 32), torch.tensor([0, 1, 2, 2, 4, 5])
    result = trainer(tmp_path).test(model, loader(images, labels), verbose=False)[0]
    model.eval()
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for label, taken in zip(labels, model(images).argmax(1), strict=True):
        expected[label, taken] += 1
    assert torch.equal(model.test_confusion, expected)  # type: ignore[arg-type]
    assert result["test/top1"] == pytest.approx(float(expected.trace() / 6))


def test_optimizer_and_warm_up_are_what_the_configuration_asks_for(tmp_path: Path) -> None:
    model = DesignClassifier(
        **NARROW,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9, weight_decay=0.1),
        latent_weight_decay=None,
        warmup_epochs=0.5,
    )
    run = trainer(tmp_path, max_epochs=2)
    rates: list[float] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run.callbacks.append(Watch())
    run.fit(model, loader(torch.randn(16, 1, 32, 32)))
    assert [g["weight_decay"] for g in run.optimizers[0].param_groups] == [0.1, 0.1, 0.0]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[3] < 0.3


@pytest.mark.parametrize("loss", [SquaredHinge(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_losses(tmp_path: Path, loss: nn.Module) -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    if isinstance(loss, SquaredHinge):
        terms = [
            max(0.0, 1 - (1 if k == labels[i] else -1) * float(logits[i, k])) ** 2 for i in range(3) for k in range(4)
        ]
        assert float(loss(logits, labels)) == pytest.approx(sum(terms) / 12)
    trainer(tmp_path, max_steps=1).fit(DesignClassifier(**NARROW, loss=loss), loader(torch.randn(4, 1, 32, 32)))


@pytest.mark.parametrize(
    "options", [{"channels_last": True}, {"scheduler": None}, {"scheduler": None, "warmup_steps": 2}]
)
def test_options_train_a_step(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer(tmp_path, max_steps=1).fit(DesignClassifier(**NARROW, **options), loader(torch.randn(4, 1, 32, 32)))


@pytest.mark.slow
def test_compiled_backbone_trains_and_keeps_its_keys(tmp_path: Path) -> None:
    model = DesignClassifier(**NARROW, compile=True)
    keys = model.state_dict().keys()
    trainer(tmp_path, max_steps=1).fit(model, loader(torch.randn(4, 1, 32, 32)))
    assert model.state_dict().keys() == keys


def test_binary_parts_train_in_mixed_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed")
    run.fit(DesignClassifier(**NARROW), loader(torch.randn(8, 1, 32, 32)))
    assert torch.isfinite(run.callback_metrics["train/loss"])


def test_bytes_of_a_loader_without_its_data_module_are_refused(tmp_path: Path) -> None:
    data = FashionMNISTSubset(batch_size=4)
    with pytest.raises(ValueError, match=r"torch\.uint8.*datamodule=data.*data\.normalize"):
        trainer(tmp_path).test(DesignClassifier(**NARROW), data.test_dataloader(), verbose=False)


DDP = """
import json, sys, lightning, torch
from design_lightning.data import FashionMNISTSubset
from design_lightning.training import DesignClassifier
torch.set_num_threads(1)
devices, batch_size, val_size = map(int, sys.argv[1:])
data = FashionMNISTSubset(batch_size=batch_size, val_size=val_size)
data.test_dataloader = data.val_dataloader
model = DesignClassifier.load_from_checkpoint("trained.ckpt", weights_only=True)
trainer = lightning.Trainer(accelerator="cpu", strategy="ddp" if devices > 1 else "auto", devices=devices, logger=False,
    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
assert trainer.world_size == devices
result = trainer.validate(model, data, verbose=False)[0]
trainer.test(model, data, verbose=False)
if trainer.is_global_zero:
    print("RESULT" + json.dumps([result, model.test_confusion.tolist()]))
"""


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `trained.ckpt` is: of a network that is right more often than by chance."""
    folder = tmp_path_factory.mktemp("trained")
    lightning.seed_everything(0)
    run = trainer(folder, limit_train_batches=40, limit_val_batches=0)
    run.fit(
        DesignClassifier(**NARROW, optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3)),
        FashionMNISTSubset(batch_size=25),
    )
    run.save_checkpoint(folder / "trained.ckpt")
    return folder


# 151 leaves one image of padding in a batch; 129 in batches of 64 leaves the second process a batch of nothing but padding.
@pytest.mark.parametrize(("val_size", "batch_size"), [(151, 32), (129, 64)])
@pytest.mark.slow
def test_metrics_of_two_processes_equal_those_of_one(trained_folder: Path, val_size: int, batch_size: int) -> None:
    (trained_folder / "ddp.py").write_text(DDP)
    results = []
    for devices in (1, 2):
        command = [sys.executable, "ddp.py", *map(str, (devices, batch_size, val_size))]
        out = subprocess.run(command, cwd=trained_folder, capture_output=True, text=True, check=False, timeout=300)
        assert out.returncode == 0, out.stderr[-3000:]
        results.append(json.loads(out.stdout.partition("RESULT")[2].splitlines()[0]))
    (alone, confusion_alone), (together, confusion_together) = results
    assert together == pytest.approx(alone, rel=1e-5)
    assert confusion_together == confusion_alone
    confusion = torch.tensor(confusion_alone)
    assert int(confusion.sum()) == val_size
    assert alone["val/top1"] == pytest.approx(int(confusion.trace()) / val_size)
    assert alone["val/top1"] > 0.2
