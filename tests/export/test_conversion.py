"""`convert_`: weights +-1, batch norm folded into thresholds of sums and affines, and nothing else changed."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.binary import BinaryActivation
from design_lightning.binary.packed import SumThreshold
from design_lightning.export.chains import sums_of
from design_lightning.surgery.packing import packed_layers


class Chain(nn.Module):
    """Binary convolutions behind each other, with what may stand between, and a shortcut at the end."""

    def __init__(self, act: nn.Module | None = None, pool: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm1 = nn.BatchNorm2d(16)
        self.act1 = act or nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.act1(self.norm1(self.pool(self.conv1(x))))
        x = self.act2(self.norm2(self.conv2(x)))
        x = x[:, :, :8, :8] + self.norm3(self.conv3(x))[:, :, :8, :8]
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(4, 3, 21, 21, generator=torch.Generator().manual_seed(1))


def binarized(model: nn.Module, **config: Any) -> nn.Module:
    """Binarized, with gammas of both signs, some of them 0, and statistics of its own input."""
    torch.manual_seed(0)
    dl.binarize_(model, dl.BinaryConfig(**config), IMAGES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.weight.data[::5] = 0
            module.momentum = None
    model.train()(IMAGES)
    return model.eval()


def bits_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What every binary activation gives, in the order of their calls."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output.clone()))
        for module in model.modules()
        if isinstance(module, BinaryActivation)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"kernel": "3x3x4_shifted_v1", "align": "center"}, {}),
        ({"kernel": "2x2x2_complement_v1", "companion": "prelu"}, {}),
        ({"activation": "sign", "weight": "sign", "padding_value": 1}, {}),
        ({"activation": "rsign", "companion": "identity"}, {}),
        ({"kernel": "3x3_symmetric_v1"}, {"pool": True}),
        ({"companion": "rprelu", "scale": 0.5}, {"pool": True}),
    ],
    ids=str,
)
def test_bits_and_outputs_stay_what_they_were(config: dict[str, Any], options: dict[str, Any]) -> None:
    model = binarized(Chain(**options), **config)
    before = copy.deepcopy(model)
    conversion = dl.convert_(model, IMAGES)
    assert [row.output for row in conversion.layers] == ["thresholds", "affine", "affine"]
    turned = int((before.get_submodule("norm1").weight < 0).sum())  # type: ignore[operator]
    assert 0 < conversion.layers[0].turned <= turned
    assert conversion.layers[0].constant >= 4  # those with a gamma of 0
    assert conversion.difference < 1e-5
    unseen = torch.randn(8, 3, 25, 25)
    ours, theirs = bits_of(model, unseen), bits_of(before, unseen)
    assert len(ours) == len(theirs) == 3
    assert torch.equal(ours[1], theirs[1])  # by whole numbers
    assert (ours[2] != theirs[2]).float().mean() < 1e-3  # by an affine: ties aside
    with torch.no_grad():
        torch.testing.assert_close(model(unseen), before(unseen), rtol=1e-3, atol=1e-3)


def test_what_is_folded_is_gone() -> None:
    model = binarized(Chain())
    dl.convert_(model, IMAGES)
    layers = packed_layers(model)
    assert list(layers) == ["conv1", "conv2", "conv3"]
    assert layers["conv1"].scale is None
    assert layers["conv1"].bias is None
    assert isinstance(layers["conv2"].activation, SumThreshold)
    assert layers["conv2"].activation.levels.shape == (16, 2, 2)
    assert layers["conv2"].activation.levels.frac().abs().unique().tolist() == [0.5]
    assert layers["conv3"].bias is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert {tuple(layer.signs.unique().tolist()) for layer in layers.values()} == {(-1, 1)}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reasons_are_given() -> None:
    model = binarized(Chain(), companion="prelu")
    model.get_submodule("act1").weight.data.fill_(-0.5)  # type: ignore[operator, union-attr]  # falls, and then rises
    seen: list[Tensor] = []
    model.get_submodule("norm2").register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    conversion = dl.convert_(model, IMAGES)
    rows = {row.name: row for row in conversion.layers}
    assert rows["conv1"].reason == "what stands behind it is not monotone"
    assert rows["conv1"].output == "affine"
    assert rows["conv2"].output == "scaled"
    assert "added, or read by several" in rows["conv3"].reason
    assert "3 binary layers" in str(conversion)
    count = len(seen)
    with torch.no_grad():
        model(IMAGES)
    assert len(seen) == count + 1  # the hook is where it was


def test_without_folding_outputs_are_equal_bit_for_bit() -> None:
    model = binarized(Chain())
    with torch.no_grad():
        expected = model(IMAGES)
    conversion = dl.convert_(model, IMAGES, fold=False)
    assert conversion.difference == 0
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected)


def test_a_network_of_timm_by_its_probe_and_then_no_checkpoint(tmp_path: Any) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    dl.binarize_(model)
    conversion = dl.convert_(model)
    assert {row.output for row in conversion.layers} == {"thresholds", "affine"}
    with pytest.raises(ValueError, match="convert_ folded batch norms of the ResNet, so its name no longer rebuilds"):
        dl.save(model, tmp_path / "model.safetensors")
    again = dl.convert_(model)
    assert again.layers == conversion.layers
    assert "binary layers, converted already: " in str(again)
    assert "converted already" not in str(conversion)


def test_other_types_are_refused_where_batch_norm_is_folded() -> None:
    model = binarized(Chain()).bfloat16()
    with pytest.raises(
        ValueError, match=r"'stem.weight' is torch.bfloat16, .* call model.float\(\) first, or pass fold"
    ):
        dl.convert_(model, IMAGES.bfloat16())
    dl.convert_(copy.deepcopy(model), IMAGES.bfloat16(), fold=False)
    assert {row.output for row in dl.convert_(model.float(), IMAGES).layers} == {"thresholds", "affine"}


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = binarized(Chain())
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    monkeypatch.setattr("design_lightning.export.conversion.sums_of", lambda layer: sums_of(layer) + 9)
    with pytest.raises(ValueError, match="bits of 'conv2' changed, so nothing is converted"):
        dl.convert_(model, IMAGES)
    assert {name for name, value in model.state_dict().items() if isinstance(value, Tensor)} == set(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)
    dl.set_stage_(model, "activations")
    with pytest.raises(
        ValueError, match="'conv1' cannot be packed: its weights are real-valued in stage 'activations'"
    ):
        dl.convert_(model, IMAGES)
    with pytest.raises(ValueError, match="no size of input is known for Linear; pass example_input"):
        dl.convert_(nn.Linear(3, 3))
