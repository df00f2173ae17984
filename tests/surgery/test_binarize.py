"""`binarize_` through its public door: what becomes binary, what stays float and why, and that the result trains."""

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.binary import BinaryActivation, BinaryConv2d, BinaryLayer, BinaryLinear, DeSign, Sign
from design_lightning.surgery import BINARY_TWINS, binary_layers

FAMILIES = {
    "resnet18": 64,
    "vgg11_bn": 64,
    "mobilenetv3_small_050": 64,
    "tf_efficientnet_b0": 64,
    "regnety_002": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "resnetv2_50x1_bit": 64,
}


SMALLER: dict[str, dict[str, object]] = {
    "vit_tiny_patch16_224": {"depth": 2},
}
"""Arguments that make a network quicker to test, and change nothing in its kind."""


def make(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    arguments = {**SMALLER.get(name, {}), **arguments}
    return timm.create_model(name, num_classes=10, **arguments)


def rules(report: dl.BinarizationReport) -> dict[str, str]:
    return {row.name: row.rule for row in report.rows}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_and_every_binarizer_gives_plus_minus_one(name: str) -> None:
    model = make(name)
    report = dl.binarize_(model)
    outputs: dict[str, Tensor] = {}
    for layer_name, layer in binary_layers(model).items():
        assert layer.activation is not None
        layer.activation.register_forward_hook(lambda m, i, o, n=layer_name: outputs.__setitem__(n, o.detach()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = {n: layer.weight.detach().clone() for n, layer in binary_layers(model).items()}
    x, target = torch.randn(4, 3, FAMILIES[name], FAMILIES[name]), torch.randint(10, (4,))
    for _ in range(
        2
    ):  # timm starts the last norm of a residual branch at 0, so its weights move from the second step on
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert set(outputs) == {row.name for row in report.binary}
    for output in outputs.values():
        assert bool((output.abs() == 1).all())
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    moved = [n for n, layer in binary_layers(model).items() if not torch.equal(before[n], layer.weight)]
    assert len(moved) >= 0.9 * len(before)


def test_resnet18_report_names_each_layer_and_its_rule() -> None:
    model = make("resnet18")
    report = dl.binarize_(model)
    found = rules(report)
    assert found["conv1"] == "first"
    assert found["fc"] == "last"
    assert {n for n, r in found.items() if r == "downsample"} == {f"layer{i}.0.downsample.0" for i in (2, 3, 4)}
    assert {n for n, r in found.items() if r == "binary"} == {
        f"layer{i}.{b}.conv{c}" for i in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)
    }
    assert found["layer4.1.act2"] == "reaches none"
    assert isinstance(model.layer4[1].act2, nn.ReLU)
    assert isinstance(model.act1, nn.Hardtanh)
    weights = {n for n, m in make("resnet18").named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert weights <= set(found)


def test_operation_counts_are_those_of_the_architecture() -> None:
    report = dl.binarize_(make("resnet18"), example_input=(1, 3, 224, 224))
    # Every 3x3 convolution of ResNet-18 takes 115,605,504 multiply-accumulates, half that with the stride that halves its channels.
    full = 56 * 56 * 64 * 64 * 9
    assert report.binary_macs == 13 * full + 3 * full // 2
    stem, head, projections = 112 * 112 * 64 * 147, 5120, 3 * 28 * 28 * 128 * 64
    assert report.total_macs == report.binary_macs + stem + head + projections
    assert report.bytes_after < report.bytes_before / 15


def test_state_dict_keeps_its_keys_and_the_latent_weights_their_storage() -> None:
    model = make("resnet18")
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    dl.binarize_(model)
    after = {n: p.data_ptr() for n, p in model.named_parameters()}
    assert before == {n: after[n] for n in before}


def test_stage_float_is_the_float_network_with_other_activations() -> None:
    model = make("resnet18", zero_init_last=False).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with pytest.warns(UserWarning, match="16 binarizers"):
        dl.binarize_(model, dl.BinaryConfig(companion="keep", stage="float"), example_input=(1, 3, 64, 64))
    assert torch.equal(model(x), expected)
    dl.set_stage_(model, "both")
    assert not torch.equal(model(x), expected)


def test_set_stage_reaches_every_layer_and_the_state_dict() -> None:
    model = make("resnet18")
    dl.binarize_(model)
    keys = model.state_dict().keys()
    dl.set_stage_(model, "activations")
    assert {layer.stage for layer in binary_layers(model).values()} == {"activations"}
    assert model.state_dict().keys() == keys
    other = make("resnet18")
    dl.binarize_(other)
    other.load_state_dict(model.state_dict())
    assert {layer.stage for layer in binary_layers(other).values()} == {"activations"}
    with pytest.raises(ValueError, match="no binary layer"):
        dl.set_stage_(make("resnet18"), "both")


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "regnety_002", "tf_efficientnet_b0", "resnest14d", "skresnet18"]
)
def test_gates_are_found_by_what_they_do(name: str) -> None:
    model = make(name)
    report = dl.binarize_(model)
    gates = {row.name for row in report.rows if row.rule == "gate"}
    assert gates
    for row in report.binary:
        assert ".se." not in row.name
        assert not row.name.endswith((".fc1", ".fc2", ".fc_reduce", ".fc_select"))


def test_depthwise_and_named_downsampling_stay_float() -> None:
    report = dl.binarize_(make("convnext_atto"))
    found = rules(report)
    assert {r for n, r in found.items() if n.endswith("conv_dw")} == {"depthwise"}
    assert found["stages.1.downsample.1"] == "downsample"


def test_token_grid_of_a_vision_transformer() -> None:
    model = make("vit_tiny_patch16_224")
    dl.binarize_(model)
    activation = model.blocks[0].attn.qkv.activation
    assert activation.grid == (14, 14)
    assert activation.prefix_tokens == 1
    threshold = activation.threshold(torch.zeros(1, 197, 192))
    assert threshold[0].abs().max() == 0
    assert torch.equal(threshold[1:, :1].reshape(14, 14), activation.kernel.tile(1, 14, 14)[0])


def wrapped(wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return wrapper(make("vit_tiny_patch16_224", depth=1, img_size=64))


WITH_GRID: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "no patch_drop": (lambda: make("eva02_tiny_patch14_224", depth=1, img_size=56), 56),
    "an inner module": (lambda: wrapped(lambda vit: nn.Sequential(vit, nn.Linear(10, 2))), 64),
    "DataParallel": (lambda: wrapped(nn.DataParallel), 64),
    "features": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, features_only=True, out_indices=(0,)),
        64,
    ),
}


@pytest.mark.parametrize("case", WITH_GRID)
def test_token_grid_wherever_the_patch_embedding_stands(case: str) -> None:
    build, size = WITH_GRID[case]
    model = build()
    report = dl.binarize_(model, None, (2, 3, size, size))
    activations = [layer.activation for name, layer in binary_layers(model).items() if "blocks." in name]
    assert {(activation.grid, activation.prefix_tokens) for activation in activations} == {((4, 4), 1)}
    assert not any("tokens in a row" in row.reason for row in report.binary)


def test_tokens_without_a_known_grid_are_said_to_stand_in_a_row() -> None:
    report = dl.binarize_(make("pvt_v2_b0", depths=(1, 1, 1, 1)), None, (2, 3, 64, 64))
    words = {row.name: row.reason for row in report.binary}
    assert words["stages.0.blocks.0.mlp.fc1"].endswith(", tokens in a row (no fixed grid is known)")
    assert "in a row" not in words["stages.0.blocks.0.attn.sr"]
    plain = dl.binarize_(make("vit_tiny_patch16_224"), dl.BinaryConfig(activation="sign"))
    assert not any("in a row" in row.reason for row in plain.binary)


class Small(nn.Module):
    """A plain module, with a functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.body(x).mean((2, 3)))


def test_any_module_and_a_functional_relu_that_stays() -> None:
    model = Small()
    with pytest.warns(UserWarning, match=r"1 binarizer.* body \(behind a function in the model\)"):
        report = dl.binarize_(model, example_input=(2, 3, 16, 16))
    assert rules(report) == {"stem": "first", "body": "binary", "unused": "not called", "head": "last"}
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    "config", [{"activation": "sign"}, {"activation": "rsign"}, {"scale": 0.0}, {"kernel": [[0.0, -0.5]]}]
)
def test_constant_sign_behind_a_relu_raises_and_changes_nothing(config: dict[str, object]) -> None:
    model = Small()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match="body: its input is never negative"):
        dl.binarize_(model, dl.BinaryConfig(**config), example_input=(2, 3, 16, 16))
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_kept_relu_raises_with_sign_and_is_noted_with_design() -> None:
    with pytest.raises(ValueError, match="never negative"):
        dl.binarize_(make("resnet18"), dl.BinaryConfig(activation="sign", companion="keep"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = dl.binarize_(make("resnet18"), dl.BinaryConfig(companion="keep"))
    assert len(caught) == len(report.notes) == 1
    assert "layer4.1.conv2 (behind layer4.1.act1)" in report.notes[0]


@pytest.mark.parametrize("companion", ["hardtanh", "prelu", "rprelu", "identity"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_companions_in_every_layout(name: str, companion: str) -> None:
    model = make(name)
    report = dl.binarize_(model, dl.BinaryConfig(companion=companion))
    assert any(row.rule == "companion" for row in report.rows)
    size = FAMILIES[name]
    model(torch.randn(2, 3, size, size)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_features_only_has_no_last_layer() -> None:
    model = timm.create_model("resnet18", features_only=True)
    report = dl.binarize_(model)
    assert "last" not in rules(report).values()
    assert rules(report)["layer4.1.conv2"] == "binary"
    features = model(torch.randn(2, 3, 64, 64))
    assert [f.shape[1] for f in features] == [64, 64, 128, 256, 512]


def test_binarized_network_takes_another_head() -> None:
    model = make("resnet18")
    dl.binarize_(model)
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_overrides_by_name_glob_and_regular_expression() -> None:
    model = make("resnet18")
    config = dl.BinaryConfig(
        overrides={
            "layer4.*": {"weight": "recu", "weight_args": {"tau": 0.9}},
            "re:layer1\\.0\\.conv.": None,
            "conv1": {"skip": [], "activation": "none", "padding_value": "replicate"},
            "layer1.1.act2": {"companion": "rprelu"},
        }
    )
    report = dl.binarize_(model, config)
    found = rules(report)
    assert found["layer1.0.conv1"] == found["layer1.0.conv2"] == "override"
    assert found["layer4.0.downsample.0"] == "downsample"
    assert found["conv1"] == "binary"
    assert model.conv1.activation is None
    assert float(model.layer4[0].conv1.weight_binarizer.tau) == pytest.approx(0.9)
    assert type(model.layer1[1].act2).__name__ == "RPReLU"
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"'layer4.1.conv9' matches no layer and no activation: did you mean 'layer4.1.conv"
    ):
        dl.binarize_(make("resnet18"), dl.BinaryConfig(overrides={"layer4.1.conv9": None}))


def test_everything_leaves_nothing_float_that_can_be_binary() -> None:
    report = dl.binarize_(make("resnet18"), dl.BinaryConfig(policy="everything"))
    assert len(report.binary) == 21


def test_nothing_to_do_raises_with_counts() -> None:
    with pytest.raises(ValueError, match=r"no layer of ResNet would become binary \(21 override\)"):
        dl.binarize_(make("resnet18"), dl.BinaryConfig(overrides={"*": None}))


def test_binarizing_twice_or_a_compiled_model_raises() -> None:
    model = make("resnet18")
    dl.binarize_(model)
    with pytest.raises(ValueError, match=r"binary already: 'layer1.0.conv1'"):
        dl.binarize_(model)
    compiled = torch.compile(make("resnet18"))
    with pytest.raises(ValueError, match="binarize first, then compile"):
        dl.binarize_(compiled)


def test_depth_that_does_not_divide_names_the_layer_and_changes_nothing() -> None:
    model = make("resnet18")
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(
        ValueError, match=r"layer1.0.conv1: kernel has 3 channels, but the input has 64, not a multiple of 3"
    ):
        dl.binarize_(model, dl.BinaryConfig(kernel=[[[0.1]], [[0.2]], [[0.3]]]))
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_gamma_scaling_binds_to_the_one_norm_before_the_layer() -> None:
    model = make("vgg11_bn")
    dl.binarize_(model, dl.BinaryConfig(scale_by_gamma=True, overrides={"pre_logits.*": {"scale_by_gamma": False}}))
    conv, norm = model.features[4], model.features[1]
    assert conv.activation.gamma_from is norm
    twin = copy.deepcopy(model)
    assert twin.features[4].activation.gamma_from is twin.features[1]
    assert not any("gamma_from" in key for key in model.state_dict())
    with pytest.raises(ValueError, match=r"layer1.1.conv1: scale_by_gamma needs one norm that feeds this layer alone"):
        dl.binarize_(make("resnet18"), dl.BinaryConfig(scale_by_gamma=True))


def test_meta_half_and_shared_modules() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    dl.binarize_(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    half = make("resnet18").bfloat16()
    dl.binarize_(half, dl.BinaryConfig(weight="learned", companion="rprelu"))
    assert half(torch.randn(2, 3, 64, 64).bfloat16()).dtype == torch.bfloat16
    conv, act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    shared = nn.Sequential(nn.Conv2d(3, 8, 3), act, conv, act, conv, nn.Flatten(), nn.Linear(8 * 36, 2))
    dl.binarize_(shared, example_input=(1, 3, 8, 8))
    assert shared[2] is shared[4]
    assert isinstance(shared[2], BinaryConv2d)
    assert shared[1] is shared[3]


def test_probe_leaves_mode_hooks_and_buffers_alone() -> None:
    model = make("resnet18").train()
    before = copy.deepcopy(model.state_dict())
    dl.binarize_(model, example_input=torch.randn(2, 3, 64, 64))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)


class DataDependent(nn.Module):
    """Its forward asks for a value, which a tensor without storage does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() == 1e9:
            return x
        return self.c(self.b(self.act(self.a(x))))


def test_probe_falls_back_to_the_model_itself() -> None:
    model = DataDependent()
    report = dl.binarize_(model)
    assert rules(report) == {"a": "first", "act": "companion", "b": "binary", "c": "last"}
    assert isinstance(model.b, BinaryLinear)


class Impossible(DataDependent):
    """No guessed input goes through."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs two inputs")


def test_impossible_probe_is_said() -> None:
    with pytest.warns(UserWarning, match="no probing forward went through"):
        report = dl.binarize_(Impossible())
    assert "needs two inputs" in report.notes[0]
    assert rules(report) == {"a": "first", "act": "companion", "b": "binary", "c": "last"}
    with pytest.raises(ValueError, match="forward fails on the example input"):
        dl.binarize_(Impossible(), example_input=(1, 6))


@pytest.mark.parametrize("kind", [Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d])
@pytest.mark.parametrize("padding_value", [0, 1, -1, "replicate"])
def test_twin_keeps_what_the_float_class_does(kind: type[nn.Conv2d], padding_value: int | str) -> None:
    torch.manual_seed(0)
    conv = kind(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 9, 10)
    twin = BINARY_TWINS[kind].from_float(conv, Sign(), "sign", padding_value=padding_value, stage="float")
    if padding_value != "replicate":
        assert torch.equal(twin(x), conv(x))
    twin.set_stage("both")
    # The float class itself, fed with the padded signs of the input and signs of what it makes of its weights.
    latent = conv.weight.detach()
    if kind is not Conv2dSame:
        latent = latent - latent.mean((1, 2, 3), keepdim=True)
    if kind is ScaledStdConv2d:
        latent = latent * conv.gain.detach()
    signs = torch.where(latent >= 0, 1.0, -1.0)
    binary_x = torch.where(x >= 0, 1.0, -1.0)
    pads = (0, 1, 1, 1) if kind in (Conv2dSame, StdConv2dSame) else (1, 1, 1, 1)
    padded = (
        F.pad(binary_x, pads, mode="replicate")
        if padding_value == "replicate"
        else F.pad(binary_x, pads, value=padding_value)
    )
    assert torch.equal(twin(x), F.conv2d(padded, signs, conv.bias, 2))
    assert isinstance(twin, BinaryConv2d)


class Odd(nn.Conv2d):
    """A subclass with a forward of its own, which no twin knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


def test_subclasses_match_by_isinstance_and_unknown_forwards_are_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Renamed(8, 8, 3), Odd(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(1, 3, 12, 12))
    report = dl.binarize_(model, example_input=(1, 3, 12, 12))
    assert rules(report) == {"0": "first", "1": "binary", "2": "no twin", "4": "last"}
    assert "Odd" in report.rows[2].reason


def test_report_prints_and_gives_json() -> None:
    report = dl.binarize_(make("resnet18"))
    text = str(report)
    assert "16 of 21 layers are binary" in text
    assert all(row.name in text for row in report.rows)
    assert '"binary_layers": 16' in report.to_json()
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    console.print(report.table())
    assert max(map(len, console.file.getvalue().splitlines())) <= 80  # type: ignore[attr-defined]


def test_custom_activation_class_by_its_path() -> None:
    assert issubclass(DeSign, BinaryActivation)
    model = make("resnet18")
    dl.binarize_(model, dl.BinaryConfig(activation="design_lightning.binary.activations.RSign"))
    assert all(type(layer.activation).__name__ == "RSign" for layer in binary_layers(model).values())
    assert all(isinstance(layer, BinaryLayer) for layer in binary_layers(model).values())


def test_resnet152_allocates_no_second_copy_of_the_weights() -> None:
    model = timm.create_model("resnet152")
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    dl.binarize_(model)
    new = [p for p in model.parameters() if p.untyped_storage().data_ptr() not in storages]
    assert sum(p.numel() for p in new) == 0


def test_bireal_shortcut_adds_the_real_input_behind_the_norm() -> None:
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    ).eval()
    plain = copy.deepcopy(block)
    report = dl.binarize_(block, dl.BinaryConfig(shortcut="bireal"), example_input=(1, 3, 8, 8))
    dl.binarize_(plain, example_input=(1, 3, 8, 8))
    assert report.rows[1].reason.endswith(", shortcut")
    x = torch.randn(2, 3, 8, 8)
    stream = plain[0](x)
    for model in (block, copy.deepcopy(block)):
        assert torch.equal(model(x), plain[3](plain[2](plain[1](stream)) + stream))
    assert block.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", pytest.param("vgg11_bn", marks=pytest.mark.slow)])
def test_bireal_shortcuts_where_shapes_allow(name: str) -> None:
    model = make(name)
    report = dl.binarize_(model, dl.BinaryConfig(shortcut="bireal", companion="rprelu"))
    reasons = {row.name: row.reason for row in report.binary}
    assert any(reason.endswith(", shortcut") for reason in reasons.values())
    if name == "resnet18":
        assert reasons["layer2.0.conv1"].endswith("no shortcut: [64, 56, 56] becomes [128, 28, 28]")
        assert sum(reason.endswith(", shortcut") for reason in reasons.values()) == 13
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    y.sum().backward()
    model.eval()
    if name == "resnet18":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_shortcut_that_is_there_is_not_added_again() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.norm, self.act = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
            )
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.act(self.norm(self.conv(x)) + x))

    report = dl.binarize_(Residual(), dl.BinaryConfig(shortcut="bireal"), example_input=(1, 3, 8, 8))
    assert report.binary[0].reason.endswith("has a shortcut of its own")


@pytest.mark.slow
def test_threshold_that_a_hardtanh_hides_is_noted() -> None:
    with pytest.warns(UserWarning, match=r"never reached right behind a Hardtanh.*features.4 \(behind features.2\)"):
        dl.binarize_(make("vgg11_bn"), dl.BinaryConfig(kernel="2x2x4_shifted_v1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dl.binarize_(make("vgg11_bn"), dl.BinaryConfig(kernel="2x2x4_shifted_v1", companion="identity"))
        dl.binarize_(make("vgg11_bn"))


def test_padding_mode_that_stays_is_said() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    report = dl.binarize_(
        nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.Conv2d(8, 2, 1)), dl.BinaryConfig(padding_value=1), (1, 3, 8, 8)
    )
    assert report.rows[1].reason.endswith("padding stays reflect")


def test_hooks_and_mode_stay_so_that_hooked_features_do() -> None:
    model = timm.create_model("resnet18", features_only=True, feature_cls="hook").eval()
    count = len(model(torch.randn(1, 3, 64, 64)))
    dl.binarize_(model)
    assert len(model(torch.randn(1, 3, 64, 64))) == count == 5
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_b0"])
def test_features_of_mobile_networks_have_no_last_layer(name: str) -> None:
    assert "last" not in rules(dl.binarize_(timm.create_model(name, features_only=True))).values()


def test_parametrized_weight_is_left_float_with_the_reason() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    report = dl.binarize_(model, example_input=(1, 3, 12, 12))
    reasons = {row.name: row.reason for row in report.rows}
    assert rules(report)["1"] == "no twin"
    assert "remove_parametrizations" in reasons["1"]


@pytest.mark.parametrize("options", [{"patch_drop_rate": 0.5}, {"dynamic_img_size": True}])
def test_tokens_that_vary_have_no_fixed_grid(options: dict[str, object]) -> None:
    model = make("vit_tiny_patch16_224", **options)
    dl.binarize_(model)
    assert model.blocks[0].attn.qkv.activation.grid is None
    size = 192 if "dynamic_img_size" in options else 224
    model(torch.randn(2, 3, size, size)).sum().backward()


@pytest.mark.parametrize(
    "between", [nn.ChannelShuffle(2), nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (6, 6))), lambda x: x * 3.0]
)
def test_gamma_needs_the_norms_own_channels_and_scale(between: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.body, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(between(self.norm(self.stem(x)))))

    with pytest.raises(ValueError, match="body: scale_by_gamma needs one norm"):
        dl.binarize_(Net(), dl.BinaryConfig(scale_by_gamma=True), example_input=(1, 3, 8, 8))


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    report = dl.binarize_(nn.Sequential(nn.Linear(4, 8), first, second, nn.Linear(8, 2)))
    assert report.binary_parameters == 64


def test_constants_come_back_after_meta() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    dl.binarize_(model, dl.BinaryConfig(scale=0.5, weight="recu", estimator="ede"))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    layer = model.layer1[0].conv1
    assert torch.equal(layer.activation.levels, dl.ThresholdKernel.named("2x2_v1").tensor())
    assert float(layer.activation.scale) == 0.5
    assert float(layer.weight_binarizer.tau) == pytest.approx(0.85)
    assert float(layer.activation.estimator.temperature) == pytest.approx(0.1)


def test_learned_scale_follows_the_latent_weights_into_the_second_stage() -> None:
    model = make("resnet18")
    dl.binarize_(model, dl.BinaryConfig(weight="learned", stage="activations"))
    layer = model.layer1[0].conv1
    with torch.no_grad():
        layer.weight.mul_(10)
    dl.set_stage_(model, "both")
    assert torch.allclose(layer.weight_binarizer.alpha, layer.weight.abs().mean((1, 2, 3)))
    with torch.no_grad():
        layer.weight_binarizer.alpha.fill_(3.0)
    dl.set_stage_(model, "both")
    other = make("resnet18")
    dl.binarize_(other, dl.BinaryConfig(weight="learned", stage="activations"))
    other.load_state_dict(model.state_dict())
    assert bool((other.layer1[0].conv1.weight_binarizer.alpha == 3.0).all())


def test_bireal_shortcut_around_a_layer_called_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n, self.c = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 8, 1),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.n(self.b(input=self.a(x))))

    model = Net()
    report = dl.binarize_(model, dl.BinaryConfig(shortcut="bireal"), example_input=(1, 3, 8, 8))
    assert report.binary[0].reason.endswith(", shortcut")
    model(torch.randn(2, 3, 8, 8))


def test_layers_that_are_called_by_keyword_are_seen() -> None:
    class ByKeyword(DataDependent):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(input=self.b(input=self.act(input=self.a(input=x))))

    model = ByKeyword()
    assert rules(dl.binarize_(model)) == {"a": "first", "act": "companion", "b": "binary", "c": "last"}
    assert model(torch.randn(2, 6)).shape == (2, 3)


def test_reactnet_policy_on_resnet18() -> None:
    model = make("resnet18", zero_init_last=False)
    projection = model.layer2[0].downsample[0]
    report = dl.binarize_(model, dl.BinaryConfig(policy="reactnet"))
    pooled = model.layer2[0].downsample[0]
    x = torch.randn(2, 64, 7, 8)
    expected = F.conv2d(F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False), projection.weight)
    assert torch.equal(pooled(x), expected)
    assert pooled(x).shape == projection(x).shape
    assert pooled.weight is projection.weight
    assert rules(report)["layer2.0.downsample.0"] == "downsample"
    assert {type(layer.activation).__name__ for layer in binary_layers(model).values()} == {"RSign"}
    assert type(model.act1).__name__ == "RPReLU"
    assert sum(row.reason.endswith(", shortcut") for row in report.binary) == 13
    assert report.parameters == sum(p.numel() for p in model.parameters())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("policy", ["conservative", "paper", "reactnet", "everything"])
@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "mobilenetv3_small_050"])
def test_every_policy_trains(name: str, policy: str) -> None:
    model = make(name)
    report = dl.binarize_(model, dl.BinaryConfig(policy=policy))  # type: ignore[arg-type]
    left = {row.rule for row in report.rows} & {"first", "last", "depthwise", "gate", "downsample"}
    assert left <= set(dl.BinaryConfig(policy=policy).skip_rules)  # type: ignore[arg-type]
    assert report.parameters == sum(p.numel() for p in model.parameters())
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_what_a_configuration_says_beats_its_policy() -> None:
    config = dl.BinaryConfig(policy="reactnet", activation="design", companion="hardtanh", skip=["first"])
    assert (config.activation, config.companion, config.shortcut, config.skip) == (
        "design",
        "hardtanh",
        "bireal",
        ["first"],
    )
    assert dl.BinaryConfig.from_dict(config.to_dict()) == config
