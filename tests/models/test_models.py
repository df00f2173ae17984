"""The networks that this package adds to timm: built by name, trained for a step, counted, and given other heads."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import design_lightning.models as models
from design_lightning.models._common import scaled

NAMES = [name for name in models.__all__ if name[0].islower()]
RESNETS = [name for name in NAMES if "resnet" in name]
VGGS = [name for name in NAMES if "vgg" in name]


def create(name: str, width: float = 0.25, **arguments: Any) -> Any:
    return timm.create_model(name, width=width, **arguments)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convolution(fan_in: int, out: int, size: int = 3) -> int:
    """A convolution without bias, and the batch norm behind it."""
    return fan_in * out * size**2 + 2 * out


def vgg_body(c: list[int], in_chans: int = 3) -> int:
    chain = [in_chans, c[0], c[0], c[1], c[1], c[2], c[2]]
    return sum(convolution(fan_in, out) for fan_in, out in itertools.pairwise(chain))


def resnet(blocks: int, c: list[int], classes: int = 10, projection: bool = True) -> int:
    total = convolution(3, c[0])
    for fan_in, out in zip([c[0], *c[:-1]], c, strict=True):
        total += convolution(fan_in, out) + (2 * blocks - 1) * convolution(out, out)
        total += convolution(fan_in, out, size=1) if projection and fan_in != out else 0
    return total + (c[-1] + 1) * classes


COUNTS = {
    "vgg_small": vgg_body([128, 256, 512]) + (512 * 16 + 1) * 10,
    "bnn_vgg": vgg_body([128, 256, 512]) + 512 * 16 * 1024 + 2 * 1024 + 1024**2 + 2 * 1024 + 1024 * 10 + 2 * 10,
    "resnet20_cifar": resnet(3, [16, 32, 64], projection=False),
    "resnet18_cifar": resnet(2, [64, 128, 256, 512]),
}


def test_every_network_is_registered_and_hides_none_of_timm_s() -> None:
    assert len(NAMES) == 4
    for name in NAMES:
        assert timm.is_model(name)
        assert Path(timm.model_entrypoint(name).__code__.co_filename).is_relative_to(Path(models.__file__).parent)
        assert not any(Path(timm.models.__file__).parent.glob(f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
class TestEveryNetwork:
    def test_it_has_as_many_parameters_as_the_arithmetic_says(self, name: str) -> None:
        assert parameters(create(name, width=1.0)) == COUNTS[name]

    def test_a_step_reaches_every_parameter(self, name: str) -> None:
        model = create(name)
        logits = model(torch.randn(4, 3, 32, 32))
        assert logits.shape == (4, 10)
        nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0, key

    def test_larger_images(self, name: str) -> None:
        assert create(name)(torch.randn(2, 3, 96, 96)).shape == (2, 10)  # STL-10

    def test_width_is_a_factor_of_every_layer(self, name: str) -> None:
        full, quarter = create(name, width=1.0), create(name, width=0.25)
        for (key, module), narrow in zip(full.named_modules(), quarter.modules(), strict=True):
            if isinstance(module, nn.Conv2d):
                assert narrow.out_channels == module.out_channels // 4, key
        for hidden, narrow in zip(getattr(full, "hidden", []), getattr(quarter, "hidden", []), strict=True):
            if isinstance(hidden, nn.Linear):
                assert narrow.out_features == hidden.out_features // 4

    def test_norms_without_a_learned_scale_and_shift(self, name: str) -> None:
        model = create(name, norm_affine=False)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        assert len(norms) == len([m for m in create(name).modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)])
        assert all(norm.weight is None and norm.bias is None for norm in norms)
        learned = sum(2 * norm.num_features for norm in norms)
        assert parameters(create(name)) - parameters(model) == learned > 0

    @pytest.mark.parametrize("width", [0.0, -1.0])
    def test_a_width_that_is_not_positive_is_named(self, name: str, width: float) -> None:
        with pytest.raises(ValueError, match=f"width must be positive, not {width}"):
            create(name, width=width)

    def test_classes_and_channels(self, name: str) -> None:
        model = create(name, num_classes=7, in_chans=1)
        assert model.num_classes == 7
        assert model.in_chans == 1
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)

    def test_what_timm_keeps_about_it_is_true(self, name: str) -> None:
        model = create(name)
        cfg = model.pretrained_cfg
        assert cfg["architecture"] == name
        assert cfg["input_size"] == (3, 32, 32)
        assert cfg["num_classes"] == 10
        assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
        assert model.get_submodule(cfg["first_conv"]).in_channels == 3
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
        assert model.forward_features(torch.randn(1, *cfg["input_size"])).shape[-2:] == cfg["pool_size"]

    def test_the_head_comes_apart(self, name: str) -> None:
        model = create(name).eval()
        x = torch.randn(2, 3, 32, 32)
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        before = model.forward_head(features, pre_logits=True)
        assert before.shape == (2, model.head_hidden_size)
        logits = model.get_classifier()(before)
        torch.testing.assert_close(getattr(model, "fc_norm", nn.Identity())(logits), model(x))

    def test_the_classifier_can_be_reset(self, name: str) -> None:
        model = create(name).eval()
        x = torch.randn(2, 3, 32, 32)
        body = model.forward_features(x)
        model.reset_classifier(5)
        assert model.num_classes == 5
        assert model(x).shape == (2, 5)
        assert model.get_classifier().out_features == 5
        assert model.forward_features(x).equal(body)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        model.reset_classifier(3, "max")
        assert model(x).shape == (2, 3)
        model.reset_classifier(0, "")
        assert model(x).shape == model.forward_features(x).shape
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize("global_pool", ["avg", "max", "catavgmax"])
    def test_pools(self, name: str, global_pool: str) -> None:
        model = create(name, global_pool=global_pool)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)

    def test_without_classes(self, name: str) -> None:
        model = create(name, num_classes=0)
        assert isinstance(model.get_classifier(), nn.Identity)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.head_hidden_size)

    def test_dropout(self, name: str) -> None:
        model = create(name, drop_rate=0.5)
        x = torch.randn(2, 3, 32, 32)
        assert not model(x).equal(model(x))
        assert model.eval()(x).equal(model(x))

    def test_features_only(self, name: str) -> None:
        model = create(name, features_only=True)
        features = model(torch.randn(2, 3, 32, 32))
        assert [f.shape[1] for f in features] == model.feature_info.channels()
        assert [32 // f.shape[-1] for f in features] == model.feature_info.reduction()

    def test_every_activation_is_a_module_of_its_own(self, name: str) -> None:
        for act_layer, kind in [("relu", nn.ReLU), (nn.PReLU, nn.PReLU), (nn.Hardtanh, nn.Hardtanh)]:
            model = create(name, act_layer=act_layer)
            activations = [m for key, m in model.named_modules() if key.split(".")[-1].startswith("act")]
            assert all(type(m) is kind for m in activations)
            calls: list[nn.Module] = []
            for module in activations:
                module.register_forward_hook(lambda module, args, output, calls=calls: calls.append(module))
            model(torch.randn(2, 3, 32, 32))
            assert len(calls) == len(set(calls)) == len(activations)

    def test_pretrained_weights_are_refused(self, name: str) -> None:
        with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}.*pretrained=False"):
            create(name, pretrained=True)

    def test_a_weight_of_its_state_dict_is_loaded(self, name: str) -> None:
        model, other = create(name).eval(), create(name).eval()
        other.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, 32, 32)
        assert other(x).equal(model(x))


@pytest.mark.parametrize("name", RESNETS)
class TestResNets:
    @pytest.mark.parametrize("double_shortcut", [True, False])
    @pytest.mark.parametrize("shortcut", ["conv", "avg", "pad"])
    def test_every_kind_of_shortcut(self, name: str, shortcut: str, double_shortcut: bool) -> None:
        model = create(name, shortcut=shortcut, double_shortcut=double_shortcut)
        for size in (32, 31):
            assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
        has_parameters = [
            parameters(module) > 0 for key, module in model.named_modules() if key.endswith(".downsample")
        ]
        assert any(has_parameters) == (shortcut != "pad")

    def test_a_shortcut_around_every_convolution_carries_the_input(self, name: str) -> None:
        """With all convolutions at zero, only shortcuts are left: a block gives what it gets."""
        for double_shortcut in (True, False):
            block = create(name, double_shortcut=double_shortcut, act_layer=nn.Identity).eval().layer1[0]
            x = torch.randn(1, block.conv1.in_channels, 8, 8)
            block.conv2.weight.data.zero_()
            expected = x + block.bn1(block.conv1(x)) if double_shortcut else x
            torch.testing.assert_close(block(x), expected)

    def test_the_padded_shortcut_takes_every_second_pixel_and_keeps_the_channels_in_the_middle(self, name: str) -> None:
        model = create(name, shortcut="pad")
        downsample = model.layer2[0].downsample
        x = torch.randn(2, model.layer1[0].conv1.in_channels, 7, 7)
        y = downsample(x)
        added = y.shape[1] - x.shape[1]
        assert y.shape == (2, model.layer2[0].conv1.out_channels, 4, 4)
        assert y[:, added // 2 : added // 2 + x.shape[1]].equal(x[:, :, ::2, ::2])
        assert torch.equal(y[y != 0].sort().values, x[:, :, ::2, ::2].flatten().sort().values)

    def test_an_unknown_shortcut_is_named(self, name: str) -> None:
        with pytest.raises(ValueError, match="unknown shortcut 'A': use one of conv, avg, pad"):
            create(name, shortcut="A")


@pytest.mark.parametrize("name", VGGS)
class TestVGGs:
    def test_the_grid_pool_leaves_the_pixels_of_small_images_as_they_are(self, name: str) -> None:
        model = create(name)
        features = torch.randn(2, model.num_features, 4, 4)
        assert model.global_pool(features).equal(features.flatten(1))

    def test_the_pool_stands_between_the_convolution_and_its_norm(self, name: str) -> None:
        for stage in create(name).stages:
            assert [key for key, _ in stage.named_children()] == [
                "conv1",
                "norm1",
                "act1",
                "conv2",
                "pool",
                "norm2",
                "act2",
            ]

    def test_a_classifier_needs_a_pool(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"global_pool='' .* 10 classes need a pool; use 'grid' or 'avg'"):
            create(name, global_pool="")
        model = create(name, global_pool="", num_classes=0)
        with pytest.raises(ValueError, match="5 classes need a pool"):
            model.reset_classifier(5)
        with pytest.raises(ValueError, match="5 classes need a pool"):
            create(name).reset_classifier(5, "")


@pytest.mark.parametrize(
    ("channels", "width", "expected"), [(128, 0.25, 32), (16, 0.25, 4), (64, 0.1, 8), (16, 0.01, 4)]
)
def test_scaled_channels_are_multiples_of_four(channels: int, width: float, expected: int) -> None:
    assert scaled(channels, width) == expected
