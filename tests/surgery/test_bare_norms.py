"""Norms whose formula holds an activation: what is left for a companion is the norm, against a slow reference."""

from collections.abc import Callable

import pytest
import timm.layers
import torch
from torch import Tensor, nn

import design_lightning as dl


def batch_deviation(x: Tensor, _: nn.Module) -> Tensor:
    return x / (x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False) + 1e-3).sqrt().view(1, -1, 1, 1)


def group_deviation(x: Tensor, norm: nn.Module) -> Tensor:
    out = torch.empty_like(x)
    size = x.shape[1] // norm.groups
    for image in range(len(x)):
        for group in range(norm.groups):
            part = x[image, group * size : (group + 1) * size]
            out[image, group * size : (group + 1) * size] = part / (part.var(unbiased=False) + norm.eps).sqrt()
    return out


def root_mean_square(x: Tensor, norm: nn.Module) -> Tensor:
    return x / (x.square().mean((2, 3), keepdim=True) + norm.eps).sqrt()


CASES: dict[type[nn.Module], Callable[[Tensor, nn.Module], Tensor]] = {
    timm.layers.EvoNorm2dB0: batch_deviation,
    timm.layers.EvoNorm2dS0: group_deviation,
    timm.layers.EvoNorm2dS0a: group_deviation,
    timm.layers.FilterResponseNormTlu2d: root_mean_square,
}


def binarized(kind: type[nn.Module], **options: object) -> tuple[nn.Sequential, dl.BinarizationReport, nn.Module]:
    groups = {"groups": 4} if "S0" in kind.__name__ else {}
    norm = kind(8, **groups)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    return model, dl.binarize_(model, dl.BinaryConfig(**options), example_input=torch.randn(4, 3, 10, 10)), norm


@pytest.mark.parametrize("companion", ["hardtanh", "identity", "rprelu"])
@pytest.mark.parametrize("kind", CASES)
def test_the_norm_stays_and_the_companion_takes_the_activations_place(kind: type[nn.Module], companion: str) -> None:
    model, report, norm = binarized(kind, companion=companion)
    row = report.rows[1]
    assert (row.rule, row.before) == ("companion", kind.__name__)
    assert row.after.endswith({"hardtanh": "Hardtanh", "identity": "Identity", "rprelu": "RPReLU"}[companion])
    x = torch.randn(4, 8, 6, 6)
    shape = (1, -1, 1, 1)
    expected = CASES[kind](x, norm) * norm.weight.view(shape) + norm.bias.view(shape)
    assert torch.allclose(model[1](x), model[1].act(expected), atol=1e-5)
    assert model[1].weight is norm.weight
    assert not hasattr(model[1], "v")
    assert not hasattr(model[1], "tau")


@pytest.mark.parametrize("kind", [timm.layers.EvoNorm2dB0, timm.layers.EvoNorm2dB1, timm.layers.EvoNorm2dB2])
def test_running_variance_is_kept_as_by_the_float_norm(kind: type[nn.Module]) -> None:
    model, _, _ = binarized(kind)
    reference = kind(8)
    for _ in range(3):
        x = torch.randn(4, 8, 6, 6) * 2
        model[1](x)
        reference(x)
    assert torch.allclose(model[1].running_var, reference.running_var)
    model.eval()
    x = torch.randn(4, 8, 6, 6)
    shape = (1, -1, 1, 1)
    normed = x / (model[1].running_var + model[1].eps).sqrt().view(shape)
    expected = nn.functional.hardtanh(normed * model[1].weight.view(shape) + model[1].bias.view(shape))
    assert torch.allclose(model[1](x), expected, atol=1e-5)


def test_filter_response_norm_without_negative_values_is_noticed() -> None:
    with pytest.raises(ValueError, match="2: its input is never negative"):
        binarized(timm.layers.FilterResponseNormTlu2d, companion="keep", activation="sign")


def test_a_norm_that_applies_no_activation_is_none() -> None:
    norm = timm.layers.EvoNorm2dS0(8, groups=4, apply_act=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    report = dl.binarize_(model, example_input=(4, 3, 10, 10))
    assert "1" not in {row.name for row in report.rows}


def test_shortcut_ends_in_front_of_the_companion() -> None:
    norm = timm.layers.EvoNorm2dS0(8, groups=4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    report = dl.binarize_(model, dl.BinaryConfig(shortcut="bireal"), example_input=torch.randn(4, 3, 10, 10))
    assert report.rows[1].reason.endswith(", shortcut")
    x = torch.randn(4, 3, 10, 10)
    stream = model[0](x)
    shape = (1, -1, 1, 1)
    normed = model[2].normalise(dl.BinaryConv2d.forward(model[1], stream))
    before = normed * norm.weight.view(shape) + norm.bias.view(shape) + stream
    assert torch.allclose(model(x), model[4](model[3](nn.functional.hardtanh(before))), atol=1e-5)
