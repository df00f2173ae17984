"""Every trainable parameter is in exactly one of three groups, and the same one in every stage."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import design_lightning as dl
from design_lightning.binary import (
    ACTIVATIONS,
    WEIGHT_BINARIZERS,
    BinaryActivation,
    BinaryLinear,
    Sign,
    WeightBinarizer,
)
from design_lightning.surgery import binary_layers
from design_lightning.surgery.config import POLICIES
from design_lightning.training import parameter_groups


def names_of(model: nn.Module) -> dict[str, set[str]]:
    name_of = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model)
    assert [g["name"] for g in groups] == ["latent", "decay", "no_decay"]
    named = {g["name"]: [name_of[id(p)] for p in g["params"]] for g in groups}
    everything = [n for ns in named.values() for n in ns]
    assert sorted(everything) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return {name: set(ns) for name, ns in named.items()}


def test_latent_weights_norms_biases_and_scales_go_where_they_belong() -> None:
    model = timm.create_model("resnet18", num_classes=10)
    dl.binarize_(model, dl.BinaryConfig(weight="learned", companion="rprelu", learn_kernel=True))
    groups = names_of(model)
    assert groups["latent"] == {f"{name}.weight" for name in binary_layers(model)}
    assert groups["decay"] == {"conv1.weight", "fc.weight", *(f"layer{i}.0.downsample.0.weight" for i in (2, 3, 4))}
    for expected in (
        "bn1.weight",
        "fc.bias",
        "layer1.0.conv1.weight_binarizer.alpha",
        "layer1.0.conv1.activation.levels",
    ):
        assert expected in groups["no_decay"]
    assert "act1.before" in groups["no_decay"]


def test_a_gain_of_four_dimensions_and_timms_own_exemptions_have_no_decay() -> None:
    assert any(n.endswith(".gain") for n in names_of(timm.create_model("test_nfnet"))["no_decay"])
    assert {"cls_token", "pos_embed"} <= names_of(timm.create_model("vit_tiny_patch16_224", depth=1))["no_decay"]


def test_groups_do_not_depend_on_the_stage_and_may_be_empty() -> None:
    model = timm.create_model("resnet18")
    assert names_of(model)["latent"] == set()
    dl.binarize_(model, dl.BinaryConfig(activation="rsign"))
    before = names_of(model)
    for stage in ("float", "activations", "both"):
        dl.set_stage_(model, stage)
        assert names_of(model) == before


def test_weight_decay_is_the_optimizers_but_for_no_decay_and_latent() -> None:
    model = timm.create_model("resnet18")
    dl.binarize_(model)
    optimizer = torch.optim.SGD(parameter_groups(model, latent_weight_decay=0.25), lr=0.1, weight_decay=0.5)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.25, 0.5, 0.0]
    optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1, weight_decay=0.5)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.5, 0.0]


def test_frozen_parameters_are_left_out_and_shared_ones_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert names_of(model)["decay"] == {"0.weight"}


FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "test_nfnet": {},
    "vit_tiny_patch16_224": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "resmlp_12_224": {},
}


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The module of each parameter, by the parameter's name."""
    modules = dict(model.named_modules())
    return {name: modules[name.rpartition(".")[0]] for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_of_every_family_puts_each_parameter_into_the_group_of_its_kind(name: str, policy: Any) -> None:
    model = timm.create_model(name, num_classes=10, **FAMILIES[name])
    dl.binarize_(model, dl.BinaryConfig(policy=policy))
    groups, owner = names_of(model), owners(model)
    assert groups["latent"] == {f"{layer}.weight" for layer in binary_layers(model)}
    for parameter in groups["decay"]:
        assert isinstance(owner[parameter], nn.Conv2d | nn.Linear), parameter
        assert parameter.endswith("weight"), parameter
    for parameter in groups["no_decay"]:
        kind = owner[parameter]
        by_shape = model.get_parameter(parameter).numel() <= max(model.get_parameter(parameter).shape, default=1)
        by_timm = parameter.endswith(("cls_token", "pos_embed", "relative_position_bias_table"))
        assert by_shape or by_timm, f"{parameter} of {type(kind).__name__}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
def test_what_a_binarizer_learns_has_no_decay(activation: str, weight: str) -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    dl.binarize_(model, dl.BinaryConfig(activation=activation, weight=weight, learn_kernel=activation == "design"))
    groups, owner = names_of(model), owners(model)
    own = {name for name, module in owner.items() if isinstance(module, BinaryActivation | WeightBinarizer)}
    assert own <= groups["no_decay"]
    learned = {name.rpartition(".")[2] for name in own}
    expected = {"design": {"levels"}, "rsign": {"shift"}}.get(activation, set())
    assert learned == expected | ({"alpha"} if weight in ("learned", "recu") else set())


def test_latent_weights_of_a_standardized_convolution_are_latent_and_its_gain_has_no_decay() -> None:
    model = timm.create_model("test_nfnet", num_classes=10)
    dl.binarize_(model)
    groups = names_of(model)
    layers = binary_layers(model)
    assert layers
    assert {f"{name}.weight" for name in layers} == groups["latent"]
    assert {f"{name}.gain" for name in layers} <= groups["no_decay"]


@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (6, 1, 1, 1), (1, 1, 6), (1, 6, 1, 1)])
def test_a_parameter_along_one_axis_is_a_scale(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(shape))
    assert names_of(model)["no_decay"] == {"scale"}


def test_names_with_a_wildcard_are_exempt_as_in_timm() -> None:
    groups = names_of(timm.create_model("xcit_nano_12_p16_224"))
    assert "pos_embed.token_projection.weight" in groups["no_decay"]
    assert not any(name.startswith("pos_embed") for name in groups["decay"])


def test_latent_weights_shared_by_two_layers_are_one_parameter() -> None:
    model = nn.Sequential(*(BinaryLinear(4, 4, activation=Sign(layout="NHWC")) for _ in range(2)), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert names_of(model)["latent"] == {"0.weight"}


@pytest.mark.parametrize("stage", ["float", "activations", "both"])
def test_state_of_an_optimizer_fits_from_any_stage_to_the_last(stage: Any) -> None:
    def make(of: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = timm.create_model("resnet10t", num_classes=10)
        dl.binarize_(model, dl.BinaryConfig(weight="learned", stage=of))
        return model, torch.optim.SGD(parameter_groups(model, 0.0), lr=0.1, momentum=0.9)

    one, first = make(stage)
    _, last = make("both")
    one(torch.randn(2, 3, 32, 32)).sum().backward()
    first.step()
    last.load_state_dict(first.state_dict())
    assert [len(g["params"]) for g in last.param_groups] == [len(g["params"]) for g in first.param_groups]
    assert [g["name"] for g in last.param_groups] == ["latent", "decay", "no_decay"]
