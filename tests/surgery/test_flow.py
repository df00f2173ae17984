"""What reaches what: through pools made of convolutions, assignments, permutations; and which axis holds the channels."""

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.surgery import probe


def rules(report: dl.BinarizationReport) -> dict[str, str]:
    return {row.name: row.rule for row in report.rows}


def test_activations_reach_binarizers_through_anti_aliasing_pools() -> None:
    report = dl.binarize_(timm.create_model("resnetblur18"), None, (2, 3, 64, 64))
    found = rules(report)
    assert {n for n, r in found.items() if r == "reaches none"} == {"layer4.1.act2"}
    assert report.notes == ()


class Net(nn.Module):
    """A stem, something between, a binary layer, and a head."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.body, self.head = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
        self.between = between
        self.register_buffer("blur", torch.full((8, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.between(self, self.act(self.stem(x)))))


def assigned(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :8] = x
    return out


def gated(net: Net, x: Tensor) -> Tensor:
    gate = x.mean((2, 3), keepdim=True).sigmoid()
    return x * gate.expand_as(x)


THROUGH: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "blur": lambda net, x: F.conv2d(x, net.blur, padding=1, groups=8),
    "assignment": assigned,
    "quotient": lambda net, x: x / 2,
    "addition": lambda net, x: x + 1,
    "pool and pad": lambda net, x: F.pad(F.avg_pool2d(x, 2), (1, 1, 1, 1)),
    "a gate of the stream's shape": gated,
    "in place": lambda net, x: x.mul_(2).add_(1),
}


@pytest.mark.parametrize("between", THROUGH)
def test_a_relu_reaches_a_binarizer_through(between: str) -> None:
    report = dl.binarize_(Net(THROUGH[between]), example_input=(2, 3, 12, 12))
    assert rules(report)["act"] == "companion"


@pytest.mark.parametrize(
    ("between", "is_one_sided"),
    [
        (lambda net, x: x / 2, True),
        (lambda net, x: x / -2, False),
        (lambda net, x: torch.subtract(x, 1), False),
        (lambda net, x: torch.negative(x), False),
        (lambda net, x: torch.log(x + 0.5), False),
    ],
)
def test_what_may_be_negative(between: Callable[[Net, Tensor], Tensor], is_one_sided: bool) -> None:
    config = dl.BinaryConfig(activation="sign", companion="keep")
    if is_one_sided:
        with pytest.raises(ValueError, match="never negative"):
            dl.binarize_(Net(between), config, (2, 3, 12, 12))
    else:
        dl.binarize_(Net(between), config, torch.randn(2, 3, 12, 12))


def test_functional_activations_that_reach_a_binarizer_are_named() -> None:
    report = dl.binarize_(Net(lambda net, x: F.gelu(x)), example_input=torch.randn(2, 3, 12, 12))
    assert report.notes == (
        "float activations that are no modules, and so stay, reach binarizers: a function in the model",
    )


class Axes(nn.Module):
    """Activations on channels first, channels last and tokens, all of one size, so that no shape tells the axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(4))
        self.conv, self.linear, self.tokens, self.other = (
            nn.Conv2d(8, 8, 1),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.acts[0](self.stem(x)))
        x = self.linear(self.acts[1](x.permute(0, 2, 3, 1)))
        x = self.tokens(self.acts[2](x).permute(0, 3, 1, 2).flatten(2).transpose(1, 2))
        return self.head(self.other(self.acts[3](x)).mean(1))


def test_companions_with_parameters_stand_on_the_channels_axis() -> None:
    model = Axes()
    dl.binarize_(model, dl.BinaryConfig(companion="rprelu"), torch.randn(2, 3, 8, 8))
    assert [act.layout for act in model.acts] == ["NCHW", "NHWC", "NHWC", "NHWC"]


def test_companions_of_a_network_of_convolution_and_attention() -> None:
    model = timm.create_model("maxvit_rmlp_pico_rw_256", num_classes=10, img_size=256)
    report = dl.binarize_(model, dl.BinaryConfig(policy="reactnet"), (1, 3, 256, 256))
    layouts = {n: m.layout for n, m in model.named_modules() if type(m).__name__ == "RPReLU"}
    assert layouts["stages.0.blocks.0.conv.norm2.act"] == "NCHW"
    assert {layout for name, layout in layouts.items() if ".conv." in name or "stem" in name} == {"NCHW"}
    assert report.binary


def test_unfolding_is_a_rearrangement() -> None:
    with torch.device("meta"):
        model = timm.create_model("tnt_s_patch16_224")
    report = dl.binarize_(model)
    assert rules(report)["pixel_embed.proj"] == "first"


def test_what_is_made_of_gates_alone_is_a_gate() -> None:
    """An attention that averages a sigmoid, times a sigmoid, has no sign to take; of values behind a ReLU it has none either."""

    class Modulation(nn.Module):
        def __init__(self, act: nn.Module, gated: bool) -> None:
            super().__init__()
            self.stem, self.v_gate, self.act = nn.Linear(3, 8), nn.Linear(8, 16), act
            self.proj, self.head, self.gated = nn.Linear(8, 8), nn.Linear(8, 2), gated

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            v, gate = self.act(self.v_gate(x)).chunk(2, dim=-1)
            mean = F.scaled_dot_product_attention(x, x, value=v)
            return self.head(self.proj(mean * gate if self.gated else mean))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gated in (True, False):
            report = dl.binarize_(Modulation(nn.Sigmoid(), gated), example_input=torch.randn(2, 16, 3))
            assert rules(report)["proj"] == "gate"
    with pytest.warns(UserWarning, match=r"never negative.*proj \(behind act\)"):
        dl.binarize_(Modulation(nn.ReLU(), True), dl.BinaryConfig(companion="keep"), torch.randn(2, 16, 3))


class LeNet(nn.Module):
    """Its activation is what is a gate elsewhere; perhaps it is one here too."""

    def __init__(self, act: nn.Module, weighs: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
        self.act, self.weighs = act, weighs

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.act(x)
        if self.weighs:
            return self.c(self.b(F.max_pool2d(gate, 2)).mean((2, 3)) * (gate * x).mean())
        return self.c(self.b(F.max_pool2d(gate, 2)).mean((2, 3)))


@pytest.mark.parametrize(
    "act", [nn.Sigmoid, nn.Hardsigmoid, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.LogSigmoid], ids=str
)
def test_a_sigmoid_that_weighs_nothing_is_an_activation(act: type[nn.Module]) -> None:
    model = LeNet(act())
    config = dl.BinaryConfig(policy="everything", activation="sign")
    found = rules(dl.binarize_(model, config, torch.randn(2, 3, 12, 12)))
    assert found == {"a": "binary", "b": "binary", "c": "binary", "act": "companion"}
    assert isinstance(model.act, nn.Hardtanh)


def test_a_sigmoid_that_also_weighs_stays() -> None:
    report = dl.binarize_(LeNet(nn.Sigmoid(), weighs=True), dl.BinaryConfig(skip=["gate"]), torch.randn(2, 3, 12, 12))
    assert rules(report) == {"a": "binary", "b": "gate", "c": "binary"}


@pytest.mark.parametrize(
    ("companion", "way"), [("keep", "use a companion other than"), ("hardtanh", "leave the layer float")]
)
def test_the_way_out_of_a_constant_sign_is_one(companion: str, way: str) -> None:
    model = Net(lambda net, x: x if companion == "keep" else x.relu())
    if companion != "keep":
        model.act = nn.Identity()
    with pytest.raises(ValueError, match=f"never negative .*; {way}"):
        dl.binarize_(model, dl.BinaryConfig(activation="sign", companion=companion), (2, 3, 12, 12))


@pytest.mark.parametrize(
    ("between", "axis"),
    [
        (lambda x: x.unsqueeze(1), None),
        (lambda x: x.mean((2, 3)), None),
        (lambda x: x.permute(0, 2, 3, 1), 3),
        (lambda x: x.flatten(2).transpose(1, 2), 2),
        (lambda x: x * 2 + x, 1),
        (lambda x: F.avg_pool2d(x, 2), 1),
        (lambda x: x.reshape(2, 4, 2, 8, 8), None),
    ],
)
def test_the_channels_axis_is_known_or_said_to_be_unknown(
    between: Callable[[Tensor], Tensor], axis: int | None
) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Conv2d(3, 8, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(between(self.stem(x)))

    assert probe(One(), (2, 3, 8, 8)).activations["act"][0][1] == axis


class Shared(nn.Module):
    """One ReLU behind layers of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 8, 1),
            nn.Conv2d(8, 2, 1),
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.act(self.b(self.act(self.a(x))))))


def test_an_activation_shared_by_several_widths_takes_a_companion_without_parameters() -> None:
    model = Shared()
    report = dl.binarize_(model, dl.BinaryConfig(companion="rprelu"), torch.randn(2, 3, 8, 8))
    row = next(row for row in report.rows if row.name == "act")
    assert row.after == "Hardtanh"
    assert "shared by [8, 16] channels, so no rprelu" in row.reason


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "hrnet_w18_small"])
def test_reactnet_on_networks_with_shared_activations(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert dl.binarize_(model, dl.BinaryConfig(policy="reactnet"), (2, 3, 64, 64)).binary
