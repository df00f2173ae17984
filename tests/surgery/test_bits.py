"""The forward that looks at the binarizers' bits: units, constant signs, and that it leaves no trace."""

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import design_lightning as dl


class Scaled(nn.Module):
    """A layer whose input is `factor` times a normal stream, plus `shift`."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.factor, self.shift = factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x) * self.factor + self.shift))


def test_small_input_takes_its_size_as_unit() -> None:
    model, x = Scaled(1e-3), torch.randn(64, 6)
    report = dl.binarize_(model, example_input=x)
    stream = model.stem(x) * 1e-3
    size = stream.abs().mean() * (torch.pi / 2) ** 0.5
    assert torch.isclose(model.body.activation.unit, size)
    # A feature is an image of one pixel, so the kernel's first level is its threshold.
    bits = model.body.activation(stream)
    assert torch.equal(bits, torch.where(stream >= size * model.body.activation.levels[0, 0, 0], 1.0, -1.0))
    assert f"units of {size.item():.2g}" in report.binary[0].reason
    assert any(
        note.startswith("1 DeSign hardly reached a threshold") and note.endswith(": body") for note in report.notes
    )


def test_input_of_the_usual_size_keeps_the_papers_thresholds() -> None:
    model = Scaled(3.0)
    assert not dl.binarize_(model, example_input=torch.randn(64, 6)).notes
    assert model.body.activation.unit == 1


@pytest.mark.parametrize(
    ("options", "shift"), [({}, -100.0), ({"activation": "sign"}, 100.0), ({"activation": "rsign"}, -100.0)]
)
def test_binarizer_without_a_change_of_sign_is_named(options: dict[str, str], shift: float) -> None:
    model = Scaled(1.0, shift)
    with pytest.warns(
        UserWarning,
        match=r"1 binarizer saw .almost. no change of sign on the probe.s batch, less than 1% of the bits: body",
    ):
        report = dl.binarize_(model, dl.BinaryConfig(**options), example_input=torch.randn(64, 6))
    assert len(report.notes) == 1
    if not options:
        assert model.body.activation.unit == 1


def test_the_unit_travels_in_the_state_dict_and_stays_float32() -> None:
    model = Scaled(1e-3)
    dl.binarize_(model, example_input=torch.randn(64, 6))
    unit = model.body.activation.unit.clone()
    other = Scaled(1e-3)
    dl.binarize_(other, example_input=(64, 6))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.body.activation.unit, unit)
    assert torch.equal(model.half().body.activation.unit, unit)
    model.body.activation.reset_parameters()
    assert model.body.activation.unit == 1


def test_it_leaves_statistics_modes_and_random_numbers_as_they_were() -> None:
    model = timm.create_model("test_resnet")
    model.layer1.eval() if hasattr(model, "layer1") else None
    reference = copy.deepcopy(model)
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()
    dl.binarize_(model)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, training in modes.items():
        if name in dict(model.named_modules()):
            assert model.get_submodule(name).training == training


def test_fresh_batch_norms_use_the_batch_and_trained_ones_their_statistics() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        stem, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        with torch.no_grad():
            stem.weight.mul_(1e-2)
            stem.bias.zero_()
        return nn.Sequential(stem, norm, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3))

    fresh = network()
    dl.binarize_(fresh, example_input=torch.randn(4, 3, 16, 16))
    assert fresh[2].activation.unit == 1
    trained = network()
    trained[1].num_batches_tracked += 1  # its running variance is 1, so that the stream is small in eval mode
    dl.binarize_(trained, example_input=torch.randn(4, 3, 16, 16))
    assert trained[2].activation.unit < 0.01


def test_one_value_a_channel_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dl.binarize_(model, example_input=torch.randn(1, 3, 8, 8))


def test_stage_float_is_looked_at_as_if_binary() -> None:
    model = Scaled(1e-3)
    dl.binarize_(model, dl.BinaryConfig(stage="float"), example_input=torch.randn(64, 6))
    assert model.body.stage == "float"
    assert model.body.activation.unit < 0.01


def test_on_meta_the_report_says_that_nobody_looked() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = dl.binarize_(model)
    assert "was not looked at" in report.notes[0]


class OnlyOnMeta(Scaled):
    """Its forward fails once there are numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise RuntimeError("no kernel for this device")
        return super().forward(x)


def test_failing_forward_is_said() -> None:
    with pytest.warns(UserWarning, match="signs were not looked at: RuntimeError: no kernel for this device"):
        report = dl.binarize_(OnlyOnMeta(), example_input=(2, 6))
    assert report.binary


@pytest.mark.parametrize(("factor", "has_unit"), [(0.1, True), (0.15, True), (0.3, False)])
def test_a_few_stray_bits_are_not_a_divided_input(factor: float, has_unit: bool) -> None:
    class Normal(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.repeat(1, 2)[:, :8] * self.factor))

    model, x = Normal(factor), torch.randn(4096, 6)
    report = dl.binarize_(model, dl.BinaryConfig(skip=["last"]), example_input=x)
    assert ("units" in report.rows[1].reason) == has_unit
    share = (model.body.activation(x.repeat(1, 2)[:, :8] * factor) == 1).float().mean()
    assert share > (0.2 if has_unit else 0.01)


class Once(Scaled):
    """Its first forward fails late, its second goes through."""

    def __init__(self) -> None:
        super().__init__(1e-3)
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.stem[1].training and not x.is_meta:
            raise RuntimeError("only in eval mode")
        return out


def test_units_of_a_failed_forward_are_forgotten_and_those_that_stay_are_said() -> None:
    model = Once()
    report = dl.binarize_(model, example_input=torch.randn(64, 6))
    assert model.body.activation.unit != 1
    assert f"units of {model.body.activation.unit.item():.2g}" in report.binary[0].reason
