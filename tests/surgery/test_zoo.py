"""The sweep of `benchmarks/timm_sweep.py` on some of timm: its own test networks, small ones of every kind, every module."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
import zoo
from torch import nn
from torch.nn import functional as F

import design_lightning as dl
from design_lightning.surgery import binary_layers

DIFFERENT = {
    "resnet10t": "a deep stem, average-pooled shortcuts",
    "skresnet18": "selective kernels",
    "resnest14d": "split attention",
    "eca_resnet33ts": "a gate made by Conv1d",
    "lambda_resnet26t": "lambda layers with Conv3d",
    "halonet26t": "local attention by unfold",
    "resnetv2_50d_frn": "filter response norm, which is an activation",
    "regnetz_c16_evos": "evo-norm, which is an activation",
    "tf_efficientnet_b0": "TensorFlow's same padding",
    "tf_mixnet_s": "mixed kernels",
    "mobilenetv3_small_050": "squeeze and excite behind hard sigmoids",
    "ghostnet_050": "ghost modules",
    "regnety_002": "grouped convolutions",
    "densenet121": "concatenation",
    "mobileone_s0": "parallel branches to be folded",
    "repvit_m0_9": "convolutions with their norm in one module",
    "fastvit_t8": "token mixing by convolution",
    "convnext_atto": "linear layers behind channels last",
    "vit_tiny_patch16_224": "tokens on a grid, fused qkv",
    "eva02_tiny_patch14_224": "a qkv layer that is not called, rotary positions, SwiGLU",
    "swin_tiny_patch4_window7_224": "shifted windows",
    "swinv2_cr_tiny_ns_224": "cosine attention",
    "maxvit_rmlp_pico_rw_256": "block and grid attention in a convolutional network",
    "cait_xxs24_224": "layers on attention maps",
    "xcit_nano_12_p16_224": "attention across channels",
    "gmlp_ti16_224": "gated MLPs",
    "mambaout_femto": "gated convolution",
    "sequencer2d_s": "LSTMs",
    "mobilevit_xxs": "convolution and attention in turn",
    "csatv2": "a cosine transform in front",
}


def assert_passes(row: zoo.Row) -> None:
    assert (row.status, row.reason) == ("pass", "")
    assert row.binary_layers > 0
    assert row.numbers == "real"


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_timms_own_test_networks(name: str) -> None:
    assert_passes(zoo.check_architecture(name))


@pytest.mark.parametrize("name", DIFFERENT)
def test_small_networks_of_different_structure(name: str) -> None:
    assert_passes(zoo.check_architecture(name))


@pytest.mark.parametrize("policy", ["paper", "reactnet", "everything"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet", "test_efficientnet_evos"])
def test_other_policies_rebuild_and_train(name: str, policy: str) -> None:
    architecture = zoo.Architecture.of(name)
    model = architecture.build()
    dl.binarize_(model, dl.BinaryConfig(policy=policy), architecture.batch())  # type: ignore[arg-type]
    model(architecture.batch()).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_large_networks_run_block_by_block_with_real_numbers() -> None:
    row = zoo.check_architecture("deit_small_patch16_224", real_limit=0)
    assert (row.status, row.reason, row.numbers) == ("pass", "", "fake, real by block")
    assert row.blocks >= 12


def test_the_row_tells_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "_loss", lambda output: 1 / 0)
        row = zoo.check_architecture("test_resnet")
    assert row.status == "fail"
    assert row.reason == "the float network fails alike: ZeroDivisionError: division by zero"
    constant = dl.BinaryConfig(activation="sign", companion="keep", skip=["first"])
    row = zoo.check_architecture("test_resnet", constant)
    assert row.status == "fail"
    assert "never negative" in row.reason
    dead = dl.BinaryConfig(kernel=[[1e6]])
    row = zoo.check_architecture("test_resnet", dead)
    assert "binarizers are constant" in row.reason


def smallest_of_each_module() -> dict[str, str]:
    """From each module of `timm.models` to its smallest network, by the committed table; new ones by name."""
    table = Path(__file__).parents[2] / "benchmarks" / "results" / "timm_sweep.csv"
    with table.open(newline="") as file:
        sizes = {row["name"]: int(row["parameters"]) for row in csv.DictReader(file)}
    members = defaultdict(list)
    for module in timm.list_modules():
        members[module] += timm.list_models(module=module)
    return {
        module: min(names, key=lambda name: (sizes.get(name, 10**12), name))
        for module, names in members.items()
        if names
    }


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), smallest_of_each_module().items())
def test_one_member_of_every_module_of_timm(module: str, name: str) -> None:
    row = zoo.check_architecture(name)
    assert (row.status, row.reason) == ("pass", "")


def test_the_table_has_a_row_that_passes_for_every_architecture_of_its_timm() -> None:
    table = Path(__file__).parents[2] / "benchmarks" / "results" / "timm_sweep.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(int(row["binary_layers"]) > 0 for row in rows)
    assert {row["name"] for row in rows if row["status"] != "pass" and "fails alike" not in row["reason"]} == set()
    if {row["timm"] for row in rows} == {timm.__version__}:
        assert {row["name"] for row in rows} == set(timm.list_models()) - {"resnet18_cifar", "resnet20_cifar"}


class Segmenter(nn.Module):
    """A head on the feature maps of a binarized network: each to a few channels, to the input's size, and summed."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(nn.Conv2d(channels, 2, 1) for channels in features.feature_info.channels())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = zip(self.heads, self.features(x), strict=True)
        return sum(F.interpolate(head(m), x.shape[-2:], mode="bilinear") for head, m in maps)


def test_segmentation_head_on_binary_features_learns() -> None:
    torch.manual_seed(0)
    features = timm.create_model("test_resnet", features_only=True)
    dl.binarize_(features)
    model = Segmenter(features).train()
    assert binary_layers(model)
    images, masks = torch.randn(8, 3, 64, 64) * 0.3, torch.zeros(8, 64, 64, dtype=torch.long)
    for i in range(8):  # a bright square somewhere
        top, left = torch.randint(0, 40, (2,)).tolist()
        images[i, :, top : top + 24, left : left + 24] += 1
        masks[i, top : top + 24, left : left + 24] = 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    accuracy = (model(images).argmax(1) == masks).float().mean()
    assert accuracy > 0.95


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_a_binarized_network_takes_another_head(name: str) -> None:
    model = timm.create_model(name, num_classes=5)
    dl.binarize_(model)
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    assert model(x).shape == (2, 5)
    layers = list(binary_layers(model))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).dim() == 2
    assert list(binary_layers(model)) == layers
