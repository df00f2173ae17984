"""What surgery refuses, what it leaves as it was, and layers whose weight is read without a call."""

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.surgery import binarize, binary_layers, probe
from design_lightning.surgery.packing import pack_layers_


class Encoder(nn.Module):
    """torch's own transformer layer, which reads its weights directly where no gradient is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 32), nn.Linear(32, 2)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


def test_torchs_transformer_layer_is_binary_in_evaluation_too() -> None:
    model = Encoder().eval()
    before = vars(model.layer)["activation_relu_or_gelu"]
    report = dl.binarize_(model, example_input=torch.randn(4, 5, 6))
    assert {row.name for row in report.binary} == {"layer.linear1", "layer.linear2"}
    calls: list[Tensor] = []
    model.layer.linear1.activation.register_forward_hook(lambda module, x, bits: calls.append(bits))
    with torch.no_grad():
        model(torch.randn(4, 5, 6))
    assert len(calls) == 1
    dl.unbinarize_(model)
    assert model.layer.activation_relu_or_gelu == before != 0


class ReadsDirectly(nn.Module):
    """Reads the weight of a layer instead of calling it, but in training mode or on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x) if self.training or x.is_meta else nn.functional.linear(x, self.b.weight, self.b.bias)
        return self.c(x)


def test_a_binarizer_without_a_call_is_named() -> None:
    with pytest.warns(UserWarning, match="1 binarizer had no call in a forward in eval mode.*: b"):
        dl.binarize_(ReadsDirectly(), example_input=(4, 6))


class ReadsWeight(ReadsDirectly):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.linear(self.a(x), self.b.weight) + self.d(x).mean())


def test_a_layer_whose_weight_is_read_is_listed_with_its_reader() -> None:
    model = ReadsWeight()
    model.d = nn.Linear(6, 8)
    report = dl.binarize_(model, dl.BinaryConfig(skip=["last"]), example_input=(4, 6))
    row = next(row for row in report.rows if row.name == "b")
    assert (row.rule, row.reason) == ("not called", "the model uses its weight without a call")
    assert row.macs == 8 * 8


def test_operations_of_weights_that_functions_read_are_counted() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.read, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(4, 2, 2)
            self.body, self.head = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.conv2d(self.stem(x), self.read.weight)
            return self.head(self.body(nn.functional.conv_transpose2d(x, self.up.weight)))

    report = dl.binarize_(Reads(), example_input=torch.randn(2, 3, 8, 8))
    macs = {row.name: row.macs for row in report.rows}
    assert macs == {
        "stem": 64 * 8 * 3,
        "read": 36 * 4 * 8 * 9,
        "up": 36 * 4 * 2 * 4,
        "body": 49 * 8 * 2,
        "head": 49 * 2 * 8,
    }


@pytest.mark.parametrize("where", ["_swap", "make_lean_", "refuse_fusing_", "record_surgery"])
def test_an_interruption_leaves_the_model_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet")
    before = {name: type(module) for name, module in model.named_modules()}
    step = getattr(binarize, where)

    def interrupted(first: object, *rest: dict[nn.Module, nn.Module]) -> None:
        halves = [dict(list(part.items())[::2]) for part in rest] if where == "_swap" else rest
        step(first, *halves)
        raise KeyboardInterrupt

    monkeypatch.setattr(binarize, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        dl.binarize_(model, dl.BinaryConfig(policy="reactnet"))
    monkeypatch.setattr(binarize, where, step)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert dl.binarize_(model).binary


def test_a_compiled_part_is_refused() -> None:
    model = timm.create_model("test_resnet")
    model.layer1[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"its part 'layer1\.0' is compiled; binarize first"):
        dl.binarize_(model)
    other = timm.create_model("test_resnet")
    other.layer1 = torch.compile(other.layer1, backend="eager")
    with pytest.raises(ValueError, match="its part 'layer1' is compiled"):
        dl.binarize_(other)
    third = timm.create_model("test_resnet")
    third.forward = torch.compile(third.forward, backend="eager")
    with pytest.raises(ValueError, match="the model is compiled"):
        dl.binarize_(third)


def test_a_layer_with_a_forward_of_its_own_instance_is_left() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1].forward = lambda x: x * 2
    report = dl.binarize_(model, example_input=(2, 4))
    assert report.rows[1].rule == "no twin"
    assert "replaced on the instance" in report.rows[1].reason


class Breaks(nn.Module):
    """Cannot bear that its inner layer is binary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.b, dl.BinaryConv2d):
            raise RuntimeError("a binary layer, of all things")
        return self.c(self.norm(self.b(self.a(x))))


def test_a_binary_network_that_cannot_run_is_no_success() -> None:
    model = Breaks()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="fails where the float one's goes through: RuntimeError: a binary layer"):
        dl.binarize_(model, dl.BinaryConfig(shortcut="bireal"), (2, 3, 8, 8))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())


def test_warnings_as_errors_leave_the_model_float() -> None:
    model = timm.create_model("test_resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="never negative"):
            dl.binarize_(model, dl.BinaryConfig(companion="keep"))
    assert not binary_layers(model)


class Counts(nn.Module):
    """A forward that draws a random number's worth of attention: it counts, and looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if x.sum().item() == 1e9:
            return x
        return self.c(self.b(self.a(x)))


def test_buffers_and_random_numbers_stay() -> None:
    model = Counts()
    state = torch.get_rng_state()
    dl.binarize_(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.embed(x)).mean(1))


def test_integer_inputs_stay_integers() -> None:
    report = dl.binarize_(Words(), example_input=torch.randint(50, (4, 7)))
    assert {row.name: row.rule for row in report.rows} == {"embed": "no twin", "a": "binary", "b": "last"}


@pytest.mark.parametrize(
    ("example", "message"), [(64, "neither a batch nor"), ((0, 3, 8, 8), "every size must be"), ((), "every size")]
)
def test_wrong_examples_are_refused(example: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dl.binarize_(timm.create_model("test_resnet"), example_input=example)  # type: ignore[arg-type]


def test_null_leaves_an_activation() -> None:
    report = dl.binarize_(timm.create_model("test_resnet"), dl.BinaryConfig(overrides={"layer1.0.act1": None}))
    row = next(row for row in report.rows if row.name == "layer1.0.act1")
    assert (row.rule, row.after) == ("kept", "ReLU")


def test_overrides_know_a_shared_module_by_each_of_its_names() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), shared, shared, nn.Linear(8, 8), nn.Linear(8, 2))
    report = dl.binarize_(model, dl.BinaryConfig(overrides={"2": None}), (2, 4))
    assert {row.name: row.rule for row in report.rows} == {"0": "first", "1": "override", "3": "binary", "4": "last"}


def test_only_products_of_signs_count_as_binary_operations() -> None:
    model = timm.create_model("test_resnet")
    report = dl.binarize_(model, dl.BinaryConfig(activation="none"))
    assert report.binary
    assert report.binary_macs == 0
    assert report.totals()["binary_macs_share"] == 0


def test_a_weight_that_a_float_layer_shares_is_no_bit() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[1].weight
    report = dl.binarize_(model, dl.BinaryConfig(overrides={"2": None}), (2, 4))
    assert report.binary_parameters == 0


def test_multi_head_attention_and_recurrence_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.attention, self.lstm = (
                nn.Linear(4, 8),
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.LSTM(8, 8),
            )
            self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(self.b(self.lstm(self.attention(x, x, x)[0])[0]))

    report = dl.binarize_(Net(), example_input=torch.randn(2, 5, 4))
    found = {row.name: (row.rule, row.parameters) for row in report.rows}
    assert found["attention"] == ("no twin", 192)
    assert found["lstm"] == ("no twin", 512)
    assert found["attention.out_proj"][0] == "not called"
    assert {row.name: row.macs for row in report.rows}["attention.out_proj"] == 5 * 64


def test_probe_leaves_the_switches_of_attentions_as_they_were() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", depth=1)
    probe(model)
    assert model.blocks[0].attn.qkv_bias_separate is False
    dl.binarize_(model, dl.BinaryConfig(overrides={"*.qkv": None, "*.proj": {}}))
    assert not isinstance(model.blocks[0].attn.qkv, dl.BinaryLinear)


@pytest.mark.parametrize("make_", [dl.convert_, pack_layers_])
def test_a_network_with_packed_layers_is_no_float_one(make_: Callable[[nn.Module], object]) -> None:
    model = timm.create_model("test_resnet").eval()
    dl.binarize_(model)
    make_(model)
    with pytest.raises(ValueError, match=r"the model is binary already: 'conv1\.3' and 10 other layers"):
        dl.binarize_(model, dl.BinaryConfig(policy="everything"))


class Helped(nn.Conv2d):
    def helper(self, x: Tensor) -> Tensor:
        return self(x).relu()


class Called(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Named(nn.Conv2d):
    """Differs in how it starts and prints alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return "named"


class UsesHelper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.helped, self.called = nn.Conv2d(3, 8, 1), Helped(8, 8, 1), Called(8, 8, 1)
        self.named, self.head = Named(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.named(self.called(self.helped.helper(self.stem(x)))))


def test_a_subclass_with_methods_of_its_own_is_left() -> None:
    report = dl.binarize_(UsesHelper(), dl.BinaryConfig(companion="identity"), torch.randn(2, 3, 8, 8))
    found = {row.name: (row.rule, row.reason) for row in report.rows}
    assert found["helped"] == ("no twin", "Helped has a helper of its own")
    assert found["called"] == ("no twin", "Called has a __call__ of its own")
    assert found["named"][0] == "binary"


def test_surgery_on_meta_and_what_it_leaves_runs_there() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
        report = dl.binarize_(model, dl.BinaryConfig(weight="recu", estimator="ede", policy="paper"))
    x = torch.empty(2, 3, 64, 64, device="meta")
    model(x).sum().backward()
    gradient = model.get_submodule(report.binary[0].name).weight.grad
    assert gradient.is_meta
    with torch.no_grad():
        assert model.eval()(x).shape == (2, 1000)


def test_hooks_of_a_replaced_activation_go_with_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    seen: list[str] = []
    model[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[1].register_state_dict_post_hook(lambda *_: seen.append("state dict"))
    model[1].register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    dl.binarize_(model, example_input=torch.randn(2, 3, 8, 8))
    assert isinstance(model[1], nn.Hardtanh)
    for expected in (["backward", "state dict", "load"], ["backward", "state dict", "load"]):
        seen.clear()
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert seen == expected
        if not isinstance(model[1], nn.ReLU):
            dl.unbinarize_(model)
