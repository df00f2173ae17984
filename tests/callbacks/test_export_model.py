import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.callbacks import BatchNormRecalibration, BinaryWeightAveraging, ExportModel
from design_lightning.data import FashionMNISTSubset
from design_lightning.export import open_exported
from design_lightning.surgery import binarize_, binary_layers, set_stage_
from design_lightning.training import DesignClassifier
from design_lightning.training.batch_norm import recalibrate_batch_norm_

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 + 1
LABELS = torch.arange(24) % 2
WIDTH = {"width": 0.25}


def classifier(**options: Any) -> DesignClassifier:
    torch.manual_seed(0)
    sgd: Any = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    defaults = {"backbone_args": WIDTH, "input_size": (3, 16, 16), "optimizer": sgd, "scheduler": None}
    return DesignClassifier("resnet20_cifar", **{"num_classes": 2, **defaults, **options})


def data() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


class Score(Callback):
    """A metric that is best after the first epoch."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("score", -float(trainer.current_epoch))


def best() -> list[Callback]:
    return [Score(), ModelCheckpoint(monitor="score", mode="max")]


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def of_backbone(state: dict[str, Any]) -> dict[str, Tensor]:
    pairs = ((name.removeprefix("backbone."), value) for name, value in state.items() if name.startswith("backbone."))
    return {name: value for name, value in pairs if isinstance(value, Tensor)}


def test_the_best_checkpoint_is_exported_and_the_model_stays_as_it_is(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.state = tensors(pl_module)

    model, keep = classifier(), Keep()
    callbacks = (ExportModel(path=str(tmp_path / "out" / "network")), *best(), keep)
    trainer(*callbacks, max_epochs=2, enable_checkpointing=True).fit(model, data(), data())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert "epoch=0" in checkpoint.name
    stored = of_backbone(torch.load(checkpoint, weights_only=True)["state_dict"])
    exported = dl.load(tmp_path / "out" / "network.safetensors")
    assert_same(tensors(exported), stored)
    assert not torch.equal(stored["conv1.weight"], model.backbone.get_submodule("conv1").weight)
    assert_same(tensors(model), keep.state)
    assert f"written: {tmp_path}/out/network.safetensors ({checkpoint})" in capsys.readouterr().out.replace("\n", "")
    exported.eval()
    assert exported(IMAGES[:2]).shape == (2, 2)


def test_a_checkpoint_of_another_stage_is_not_exported(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Binarize(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            set_stage_(pl_module, "both" if trainer.current_epoch else "activations")

    model = classifier()
    callbacks = (ExportModel(path=str(tmp_path / "network")), *best(), Binarize())
    runner = trainer(*callbacks, max_epochs=2, enable_checkpointing=True)
    with pytest.warns(
        UserWarning, match=r"epoch=0.*in stage 'activations', the end of training in 'both': the final weights"
    ):
        runner.fit(model, data(), data())
    exported = dl.load(tmp_path / "network.safetensors")
    assert_same(tensors(exported), tensors(model.backbone))
    assert {layer.stage for layer in binary_layers(exported).values()} == {"both"}


def test_a_fast_dev_run_writes_nothing(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer(ExportModel(path=str(tmp_path / "out" / "network")), fast_dev_run=True).fit(classifier(), data(), data())
    assert not list(tmp_path.iterdir())


def test_without_a_checkpoint_the_final_weights_are_exported(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier()
    trainer(ExportModel(path=str(tmp_path / "network.safetensors"))).fit(model, data())
    assert_same(tensors(dl.load(tmp_path / "network.safetensors")), tensors(model.backbone))
    assert "(final weights)" in capsys.readouterr().out


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.slow
def test_an_average_is_exported_and_not_the_weights_that_it_is_of(
    checkpoints: bool, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    class Current(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.state = of_backbone(tensors(pl_module))

    model, current = classifier(), Current()
    averaging = BinaryWeightAveraging(0.9, recalibration_batches=2)
    options = {"enable_checkpointing": checkpoints}
    trainer(ExportModel(path=str(tmp_path / "network")), averaging, current, **options).fit(model, data(), data())
    exported = tensors(dl.load(tmp_path / "network.safetensors"))
    assert_same(exported, tensors(model.backbone))
    assert not torch.equal(exported["layer1.0.conv1.weight"], current.state["layer1.0.conv1.weight"])


def test_batch_norm_of_the_checkpoint_is_re_estimated_where_that_is_asked_for(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    callbacks = (ExportModel(path=str(tmp_path / "network")), *best(), BatchNormRecalibration(2, ["export"]))
    trainer(*callbacks, max_epochs=2, enable_checkpointing=True).fit(classifier(), data(), data())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    expected = DesignClassifier.load_from_checkpoint(checkpoint)
    recalibrate_batch_norm_(expected.backbone, IMAGES.split(8)[:2])
    exported = tensors(dl.load(tmp_path / "network.safetensors"))
    torch.testing.assert_close(exported, tensors(expected.backbone))
    stored = of_backbone(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert not torch.equal(exported["bn1.running_var"], stored["bn1.running_var"])


def test_by_default_it_goes_to_the_log_folder(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer(ExportModel(), logger=CSVLogger(tmp_path, "logs", "one")).fit(classifier(), data())
    assert (tmp_path / "logs" / "one" / "model.safetensors").is_file()
    trainer(ExportModel()).fit(classifier(), data())
    assert (tmp_path / "model.safetensors").is_file()


def test_a_dot_in_a_name_is_no_suffix(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer(ExportModel(path=str(tmp_path / "resnet.v2"))).fit(classifier(), data())
    assert (tmp_path / "resnet.v2.safetensors").is_file()


@pytest.mark.slow
def test_a_resumed_run_exports_what_an_undisturbed_one_does(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    def run(name: str, epochs: int, **options: Any) -> dict[str, Tensor]:
        callbacks = (ExportModel(path=str(tmp_path / name)), *best())
        folder = tmp_path / "run"
        runner = trainer(*callbacks, max_epochs=epochs, enable_checkpointing=True, default_root_dir=folder)
        runner.fit(classifier(), data(), data(), **options)
        return tensors(dl.load(tmp_path / f"{name}.safetensors"))

    first = run("first", 1)
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    assert_same(run("resumed", 2, ckpt_path=checkpoint), first)


@pytest.mark.slow
def test_accumulation_and_compilation_make_no_difference(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    model = classifier()
    model.backbone.get_submodule("layer1").compile(backend="eager")
    trainer(ExportModel(path=str(tmp_path / "network")), accumulate_grad_batches=3).fit(model, data())
    assert_same(tensors(dl.load(tmp_path / "network.safetensors")), tensors(model.backbone))


@pytest.mark.own_process
@pytest.mark.slow
def test_two_processes_write_one_file(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Alone(ExportModel):
        """Notes which process writes after training."""

        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_fit_end(trainer, pl_module)
            if trainer.is_global_zero:
                assert (tmp_path / "network.safetensors").is_file()
            (tmp_path / f"{trainer.global_rank}.done").touch()

        def _write(self, network: nn.Module, module: LightningModule, path: Path, *options: Any, **named: Any) -> Any:
            if path.parent == tmp_path:
                assert module.trainer.is_global_zero
            return super()._write(network, module, path, *options, **named)

    options = {"devices": 2, "strategy": "ddp_fork", "enable_checkpointing": True, "max_epochs": 2}
    recalibration = BatchNormRecalibration(2, ["export"])
    trainer(Alone(path=str(tmp_path / "network")), recalibration, *best(), **options).fit(classifier(), data(), data())
    assert {path.name for path in tmp_path.glob("*.done")} == {"0.done", "1.done"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    stored = of_backbone(torch.load(checkpoint, weights_only=True)["state_dict"])
    exported = tensors(dl.load(tmp_path / "network.safetensors"))
    differing = {name for name, value in stored.items() if not torch.equal(value, exported[name])}
    assert differing
    assert all("running" in name for name in differing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier(binary=None), "has no record of a surgery; call binarize_"),
        (lambda: _changed(), "the model differs from timm.create_model"),
    ],
)
def test_what_cannot_be_exported_fails_before_training(
    make: Callable[[], LightningModule], message: str, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    model = make()
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        trainer(ExportModel(path=str(tmp_path / "network"))).fit(model, data())
    assert_same(tensors(model), before)
    assert not list(tmp_path.iterdir())


def _changed() -> DesignClassifier:
    model = classifier()
    model.backbone.fc = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 2))
    return model


def test_somebodys_module_around_a_network_of_timm(
    trainer: Callable[..., Trainer], plain: Callable[[nn.Module], LightningModule], tmp_path: Path
) -> None:
    import timm

    network = timm.create_model("test_resnet", num_classes=2)
    binarize_(network)
    model = plain(network)
    model.backbone = network
    trainer(ExportModel(path=str(tmp_path / "network")), limit_train_batches=1).fit(model, data())
    assert_same(tensors(dl.load(tmp_path / "network.safetensors")), tensors(network))


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown export format 'onxx': did you mean 'onnx'"):
        ExportModel(["safetensors", "onxx"])
    with pytest.raises(ValueError, match="formats is empty, so nothing would be exported: name some of safetensors"):
        ExportModel([])


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_format_without_its_package_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == package else found(n, *rest) or True)
    with pytest.raises(ImportError, match=rf"'{name}' needs .*{package}.*: pip install 'design-lightning\[export\]'"):
        ExportModel([name])


@pytest.mark.filterwarnings("ignore:.*not synchronized")
@pytest.mark.slow
def test_every_format_of_a_network_that_is_binary_at_the_end_alone(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Binarize(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            set_stage_(pl_module, "both")

    model = classifier(class_names=["cat", "dog"], mean=[0.5] * 3, std=[0.25] * 3)
    set_stage_(model.backbone, "activations")
    export = ExportModel(["packed", "onnx", "openvino"], str(tmp_path / "network"), images=20)
    trainer(export, Binarize()).fit(model, data(), data())
    output = capsys.readouterr().out
    assert "compared with PyTorch on 20 images" in output
    model.eval()
    with torch.no_grad():
        expected = model(IMAGES)
    for suffix in (".packed.safetensors", ".onnx", ".xml"):
        network = open_exported(tmp_path / f"network{suffix}")
        torch.testing.assert_close(network(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert network.about.labels == ("cat", "dog")
        assert network.about.std == (0.25, 0.25, 0.25)
        assert network.about.training["backbone"] == "resnet20_cifar"
        assert f"network{suffix}" in output.replace("\n", "")


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None], tmp_path: Path) -> None:
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0")
    run_with_yaml("fit", "ExportModel", *options, path="exported/network")
    network = dl.load(tmp_path / "exported" / "network.safetensors")
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_files_are_compared_on_images_as_the_network_gets_them(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor | None] = []

    def note(network: nn.Module, path: Path, formats: Any, images: Tensor | None = None, **options: Any) -> Any:
        given.append(images)
        return dl.export_model(network, path, formats, images, **options)

    monkeypatch.setattr("design_lightning.callbacks.export_model.export_model", note)
    data = FashionMNISTSubset(batch_size=8)
    callback = ExportModel(path=str(tmp_path / "network"), images=12)
    limits = {"limit_train_batches": 2, "limit_val_batches": 1}
    trainer(callback, **limits).fit(classifier(input_size=(1, 32, 32), num_classes=10), data)
    images = given[-1]
    assert images is not None
    torch.testing.assert_close(images, data.normalize(data.samples("val").images[:12]))
