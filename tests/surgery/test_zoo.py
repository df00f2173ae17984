"""The sweep of `benchmarks/timm_sweep.py` on some of timm: its own test networks, small ones of every kind, every module."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import timm_sweep
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from zoo.bits import LEAST_SHARE

import design_lightning as dl
import design_lightning.models
from design_lightning.binary import BinaryConv2d, BinaryLayer, DeSign, layers, weights
from design_lightning.binary.estimators import ApproxSign
from design_lightning.surgery import (
    binarize,
    binary_layers,
    float_layers,
    flow,
    plan_activations,
    plan_layers,
    rules,
)

DIFFERENT = {
    "resnet10t": "a deep stem, average-pooled shortcuts",
    "skresnet18": "selective kernels",
    "resnest14d": "split attention",
    "eca_resnet33ts": "a gate made by Conv1d",
    "lambda_resnet26t": "lambda layers with Conv3d",
    "resnetv2_50d_frn": "filter response norm, which is an activation",
    "regnetz_c16_evos": "evo-norm, which is an activation",
    "tf_efficientnet_b0": "TensorFlow's same padding",
    "tf_mixnet_s": "mixed kernels",
    "mobilenetv3_small_050": "squeeze and excite behind hard sigmoids",
    "ghostnet_050": "ghost modules",
    "regnety_002": "grouped convolutions",
    "mobileone_s0": "parallel branches to be folded",
    "repvit_m0_9": "convolutions with their norm in one module",
    "fastvit_t8": "token mixing by convolution",
    "convnext_atto": "linear layers behind channels last",
    "vit_tiny_patch16_224": "tokens on a grid, fused qkv",
    "eva02_tiny_patch14_224": "a qkv layer that is not called, rotary positions, SwiGLU",
    "swin_tiny_patch4_window7_224": "shifted windows",
    "maxvit_rmlp_pico_rw_256": "block and grid attention in a convolutional network",
    "xcit_nano_12_p16_224": "attention across channels",
    "gmlp_ti16_224": "gated MLPs",
    "mambaout_femto": "gated convolution",
    "mobilevit_xxs": "convolution and attention in turn",
    "csatv2": "a cosine transform in front",
}


UNCALLED = "eva02_tiny_patch14_224"


def assert_passes(row: zoo.Row) -> None:
    assert (row.status, row.reason) == ("pass", "")
    assert row.binary_layers > 0
    assert row.least_share >= LEAST_SHARE
    assert (row.numbers, row.code) == ("real", zoo.CODE)


@pytest.mark.parametrize("name", zoo.architectures("test_*"))
def test_timms_own_test_networks(name: str) -> None:
    assert_passes(zoo.check_architecture(name))


@pytest.mark.parametrize("name", DIFFERENT)
def test_small_networks_of_different_structure(name: str) -> None:
    assert_passes(zoo.check_architecture(name))


@pytest.mark.parametrize("policy", ["paper", "reactnet", "everything"])
@pytest.mark.parametrize(
    "name",
    [
        *("test_resnet", "test_vit", "test_nfnet", "test_efficientnet_evos", "test_efficientnet", "test_convnext"),
        *("edgenext_xx_small", "ghostnet_050", "mobilevit_xxs", "pvt_v2_b0"),
    ],
)
def test_other_policies_rebuild_and_train(name: str, policy: str) -> None:
    architecture = zoo.Architecture.of(name)
    model = architecture.build()
    dl.binarize_(model, dl.BinaryConfig(policy=policy), architecture.batch())  # type: ignore[arg-type]
    model(architecture.batch()).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "test_nfnet", "mobilenetv3_small_050"])
@pytest.mark.slow
def test_large_networks_run_block_by_block_with_real_numbers(name: str) -> None:
    row = zoo.check_architecture(name, real_limit=0)
    assert (row.status, row.reason, row.numbers) == ("pass", "", "fake, real by block")
    assert row.blocks >= 5
    assert row.least_share >= LEAST_SHARE


def test_the_row_tells_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(zoo.real, "loss_of", lambda output: 1 / 0)
        row = zoo.check_architecture("test_resnet")
    assert row.status == "fail"
    assert row.reason == "the float network fails alike: ZeroDivisionError: division by zero"
    constant = dl.BinaryConfig(activation="sign", companion="keep", skip=["first"])
    row = zoo.check_architecture("test_resnet", constant)
    assert row.status == "fail"
    assert "never negative" in row.reason
    dead = dl.BinaryConfig(kernel=[[1e6]])
    row = zoo.check_architecture("test_resnet", dead)
    assert "11 binarizers are constant" in row.reason


# Surgery that is broken in one way or another: each has to show in the row, of real numbers and block by block.


def keeps_float_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BinaryLayer, "stage_weight", BinaryLayer.latent_weight)


def multiplies_by_float_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        BinaryConv2d,
        "forward",
        lambda self, x: self.convolve(self.stage_input(x), self.weight + 0 * self.stage_weight()),
    )


def multiplies_float_inputs(patch: pytest.MonkeyPatch) -> None:
    def float_inputs(self: BinaryLayer, x: torch.Tensor, product: Any) -> torch.Tensor:
        assert self.activation is not None
        return product.apply(x + 0 * self.activation(x), self.stage_weight(), self.bias)

    patch.setattr(BinaryLayer, "_multiply", float_inputs)


def gives_other_values_than_bits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeSign, "forward", lambda self, x: (x - self.threshold(x)).clamp(-1, 1))


def has_one_stray_bit(patch: pytest.MonkeyPatch) -> None:
    def all_but_one_negative(self: DeSign, x: torch.Tensor) -> torch.Tensor:
        bits = torch.full_like(x, -1)
        bits.view(-1)[:1] = 1
        return bits + (x - x.detach())

    patch.setattr(DeSign, "forward", all_but_one_negative)


def has_one_weight_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights, "sign", torch.ones_like)


def has_gradients_that_are_no_numbers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ApproxSign, "derivative", lambda self, u: torch.full_like(u, math.nan))
    patch.setattr(ApproxSign, "derivative_range", lambda self: None)  # or four bits would hold zeros


def has_no_gradients(patch: pytest.MonkeyPatch) -> None:
    multiply = BinaryLayer._multiply
    patch.setattr(BinaryLayer, "_multiply", lambda self, x, product: multiply(self, x.detach(), product))


def has_no_gradients_where_nobody_looks(patch: pytest.MonkeyPatch) -> None:
    product = layers.binarized_product
    patch.setattr(
        layers,
        "binarized_product",
        lambda x, threshold, estimator, weight, *rest: product(
            x.detach(), threshold, estimator, weight.detach(), *rest
        ),
    )


def multiplies_float_inputs_where_nobody_looks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        layers,
        "binarized_product",
        lambda x, threshold, estimator, weight, bias, product, *rest: product.apply(x, weight, bias),
    )


def leaves_every_relu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan_activations, "_reaching", lambda plan: set())


def draws_new_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        binarize, "refuse_fusing_", lambda model: [p.data.normal_() for p in model.parameters() if p.dim() > 1]
    )


def copies_weights(patch: pytest.MonkeyPatch) -> None:
    def copy_weights(model: nn.Module) -> None:
        for layer in binary_layers(model).values():
            layer.weight = nn.Parameter(layer.weight.detach().clone())

    patch.setattr(binarize, "refuse_fusing_", copy_weights)


def leaves_all_but_one_layer_float(patch: pytest.MonkeyPatch) -> None:
    find_rule = plan_layers.find_rule

    def all_but_one(name: str, *rest: Any) -> Any:
        rule = find_rule(name, *rest)
        return ("gate", "") if rule is None and name not in ("layer1.0.conv1", "blocks.0.mlp.fc1") else rule

    patch.setattr(plan_layers, "find_rule", all_but_one)


def reports_a_rule_that_does_not_hold(patch: pytest.MonkeyPatch) -> None:
    find_rule = plan_layers.find_rule

    def first_twice(name: str, *rest: Any) -> Any:
        return ("first", "") if name in ("layer1.0.conv1", "blocks.0.mlp.fc1") else find_rule(name, *rest)

    patch.setattr(plan_layers, "find_rule", first_twice)


def calls_layers_gates(patch: pytest.MonkeyPatch) -> None:
    find_rule = plan_layers.find_rule

    def gates_too(name: str, *rest: Any) -> Any:
        return ("gate", "") if name.endswith(("fc1", "proj", "conv2")) else find_rule(name, *rest)

    patch.setattr(plan_layers, "find_rule", gates_too)


def overlooks_the_first_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(rules.RULES, "first", lambda name, layer, facts: None)


def reports_no_linear_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan_layers, "is_weight_layer", lambda module: isinstance(module, nn.Conv2d))


def forgets_to_put_a_layer_in(patch: pytest.MonkeyPatch) -> None:
    swap = binarize._swap

    def all_but_one(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
        first = next(module for module, new in replacements.items() if isinstance(new, BinaryLayer))
        swap(model, {module: new for module, new in replacements.items() if module is not first})

    patch.setattr(binarize, "_swap", all_but_one)


def keeps_companions_for_good(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(binarize, "remember_original", lambda replacement, original: None)


def stores_another_config(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dl.BinaryConfig, "to_dict", lambda self: {"weight": "learned"})


BROKEN = [
    (keeps_float_weights, "test_vit", "its weights are not signs times scale|weights of more than one bit"),
    (multiplies_by_float_weights, "test_resnet", "weights of more than one bit"),
    (multiplies_float_inputs, "test_vit", "multiplies other inputs than .-1"),
    (gives_other_values_than_bits, "test_resnet", "(gives|multiplies) other (values|inputs) than .{1,2}-?1"),
    (has_one_stray_bit, "test_resnet", "binarizers are constant, or nearly"),
    (has_one_stray_bit, "test_vit", "24 binarizers are constant, or nearly"),
    (has_one_weight_sign, "test_resnet", "all its weights have the same sign"),
    (has_gradients_that_are_no_numbers, "test_vit", "gradient of .* is not finite|the gradient is not finite"),
    (has_no_gradients, "test_resnet", "lost their gradient"),
    (has_no_gradients_where_nobody_looks, "test_resnet", "lost their gradient|no gradient"),
    (has_no_gradients_where_nobody_looks, "test_vit", "lost their gradient|no gradient"),
    (multiplies_float_inputs_where_nobody_looks, "test_vit", "multiplies other inputs than .-1"),
    (leaves_every_relu, "test_resnet", "without thresholds 11 binarizers are constant"),
    (draws_new_weights, "test_resnet", "has other values|in stage float"),
    (copies_weights, "test_vit", "is another tensor than in the float network"),
    (leaves_all_but_one_layer_float, "test_resnet", "of the weights are gates that see whole maps"),
    (leaves_all_but_one_layer_float, "test_vit", "of the weights are gates that see whole maps"),
    (reports_a_rule_that_does_not_hold, "test_vit", "rule 'first' does not hold"),
    (calls_layers_gates, "test_resnet", "of the weights are gates that see whole maps"),
    (calls_layers_gates, "test_vit", "of the weights are gates that see whole maps"),
    (overlooks_the_first_layer, "test_resnet", "no layer reads the network's input"),
    (reports_no_linear_layer, "test_resnet", "1 weight layers are not in the report"),
    (forgets_to_put_a_layer_in, "test_vit", "differ in what is binary"),
    (keeps_companions_for_good, "test_vit", "unbinarize_ left"),
    (stores_another_config, "test_resnet", "differs from timm.create_model|Missing key|Unexpected key"),
]


@pytest.mark.parametrize("real_limit", [zoo.REAL_LIMIT, 0], ids=["real", "by block"])
@pytest.mark.parametrize(("broken", "name", "reason"), BROKEN, ids=[f"{b.__name__}-{n}" for b, n, _ in BROKEN])
@pytest.mark.slow
def test_broken_surgery_fails(
    monkeypatch: pytest.MonkeyPatch, broken: Any, name: str, reason: str, real_limit: int
) -> None:
    broken(monkeypatch)
    row = zoo.check_architecture(name, real_limit=real_limit)
    assert row.status == "fail"
    assert re.search(reason, row.reason)


@pytest.mark.slow
def test_a_lost_blur_pool_a_dropped_standardisation_and_a_wrong_padding_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # the ReLUs in front of blur pools then seem to reach no binarizer
        patch.setattr(flow, "_has_fixed_filter", lambda operands: False)
        assert "without thresholds" in zoo.check_architecture("resnetblur18").reason
    with monkeypatch.context() as patch:
        patch.setattr(float_layers.BinaryScaledStdConv2d, "latent_weight", lambda self: self.weight * self.gain)
        for limit in (zoo.REAL_LIMIT, 0):
            assert "in stage float" in zoo.check_architecture("test_nfnet", real_limit=limit).reason
    padding_of = float_layers.BinaryConv2dSame.padding_of

    def at_the_start(self: float_layers.BinaryConv2dSame, x: torch.Tensor) -> tuple[int, ...]:
        left, right, top, bottom = padding_of(self, x)
        return right, left, bottom, top

    with monkeypatch.context() as patch:
        patch.setattr(float_layers.BinaryConv2dSame, "padding_of", at_the_start)
        for limit in (zoo.REAL_LIMIT, 0):
            assert "in stage float" in zoo.check_architecture("tf_efficientnet_es", real_limit=limit).reason


def test_layers_that_no_forward_calls_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binarize, "call_layers_", lambda module: None)
    for limit in (zoo.REAL_LIMIT, 0):
        assert "12 binary layers were not called" in zoo.check_architecture(UNCALLED, real_limit=limit).reason


def test_an_override_is_no_rule_of_the_sweep() -> None:
    row = zoo.check_architecture("test_resnet", dl.BinaryConfig(overrides={"layer2.*": None}))
    assert "rule 'override' does not hold" in row.reason


def sweep(*arguments: str) -> int:
    return timm_sweep.main(list(arguments))


def test_the_sweep_goes_on_and_tells_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "results" / "table.csv"
    failing = {"test_vit"}

    def check(name: str) -> zoo.Row:
        status = "fail" if name in failing else "pass"
        return zoo.Row(name, status, reason="", timm=timm.__version__, code=timm_sweep.CODE)

    monkeypatch.setattr(timm_sweep, "check_architecture", check)
    monkeypatch.setattr(timm_sweep, "architectures", lambda: ["test_resnet", "test_vit", "test_vit2"])
    assert sweep("--out", str(table)) == 1
    assert capsys.readouterr().out.endswith("2 pass, 1 fail\n")
    failing.clear()
    assert sweep("--out", str(table)) == 0
    assert capsys.readouterr().out.endswith("2 passed before, 1 pass\n")
    assert [(r["name"], r["status"]) for r in timm_sweep.read(table).values()] == [
        ("test_resnet", "pass"),
        ("test_vit", "pass"),
        ("test_vit2", "pass"),
    ]
    monkeypatch.setattr(timm_sweep, "CODE", "another")
    assert sweep("--out", str(table), "--any-code") == 0
    assert capsys.readouterr().out.endswith("3 passed before\n")
    assert sweep("--out", str(table), "--shard", "2/2") == 0
    assert capsys.readouterr().out.endswith("1 pass\n")
    assert [r["code"] == "another" for r in timm_sweep.read(table).values()] == [False, True, False]
    monkeypatch.setattr(timm, "__version__", "9.9")
    assert sweep("--out", str(table), "--any-code") == 0
    assert capsys.readouterr().out.endswith("3 pass\n")
    assert [path.name for path in table.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("arguments", [("--shard", "x"), ("--shard", "3/2"), ("--shard", "0/2"), ("--only", "no_such")])
def test_wrong_arguments_of_the_sweep_are_usage_errors(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sweep(*arguments)
    assert stop.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_the_architectures_are_those_of_timm_alone() -> None:
    assert timm.is_model("resnet18_cifar")
    names = zoo.architectures()
    assert not {"resnet18_cifar", "resnet20_cifar", "vgg_small", "bnn_vgg"} & set(names)
    assert {"resnet18", "test_vit"} <= set(names)


TABLE = timm_sweep.RESULTS


def smallest_of_each_module() -> dict[str, str]:
    """From each module of `timm.models` to its smallest network by the table; without one, to the first by name."""
    sizes = {name: int(row["parameters"]) for name, row in timm_sweep.read(TABLE).items()}
    known = set(zoo.architectures())
    members = {module: known & set(timm.list_models(module=module)) for module in timm.list_modules()}
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
    rows = timm_sweep.read(TABLE)
    failed = {name: row["reason"] for name, row in rows.items() if row["status"] != "pass"}
    assert {name: reason for name, reason in failed.items() if "the float network fails alike" not in reason} == {}
    passed = [row for name, row in rows.items() if name not in failed]
    assert all(int(row["binary_layers"]) > 0 for row in passed)
    assert all(float(row["least_share"]) >= LEAST_SHARE for row in passed)
    if {row["timm"] for row in rows.values()} == {timm.__version__}:
        assert set(rows) == set(zoo.architectures())


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
