"""`dl.save` writes only what would come back as the very same network, and leaves the network as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import design_lightning as dl

Make = Callable[..., nn.Module]


@pytest.mark.parametrize(
    ("created_with", "message"),
    [
        (
            {"global_pool": "max"},
            r"module 'global_pool.pool' is AdaptiveMaxPool2d.*but AdaptiveAvgPool2d.* when rebuilt",
        ),
        ({"act_layer": "gelu"}, r"module 'layer4.0.act2' is GELU\(.*\), but ReLU"),
        ({"output_stride": 8}, r"module 'layer3.0.conv2' is BinaryConv2d\(.*stride=\(1, 1\).*, but .*stride=\(2, 2\)"),
        ({"drop_path_rate": 0.5}, r"module 'layer2.0.drop_path' is DropPath\(drop_prob=.*\), but not there"),
        (
            {"features_only": True, "out_indices": (1, 4)},
            r"the choice of feature maps is \(1, 4\), but \(0, 1, 2, 3, 4\)",
        ),
        ({"num_classes": 5}, r"2 of \d+ tensors do not fit: 'fc.weight' has the shape \[5, 96\], not \[10, 96\]"),
    ],
)
def test_arguments_that_are_not_told(
    tmp_path: Path, binarized: Make, created_with: dict[str, Any], message: str
) -> None:
    model = binarized(**created_with)
    path = tmp_path / "folder" / "model.safetensors"
    told: dict[str, Any] = {"num_classes": 10} if "num_classes" in created_with else {}
    told |= {"features_only": True} if "features_only" in created_with else {}
    with pytest.raises(
        ValueError, match=rf"the model differs from timm.create_model\('test_resnet', .*{message}.*; pass as model_args"
    ):
        dl.save(model, path, told)
    assert not path.parent.exists()
    dl.save(model, path, created_with)


def test_outputs_tell_what_modules_do_not(tmp_path: Path, binarized: Make) -> None:
    model = binarized()
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match=r"for the same batch its outputs are others: .*Mismatched elements: 20 / 20"):
        dl.save(model, tmp_path / "model.safetensors")
    model.forward = lambda x: (forward(x), x)
    with pytest.raises(ValueError, match="for the same batch its outputs are others"):
        dl.save(model, tmp_path / "model.safetensors")

    assert not list(tmp_path.iterdir())


def test_a_network_whose_forward_fails_is_saved_with_a_warning(
    tmp_path: Path, binarized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no such luck")

    model = binarized().train()
    model.forward = fails
    with pytest.warns(UserWarning, match=r"outputs were not compared .* fails: RuntimeError: no such luck") as caught:
        path = dl.save(model, tmp_path / "model.safetensors")
    assert caught[0].filename == __file__
    assert all(module.training for module in model.modules())
    again = dl.load(path)
    create = timm.create_model

    def create_failing(name: str, **arguments: Any) -> nn.Module:
        network = create(name, **arguments)
        network.global_pool.register_forward_hook(lambda _, inputs, output: None if output.is_meta else 1 / 0)
        return network

    monkeypatch.setattr(timm, "create_model", create_failing)
    with pytest.raises(ValueError, match=r"the rebuilt one's forward fails: ZeroDivisionError"):
        dl.save(again, path)


def test_a_network_that_gives_nan_is_compared_too(tmp_path: Path, binarized: Make) -> None:
    model = binarized()
    model.get_classifier().bias.data[3] = torch.nan
    again = dl.load(dl.save(model, tmp_path / "model.safetensors"))
    assert again(torch.zeros(1, 3, 64, 64)).isnan().tolist() == [[n == 3 for n in range(10)]]


def test_state_random_numbers_and_modes_stay(tmp_path: Path, binarized: Make) -> None:
    model = binarized("test_vit", img_size=64).train()
    model.get_submodule("blocks.0").eval()
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()
    dl.load(dl.save(model, tmp_path / "model.safetensors", {"img_size": 64}))
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_compiled_parts_are_not_compiled_for_it(tmp_path: Path, binarized: Make) -> None:
    def never(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise AssertionError("compiled")

    model = binarized()
    model.get_submodule("layer1").compile(backend=never)
    dl.save(model, tmp_path / "model.safetensors")


def test_synchronised_batch_norms_count_as_batch_norms(tmp_path: Path, binarized: Make) -> None:
    model = binarized(config=dl.BinaryConfig(policy="reactnet")).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    path = dl.save(converted, tmp_path / "model.safetensors")
    assert torch.equal(dl.load(path)(x), expected)
    assert torch.equal(converted(x), expected)


def test_an_annealed_network_is_the_same_one(tmp_path: Path, binarized: Make) -> None:
    model = binarized(config=dl.BinaryConfig(estimator="ede", weight="recu"))
    activation = model.get_submodule("layer1.0.conv1.activation")
    activation.scale.fill_(0.25)
    activation.unit.fill_(3)
    activation.estimator.temperature.fill_(7)
    model.get_submodule("layer1.0.conv1.weight_binarizer").tau.fill_(0.95)
    again = dl.load(dl.save(model, tmp_path / "model.safetensors"))
    assert again.get_submodule("layer1.0.conv1").extra_repr() == model.get_submodule("layer1.0.conv1").extra_repr()
    assert str(again.get_submodule("layer1.0.conv1")) == str(model.get_submodule("layer1.0.conv1"))


def test_what_cannot_be_rebuilt_is_refused(tmp_path: Path, binarized: Make) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="no record of a surgery"):
        dl.save(timm.create_model("test_resnet"), path)
    with pytest.raises(ValueError, match=r"and binarize_ do not rebuild it: TypeError: .*no_such_argument"):
        dl.save(binarized(), path, {"no_such_argument": 1})
    with pytest.raises(ValueError, match="must be plain values that JSON can hold"):
        dl.save(binarized(), path, {"act_layer": nn.ReLU})
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    dl.binarize_(plain, example_input=(2, 3, 9, 9))
    with pytest.raises(ValueError, match="Sequential is no network of timm"):
        dl.save(plain, path)
    model = binarized()
    dl.unbinarize_(model)
    with pytest.raises(ValueError, match="no record of a surgery"):
        dl.save(model, path)
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    dl.binarize_(model)
    with pytest.raises(ValueError, match="the test_resnet is on meta and has no values"):
        dl.save(model, path)
    assert not list(tmp_path.iterdir())
