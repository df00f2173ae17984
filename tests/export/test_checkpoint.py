"""`dl.save` and `dl.load`: one file without pickle rebuilds the network, or says why it cannot."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from torch import nn

import design_lightning as dl
from design_lightning.surgery import binary_layers


def binarized(name: str = "test_resnet", config: dl.BinaryConfig | None = None, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, **arguments})
    dl.binarize_(model, config)
    return model


@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        ("test_resnet", dl.BinaryConfig(), {}),
        ("test_resnet", dl.BinaryConfig(policy="reactnet", stage="activations"), {"in_chans": 1}),
        ("test_vit", dl.BinaryConfig(weight="recu", estimator="ede", learn_kernel=True), {"img_size": 64}),
        ("test_efficientnet_evos", dl.BinaryConfig(weight="learned"), {"num_classes": 0}),
        ("resnet20_cifar", dl.BinaryConfig(kernel=[[[0.1, 0.2], [0.3, 0.4]]], overrides={"layer3*": None}), {}),
        ("test_resnet", dl.BinaryConfig(policy="everything"), {"features_only": True}),
    ],
)
def test_round_trip(tmp_path: Path, name: str, config: dl.BinaryConfig, arguments: dict[str, object]) -> None:
    model = binarized(name, config, **arguments).eval()
    given = {k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans")}  # which the model tells
    again = dl.load(dl.save(model, tmp_path / "model.safetensors", given))
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, arguments.get("in_chans", 3), 64, 64)
    with torch.no_grad():
        for first, second in zip(model(x), again(x), strict=True):
            assert torch.equal(first, second)
    assert {n: layer.stage for n, layer in binary_layers(again).items()} == dict.fromkeys(
        binary_layers(model), config.stage
    )
    assert not list(tmp_path.glob("*.part"))


def test_metadata_is_plain_json_with_a_version(tmp_path: Path) -> None:
    path = dl.save(binarized(), tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["design_lightning"])
    assert stored["format_version"] == 1
    assert stored["architecture"] == "test_resnet"
    assert stored["model_args"] == {"num_classes": 10}
    assert dl.BinaryConfig.from_dict(stored["binary"]) == dl.BinaryConfig()


def test_half_precision_stays_and_thresholds_stay_float32(tmp_path: Path) -> None:
    model = binarized().half()
    again = dl.load(dl.save(model, tmp_path / "model.safetensors"))
    types = {n: t.dtype for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    assert {n: t.dtype for n, t in again.state_dict().items() if isinstance(t, torch.Tensor)} == types
    assert torch.float32 in types.values()
    assert torch.float16 in types.values()


def test_another_number_of_classes_keeps_the_body(tmp_path: Path) -> None:
    model = binarized()
    path = dl.save(model, tmp_path / "model.safetensors")
    again = dl.load(path, num_classes=7)
    assert again(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    layers = binary_layers(again)
    assert layers.keys() == binary_layers(model).keys()
    for name, layer in binary_layers(model).items():
        assert torch.equal(layers[name].weight, layer.weight)
    again.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert again.get_classifier().weight.grad is not None
    second = dl.save(again, tmp_path / "second.safetensors")
    assert dl.load(second).num_classes == 7


def test_checkpoint_of_a_training_run(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 4)
    module = dl.DesignClassifier("test_resnet", num_classes=4)
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **options)
    trainer.fit(module, DataLoader(data, 4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(dl.load(tmp_path / "run.ckpt")(x), module.backbone.eval()(x))
    assert dl.load(tmp_path / "run.ckpt", num_classes=9)(x).shape == (2, 9)


def test_what_cannot_be_rebuilt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="no record of a surgery"):
        dl.save(timm.create_model("test_resnet"), path)
    with pytest.raises(ValueError, match=r"differs from timm.create_model\('test_resnet'.* in 2 tensors.*'fc.weight"):
        dl.save(binarized(), path, {"num_classes": 5})
    with pytest.raises(ValueError, match="do not rebuild it"):
        dl.save(binarized(), path, {"no_such_argument": 1})
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    dl.binarize_(plain, example_input=(2, 3, 9, 9))
    with pytest.raises(ValueError, match="Sequential is no network of timm"):
        dl.save(plain, path)
    model = binarized()
    dl.unbinarize_(model)
    with pytest.raises(ValueError, match="no record of a surgery"):
        dl.save(model, path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        dl.load(tmp_path / "gone.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="holds no binarized network"):
        dl.load(foreign)
    path = dl.save(binarized(), tmp_path / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut off perhaps"):
        dl.load(cut)


def test_newer_formats_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    path = dl.save(binarized(), tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["design_lightning"])
    tensors = safetensors.torch.load_file(path)
    newer = tmp_path / "newer.safetensors"
    safetensors.torch.save_file(tensors, newer, {"design_lightning": json.dumps({**stored, "format_version": 2})})
    with pytest.raises(ValueError, match="format version 2, but this release reads 1"):
        dl.load(newer)
    fewer = tmp_path / "fewer.safetensors"
    safetensors.torch.save_file(
        {k: v for k, v in tensors.items() if k != "conv1.0.weight"},
        fewer,
        {"design_lightning": json.dumps(stored)},
    )
    with pytest.raises(ValueError, match=r"does not fit the test_resnet of timm .* Missing key"):
        dl.load(fewer)


def test_no_classifier_to_replace(tmp_path: Path) -> None:
    model = binarized(features_only=True)
    path = dl.save(model, tmp_path / "model.safetensors", {"features_only": True})
    with pytest.raises(ValueError, match="has no classifier"):
        dl.load(path, num_classes=3)
