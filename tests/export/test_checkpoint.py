"""`dl.save` and `dl.load`: one file without pickle rebuilds the network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from torch import nn

import design_lightning as dl
from design_lightning.export.seal import seal_of_tensors
from design_lightning.surgery import binary_layers, set_stage_

Make = Callable[..., nn.Module]


@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        ("test_resnet", dl.BinaryConfig(), {}),
        ("test_resnet", dl.BinaryConfig(policy="reactnet", stage="activations"), {"in_chans": 1}),
        ("test_vit", dl.BinaryConfig(weight="recu", estimator="ede", learn_kernel=True), {"img_size": 64}),
        ("test_efficientnet_evos", dl.BinaryConfig(weight="learned"), {"num_classes": 0}),
        ("resnet20_cifar", dl.BinaryConfig(kernel=[[[0.1, 0.2], [0.3, 0.4]]], overrides={"layer3*": None}), {}),
        ("test_resnet", dl.BinaryConfig(policy="everything"), {"features_only": True}),
        ("test_resnet", dl.BinaryConfig(), {"features_only": True, "out_indices": (1, 4)}),
        ("test_resnet", dl.BinaryConfig(), {"global_pool": "max", "act_layer": "gelu", "output_stride": 8}),
    ],
)
def test_round_trip(
    tmp_path: Path, binarized: Make, name: str, config: dl.BinaryConfig, arguments: dict[str, object]
) -> None:
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


def test_metadata_is_plain_json_with_a_version(tmp_path: Path, binarized: Make) -> None:
    path = dl.save(binarized(), tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["design_lightning"])
    assert stored["format_version"] == 2
    assert stored["architecture"] == "test_resnet"
    assert stored["model_args"] == {"num_classes": 10}
    assert stored["float_head"] is True
    assert dl.BinaryConfig.from_dict(stored["binary"]) == dl.BinaryConfig()


def types(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_tensor_keeps_its_type(tmp_path: Path, binarized: Make, dtype: torch.dtype) -> None:
    model = binarized(config=dl.BinaryConfig(weight="recu")).to(dtype)
    if dtype != torch.float64:  # which goes with no other type
        norm = model.get_submodule("layer1.0.bn1").float()
        norm.running_mean.add_(1 / 3)  # would be rounded
    again = dl.load(dl.save(model, tmp_path / "model.safetensors"))
    assert types(again) == types(model)
    assert {dtype, torch.float32} <= set(types(again).values())
    assert again.get_submodule("layer1.0.conv1.activation").levels.dtype == torch.float32
    state = model.state_dict()
    for name, value in again.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, state[name])
    parameters = dict(again.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters.values())


def test_thresholds_follow_the_norm_of_the_rebuilt_network(tmp_path: Path, binarized: Make) -> None:
    config = dl.BinaryConfig(scale_by_gamma=True, overrides={"layer*.0.conv1": None, "layer3.0.conv3": None})
    model = binarized(config=config).bfloat16()
    again = dl.load(dl.save(model, tmp_path / "model.safetensors"))
    norm, activation = again.get_submodule("layer1.0.bn1"), again.get_submodule("layer1.0.conv2.activation")
    assert activation.gamma_from is norm
    assert norm.weight is dict(again.named_parameters())["layer1.0.bn1.weight"]


def test_tied_weights_come_back_tied(tmp_path: Path, binarized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def tied(name: str, **arguments: Any) -> nn.Module:
        model = create(name, **arguments)
        block = model.layer1[0]
        block.conv2.weight = block.conv1.weight
        return model

    model = binarized()
    block = model.get_submodule("layer1.0")
    block.conv2.weight = block.conv1.weight
    with pytest.raises(
        ValueError, match=r"tensor 'layer1.0.conv2.weight' is that of 'layer1.0.conv1.weight', but that of"
    ):
        dl.save(model, tmp_path / "model.safetensors")
    monkeypatch.setattr(timm, "create_model", tied)
    block = dl.load(dl.save(binarized().bfloat16(), tmp_path / "model.safetensors")).get_submodule("layer1.0")
    assert block.conv2.weight is block.conv1.weight
    model = binarized()
    conv = model.get_submodule("layer1.0.conv2")
    conv.weight = nn.Parameter(conv.weight.detach().clone())
    with pytest.raises(ValueError, match=r"'layer1.0.conv2.weight' is that of 'layer1.0.conv2.weight', but that of"):
        dl.save(model, tmp_path / "model.safetensors")


def test_another_number_of_classes_keeps_the_body(tmp_path: Path, binarized: Make) -> None:
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
    assert dl.load(path, num_classes=0)(torch.randn(2, 3, 64, 64)).shape == (2, 96)
    with pytest.raises(ValueError, match="num_classes is -1; give 0 for no classifier"):
        dl.load(path, num_classes=-1)


@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224"])
def test_classifier_that_took_the_place_of_a_binary_one(tmp_path: Path, binarized: Make, name: str) -> None:
    arguments = {"img_size": 32, "depth": 1} if "deit" in name else {}
    model = binarized(name, dl.BinaryConfig(policy="everything"), **arguments).eval()
    before = dl.save(model, tmp_path / "before.safetensors", arguments)
    model.reset_classifier(7)
    replaced = dl.load(dl.save(model, tmp_path / "after.safetensors", arguments))
    x = torch.randn(2, 3, 32, 32)
    assert replaced.num_classes == 7
    assert torch.equal(replaced(x), model(x))
    assert binary_layers(replaced).keys() == binary_layers(model).keys()
    assert len(binary_layers(dl.load(before))) > len(binary_layers(model))
    later = dl.load(before, num_classes=7)
    again = dl.load(dl.save(later, tmp_path / "later.safetensors", arguments))
    assert torch.equal(again(x), later(x))


def test_new_classifier_has_the_type_of_the_network(tmp_path: Path, binarized: Make) -> None:
    path = dl.save(binarized().bfloat16(), tmp_path / "model.safetensors")
    again = dl.load(path, num_classes=7)
    assert again(torch.randn(2, 3, 64, 64).bfloat16()).shape == (2, 7)


def test_no_classifier_to_replace(tmp_path: Path, binarized: Make) -> None:
    model = binarized(features_only=True)
    path = dl.save(model, tmp_path / "model.safetensors", {"features_only": True})
    with pytest.raises(ValueError, match="has no classifier"):
        dl.load(path, num_classes=3)


def test_neither_saving_nor_loading_downloads_weights(
    tmp_path: Path, binarized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, create = binarized(), [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: asked.append(given) or create(name, **given))
    sources = {
        "pretrained": True,
        "checkpoint_path": "nowhere.pth",
        "pretrained_cfg": "a_tag",
        "pretrained_cfg_overlay": {"file": "nowhere.bin"},
    }
    path = dl.save(model, tmp_path / "model.safetensors", sources)
    with safe_open(path, "pt") as file:
        text = file.metadata()["design_lightning"]
    stored = json.loads(text)
    assert stored["model_args"] == {"num_classes": 10}
    stored["model_args"].update(sources)
    crafted = tmp_path / "crafted.safetensors"
    tensors, text = safetensors.torch.load_file(path), json.dumps(stored)
    header = {"design_lightning": text, "design_lightning.sha256": seal_of_tensors(tensors, text)}
    safetensors.torch.save_file(tensors, crafted, header)
    dl.load(crafted)
    assert asked == [{"num_classes": 10}] * 2


def test_folder_is_made(tmp_path: Path, binarized: Make) -> None:
    path = dl.save(binarized(), tmp_path / "not" / "there" / "model.safetensors")
    assert path.is_file()
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_tensors_of_any_memory_format(tmp_path: Path, binarized: Make) -> None:
    model = binarized().to(memory_format=torch.channels_last)
    again = dl.load(dl.save(model, tmp_path / "model.safetensors"))
    assert torch.equal(again.get_submodule("layer1.0.conv1").weight, model.get_submodule("layer1.0.conv1").weight)


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


def test_stage_of_each_layer_comes_back(tmp_path: Path, binarized: Make) -> None:
    model = binarized()
    set_stage_(model, "activations")
    model.get_submodule("layer2.0.conv1").set_stage("both")
    again = dl.load(dl.save(model, tmp_path / "model.safetensors"))
    assert [each.stage for each in binary_layers(again).values()] == [e.stage for e in binary_layers(model).values()]


def test_others_may_read_a_file_as_they_may_others(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    dl.binarize_(model)
    (tmp_path / "other").touch()
    path = Path(dl.save(model, tmp_path / "model.safetensors"))
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
