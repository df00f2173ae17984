"""Counts of a network, stage by stage: by hand, against the papers, and against a file."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import design_lightning as dl
import design_lightning.models  # registers vgg_small
from design_lightning.surgery import BinaryConfig
from design_lightning.surgery.summary import Stage, Summary, short, summarize


def network(name: str, classes: int = 1000) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, num_classes=classes)
    return model


def stages(summary: Summary) -> dict[str, Stage]:
    return {stage.now.name: stage for stage in summary.stages}


class Tiny(nn.Module):
    """Three layers and a parameter of its own; 8 x 8 pixels, then 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(16, 5)
        self.temperature = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.stem(x))).mean((2, 3))) * self.temperature.mean()


def test_a_tiny_network_by_hand() -> None:
    found = summarize(Tiny(), BinaryConfig(), size=(8, 8))
    assert found.input_shape == (3, 8, 8)
    assert list(stages(found)) == ["stem, norm", "body", "head", "(own)"]
    stem, body, head, own = found.stages
    assert (stem.now.layers, stem.now.binary_layers, stem.now.one_bit, stem.now.floats) == (1, 0, 0, 3 * 9 * 8 + 8 + 16)
    assert (stem.now.bops, stem.now.flops, stem.output) == (0, 3 * 9 * 8 * 64, (8, 8, 8))
    weights = 8 * 9 * 16 + 16 * 16
    assert (body.now.layers, body.now.binary_layers, body.now.one_bit, body.now.floats) == (2, 2, weights, 16)
    assert (body.now.bops, body.now.flops, body.output) == (weights * 16, 0, (16, 4, 4))
    assert body.now.scales == 32  # of xnor, one an output channel
    assert body.now.bytes == weights // 8 + 4 * (16 + 32)
    assert (body.before.bops, body.before.flops, body.before.bytes) == (0, weights * 16, 4 * (weights + 16))
    assert (head.now.floats, head.now.flops) == (16 * 5 + 5, 80)
    assert own.now.floats == 3
    every = found.total
    assert every.now.ops == weights * 16 / 64 + 3 * 9 * 8 * 64 + 80
    assert every.before.ops == weights * 16 + 3 * 9 * 8 * 64 + 80
    assert every.now.one_bit + every.now.floats == sum(p.numel() for p in Tiny().parameters())


def test_the_network_given_stays_float() -> None:
    model = Tiny()
    summarize(model, BinaryConfig(), size=(8, 8))
    assert not dl.surgery.binary_layers(model)


@pytest.mark.parametrize("policy", ["conservative", "reactnet"])
def test_resnet18_has_the_operations_that_the_papers_print(policy: str) -> None:
    # ReActNet's comparison of 1-bit ResNet-18s (Bi-Real Net's): 1.68e9 BOPs, 1.39e8 FLOPs, 1.63e8 OPs; float: 1.81e9.
    every = summarize(network("resnet18"), BinaryConfig.from_dict({"policy": policy})).total
    convolutions = 4 * 56**2 * 64 * 64 * 9 + sum(
        size**2 * 9 * (c * c // 2 + 3 * c * c) for size, c in ((28, 128), (14, 256), (7, 512))
    )
    assert every.now.bops == convolutions
    projections = sum(size**2 * c * c // 2 for size, c in ((28, 128), (14, 256), (7, 512)))
    assert every.now.flops == 112**2 * 64 * 3 * 49 + projections + 512 * 1000
    assert every.now.bops == pytest.approx(1.68e9, rel=0.005)
    assert every.now.flops == pytest.approx(1.39e8, rel=0.01)
    assert every.now.ops == pytest.approx(1.63e8, rel=0.01)
    assert every.before.ops == pytest.approx(1.81e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "published"),
    [("swin_tiny_patch4_window7_224", 4.5e9), ("convnext_tiny", 4.5e9), ("mobilenetv3_large_100", 2.19e8)],
)
def test_float_networks_have_the_operations_that_their_papers_print(name: str, published: float) -> None:
    assert summarize(network(name), None).total.before.ops == pytest.approx(published, rel=0.015)


def test_products_of_attention_are_float_operations() -> None:
    found = stages(summarize(network("vit_tiny_patch16_224"), BinaryConfig()))
    assert found["blocks"].now.flops == 12 * 2 * 197 * 197 * 192
    assert found["blocks"].now.bops == 12 * 197 * 12 * 192 * 192


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["conv1, bn1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        ("vit_tiny_patch16_224", ["patch_embed", "blocks", "norm, head", "(own)"]),
        ("convnext_atto", ["stem", *(f"stages.{i}" for i in range(4)), "head"]),
        ("mobilenetv3_small_050", ["conv_stem, bn1", *(f"blocks.{i}" for i in range(6)), "conv_head, classifier"]),
        ("swin_tiny_patch4_window7_224", ["patch_embed", *(f"layers.{i}" for i in range(4)), "norm, head"]),
    ],
)
def test_stages_are_those_of_the_module_tree(name: str, expected: list[str]) -> None:
    model = network(name)
    found = summarize(model, BinaryConfig())
    assert list(stages(found)) == expected
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(s.before.floats for s in found.stages) == parameters


def test_weights_alone_make_no_binary_operation() -> None:
    every = summarize(network("resnet18"), BinaryConfig(activation="none")).total
    assert every.now.bops == 0
    assert every.now.flops == every.before.flops
    assert every.now.bytes < every.before.bytes / 10


def test_bytes_are_those_of_a_packed_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vgg_small", num_classes=10)
    expected = summarize(model, BinaryConfig(), size=(32, 32)).total.now.bytes
    dl.binarize_(model, BinaryConfig(), (2, 3, 32, 32))
    dl.export_model(model, tmp_path / "model", ["packed"], images=torch.randn(2, 3, 32, 32))
    assert (tmp_path / "model.packed.safetensors").stat().st_size == pytest.approx(expected, rel=0.05)


def test_images_that_the_network_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"forward fails, so nothing can be counted.*doesn't match model \(224\)"):
        summarize(network("vit_tiny_patch16_224"), BinaryConfig(), size=(100, 100))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (7, "7"),
        (999, "999"),
        (1000, "1.00k"),
        (9_997, "10.0k"),
        (999_600, "1.00M"),
        (147_456, "147k"),
        (1_676_279_808, "1.68G"),
        (2e15, "2000T"),
    ],
)
def test_numbers_take_five_characters(count: float, text: str) -> None:
    assert short(count) == text
