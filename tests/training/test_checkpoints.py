"""Checkpoints of `DesignClassifier`: what they rebuild, what they need, and where training goes on from them."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lightning
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.surgery import binary_layers
from design_lightning.training import DesignClassifier

SMALL: dict[str, Any] = {
    "backbone": "resnet18_cifar",
    "backbone_args": {"width": 0.125},
    "num_classes": 10,
    "input_size": (1, 32, 32),
}
CUSTOM_KERNEL = [[[0.1, -0.4], [0.9, 0.2]], [[0.3, 0.3], [-0.7, 0.0]]]

CONFIGS: dict[str, dl.BinaryConfig | None] = {
    "float": None,
    "default": dl.BinaryConfig(),
    "custom kernel": dl.BinaryConfig(kernel=CUSTOM_KERNEL, scale=0.5, align="center"),
    "learned kernel": dl.BinaryConfig(kernel=CUSTOM_KERNEL, learn_kernel=True, weight="learned"),
    "paper": dl.BinaryConfig(policy="paper"),
    "reactnet": dl.BinaryConfig(policy="reactnet", weight="recu"),
    "everything": dl.BinaryConfig(policy="everything", activation="sign", weight="irnet", estimator="ede"),
    "stage one": dl.BinaryConfig(stage="activations"),
}


def trainer(folder: Path, **arguments: Any) -> lightning.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return lightning.Trainer(default_root_dir=folder, **{**options, **arguments})


def batches(count: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=4)


def trained(folder: Path, model: DesignClassifier, name: str = "a.ckpt") -> Path:
    run = trainer(folder)
    run.fit(model, batches())
    run.save_checkpoint(folder / name)
    return folder / name


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a checkpoint must not need the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def pretrained_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each call of `timm.create_model` asked for; none downloads."""
    asked: list[bool] = []
    create: Callable[..., nn.Module] = timm.create_model

    def record(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", record)
    return asked


@pytest.mark.parametrize("name", CONFIGS)
def test_rebuilt_network_gives_the_same_logits_bit_for_bit(tmp_path: Path, name: str, no_network: None) -> None:
    model = DesignClassifier(**SMALL, binary=CONFIGS[name])
    path = trained(tmp_path, model)
    again = DesignClassifier.load_from_checkpoint(path, weights_only=True)
    images = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))
    assert again.binary_config == CONFIGS[name]
    assert binary_layers(again).keys() == binary_layers(model).keys()
    config = CONFIGS[name]
    assert all(config is not None and layer.stage == config.stage for layer in binary_layers(again).values())


def test_kernel_of_a_file_is_in_the_checkpoint_itself(tmp_path: Path, no_network: None) -> None:
    file = tmp_path / "kernel.json"
    dl.ThresholdKernel(CUSTOM_KERNEL).to_json(file)
    model = DesignClassifier(**SMALL, binary=dl.BinaryConfig(kernel=str(file)))
    path = trained(tmp_path, model)
    file.unlink()
    again = DesignClassifier.load_from_checkpoint(path, weights_only=True)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))


def test_pretrained_weights_are_asked_for_once(tmp_path: Path, pretrained_asked_for: list[bool]) -> None:
    path = trained(tmp_path, DesignClassifier(**SMALL, pretrained=True))
    assert pretrained_asked_for == [True]
    DesignClassifier.load_from_checkpoint(path, weights_only=True)
    assert pretrained_asked_for == [True, False]


def test_file_that_the_backbone_started_from_may_be_gone(tmp_path: Path) -> None:
    start = tmp_path / "start.pth"
    torch.save(DesignClassifier(**SMALL, binary=None).backbone.state_dict(), start)
    arguments = {**SMALL, "backbone_args": {"width": 0.125, "checkpoint_path": str(start)}}
    model = DesignClassifier(**arguments)
    assert torch.equal(model.backbone.conv1.weight, torch.load(start, weights_only=True)["conv1.weight"])  # type: ignore[union-attr,arg-type]
    path = trained(tmp_path, model)
    start.unlink()
    again = DesignClassifier.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)  # type: ignore[union-attr,arg-type]


def test_what_describes_the_data_is_kept(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(10)]
    model = DesignClassifier(**SMALL, class_names=names, mean=(0.25,), std=(0.5,), channels_last=True)
    again = DesignClassifier.load_from_checkpoint(trained(tmp_path, model), weights_only=True)
    assert again.class_names == tuple(names)
    assert again.channels_last
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert (kept["mean"], kept["std"], kept["input_size"]) == ([0.25], [0.5], [1, 32, 32])


def test_loading_takes_other_values_beside_the_stored_ones(tmp_path: Path) -> None:
    path = trained(tmp_path, DesignClassifier(**SMALL))
    again = DesignClassifier.load_from_checkpoint(
        path, weights_only=True, loss=nn.CrossEntropyLoss(label_smoothing=0.1)
    )
    assert isinstance(again.loss, nn.CrossEntropyLoss)
    assert again.loss.label_smoothing == 0.1


@pytest.mark.parametrize("binary", [None, dl.BinaryConfig(weight="learned")])
def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, binary: dl.BinaryConfig | None
) -> None:
    def make() -> DesignClassifier:
        torch.manual_seed(0)
        return DesignClassifier(**SMALL, binary=binary, warmup_steps=3)

    whole = make()
    trainer(tmp_path, max_epochs=4).fit(whole, batches())

    class StopAfterTwo(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    first = trainer(tmp_path, max_epochs=4, callbacks=[StopAfterTwo()])
    first.fit(make(), batches())
    assert first.global_step == 4
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    trainer(tmp_path, max_epochs=4).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    other = resumed.state_dict()
    for key, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("stage", ["float", "activations", "both"])
@pytest.mark.parametrize("stored", ["float", "activations", "both"])
def test_stage_after_weights_is_the_configurations(tmp_path: Path, stored: Any, stage: Any) -> None:
    one = DesignClassifier(**SMALL, binary=dl.BinaryConfig(stage=stored))
    two = DesignClassifier(
        **SMALL, binary=dl.BinaryConfig(stage=stage), weights=str(trained(tmp_path, one)), pretrained=False
    )
    assert {layer.stage for layer in binary_layers(two).values()} == {stage}
    latent = dict(one.named_parameters())
    assert all(torch.equal(parameter, latent[name]) for name, parameter in two.named_parameters())
    path = trained(tmp_path, two, "two.ckpt")
    again = DesignClassifier.load_from_checkpoint(path, weights_only=True)
    assert {layer.stage for layer in binary_layers(again).values()} == {stage}


def test_learned_scales_of_stage_two_start_from_the_trained_latent_weights(tmp_path: Path) -> None:
    one = DesignClassifier(**SMALL, binary=dl.BinaryConfig(weight="learned", stage="activations"))
    path = trained(tmp_path, one)
    two = DesignClassifier(**SMALL, binary=dl.BinaryConfig(weight="learned"), weights=str(path))
    for layer in binary_layers(two).values():
        expected = layer.weight.abs().mean(dim=(1, 2, 3))
        torch.testing.assert_close(layer.weight_binarizer.alpha.flatten(), expected)  # type: ignore[operator]


def test_float_training_may_be_the_start_of_a_binary_network(tmp_path: Path) -> None:
    one = DesignClassifier(**SMALL, binary=None)
    two = DesignClassifier(**SMALL, weights=str(trained(tmp_path, one)))
    latent = dict(one.named_parameters())
    assert all(torch.equal(parameter, latent[name]) for name, parameter in two.named_parameters())
    assert {layer.stage for layer in binary_layers(two).values()} == {"both"}


def test_checkpoint_does_not_need_the_weights_that_it_started_from(tmp_path: Path) -> None:
    start = trained(tmp_path, DesignClassifier(**SMALL), "one.ckpt")
    path = trained(tmp_path, DesignClassifier(**SMALL, weights=str(start)), "two.ckpt")
    start.unlink()
    DesignClassifier.load_from_checkpoint(path, weights_only=True)


NO_CHECKPOINT: dict[str, Callable[[Path], object]] = {
    "a text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "bare weights": lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
    "pickled code": lambda path: torch.save({"state_dict": nn.Linear(2, 2)}, path),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_weights_that_are_no_checkpoint_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.ckpt"
    NO_CHECKPOINT[kind](path)
    with pytest.raises(ValueError, match="is no checkpoint of an earlier run") as error:
        DesignClassifier(**SMALL, weights=str(path))
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["none.ckpt", "."])
def test_weights_that_are_no_file_are_named(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"weights '{path}' is no file; give the checkpoint of an earlier run"):
        DesignClassifier(**SMALL, weights=path)


@pytest.mark.parametrize(
    "other", [{"num_classes": 7}, {"backbone_args": {"width": 0.25}}, {"backbone": "resnet20_cifar"}]
)
def test_weights_of_another_network_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    path = trained(tmp_path, DesignClassifier(**SMALL))
    with pytest.raises(ValueError, match=r"are of another network: \d+ tensors differ, among them"):
        DesignClassifier(**{**SMALL, **other}, weights=str(path))
