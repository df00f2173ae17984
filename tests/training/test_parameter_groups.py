"""Every trainable parameter is in exactly one of three groups, and the same one in every stage."""

import timm
import torch
from torch import nn

import design_lightning as dl
from design_lightning.surgery import binary_layers
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
