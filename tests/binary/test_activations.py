"""Binary activations, bit for bit, against SPEC section 1 written out element by element."""

import copy
import math
import pickle
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from design_lightning.binary import ACTIVATIONS, ESTIMATORS, BinaryActivation, DeSign, Layout, RSign, Sign
from design_lightning.binary.keeping import Keeps, keep_for_backward_
from design_lightning.kernels import PUBLISHED, Alignment, ThresholdKernel

ALIGNMENTS = get_args(Alignment)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNELS: dict[str, Any] = {
    **{name: name for name in PUBLISHED},
    "2x3": [[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]],
    "3x1x2": [[[0.1, 0.9]], [[-0.4, 0.2]], [[0.0, 1.3]]],
    "2x4x3": torch.linspace(-1, 2, 24).view(2, 4, 3).tolist(),
}


def norm_of(gamma: Tensor) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(gamma.numel())
    norm.weight.data.copy_(gamma)
    return norm


def near(thresholds: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Random values, of which a third lie on their threshold, and a third a hair from it."""
    exact = torch.from_numpy(thresholds).to(dtype)
    kind = torch.randint(3, exact.shape)
    off = exact + torch.randn(exact.shape).sign().to(dtype) * 1e-6
    return torch.where(kind == 0, torch.randn(exact.shape).to(dtype), torch.where(kind == 1, exact, off))


def make(name: str, channels: int, keeps: Keeps = "exact", **arguments: Any) -> BinaryActivation:
    activation = RSign(channels, **arguments) if name == "rsign" else ACTIVATIONS[name](**arguments)
    keep_for_backward_(activation, keeps)
    return activation


@st.composite
def settings_of_design(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(list(KERNELS)))
    depth = ThresholdKernel.of(KERNELS[name]).shape[0]
    channels = depth * draw(st.integers(1, 2))
    batch = draw(st.integers(0, 2))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    layout, shape, grid, prefix = draw(
        st.sampled_from(
            [
                ("NCHW", (batch, channels, height, width), None, 0),
                ("NCHW", (channels, height, width), None, 0),
                ("NCHW", (batch, channels), None, 0),
                ("NHWC", (batch, height, width, channels), None, 0),
                ("NHWC", (batch, channels), None, 0),
                ("NHWC", (batch, height * width, channels), None, 0),
                ("NHWC", (batch, height * width, channels), (height, width), 0),
                ("NHWC", (batch, 2 + height * width, channels), (height, width), 2),
            ]
        )
    )
    return {
        "kernel": name,
        "layout": layout,
        "shape": shape,
        "grid": grid,
        "prefix": prefix,
        "align": draw(st.sampled_from(ALIGNMENTS)),
        "scale": draw(st.sampled_from([1.0, 0.0, 0.3, -1.0, 1.7])),
        "gamma": torch.randn(channels) if draw(st.booleans()) else None,
        "dtype": draw(st.sampled_from(DTYPES)),
    }


class TestDeSignForward:
    @given(case=settings_of_design())
    @settings(max_examples=150, deadline=None, derandomize=True)
    def test_it_is_the_formula(self, reference: ModuleType, case: dict[str, Any]) -> None:
        gamma = case["gamma"]
        activation = DeSign(
            KERNELS[case["kernel"]],
            scale=case["scale"],
            align=case["align"],
            gamma_from=None if gamma is None else norm_of(gamma),
            grid=case["grid"],
            prefix_tokens=case["prefix"],
            layout=case["layout"],
        )
        thresholds = reference.design_thresholds(
            ThresholdKernel.of(KERNELS[case["kernel"]]).levels,
            case["shape"],
            case["layout"],
            case["scale"],
            None if gamma is None else gamma.numpy(),
            case["align"],
            case["grid"],
            case["prefix"],
        )
        x = near(thresholds, case["dtype"])
        y = activation(x)
        assert y.dtype == x.dtype
        assert y.equal(reference.shifted_sign(x, thresholds))

    @pytest.mark.parametrize("align", ALIGNMENTS)
    @pytest.mark.parametrize("name", ["2x2x4_shifted_v1", "3x3_symmetric_v2", "2x3", "2x4x3"])
    def test_it_is_the_formula_at_every_small_size(self, reference: ModuleType, name: str, align: Alignment) -> None:
        activation = DeSign(KERNELS[name], align=align)
        for height in range(1, 8):
            for width in range(1, 8):
                thresholds = reference.design_thresholds(activation.kernel.levels, (1, 4, height, width), align=align)
                x = near(thresholds, torch.float32)
                assert activation(x).equal(reference.shifted_sign(x, thresholds)), (height, width)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", KERNELS)
    def test_it_compares_in_float32_in_every_precision(
        self, reference: ModuleType, name: str, dtype: torch.dtype
    ) -> None:
        activation = DeSign(KERNELS[name])
        thresholds = reference.design_thresholds(activation.kernel.levels, (1, 12, 3, 3))
        for x in (torch.from_numpy(thresholds).to(dtype), torch.from_numpy(thresholds).to(dtype) * 1.01):
            assert activation(x).equal(reference.shifted_sign(x, thresholds))

    @pytest.mark.parametrize("name", KERNELS)
    def test_a_value_on_its_threshold_gives_plus_one_and_a_hair_below_minus_one(self, name: str) -> None:
        activation = DeSign(KERNELS[name])
        thresholds = activation.kernel.tile(12, 5, 4)[None]
        assert (activation(thresholds) == 1).all()
        assert (activation(torch.nextafter(thresholds, torch.tensor(-math.inf))) == -1).all()

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_at_scale_zero_it_is_sign(self, name: str) -> None:
        x = torch.randn(2, 4, 5, 5)
        x[:, :, 0] = 0
        assert DeSign(name, scale=0)(x).equal(Sign()(x))

    def test_a_channels_last_tensor_gives_the_same(self) -> None:
        x = torch.randn(2, 4, 5, 6)
        activation = DeSign("2x2x4_baseline")
        assert activation(x.to(memory_format=torch.channels_last)).equal(activation(x))
        assert DeSign("2x2x4_baseline", layout="NHWC")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).equal(activation(x))

    def test_the_annealed_scale_takes_effect_at_once(self) -> None:
        activation = DeSign("2x2_v2", scale=0.0)
        x = torch.randn(1, 2, 4, 4)
        activation.scale.fill_(1.0)
        assert activation(x).equal(DeSign("2x2_v2")(x))

    def test_a_learned_kernel_starts_as_the_kernel(self) -> None:
        x = torch.randn(1, 4, 5, 5)
        learned = DeSign("2x2x4_baseline", learn_kernel=True)
        assert learned(x).equal(DeSign("2x2x4_baseline")(x))
        assert [name for name, _ in learned.named_parameters()] == ["levels"]
        assert not list(DeSign("2x2x4_baseline").parameters())


@pytest.mark.parametrize("name", ACTIVATIONS)
class TestEveryActivation:
    def test_the_output_is_plus_or_minus_one_of_the_input_s_type(self, name: str) -> None:
        for dtype in DTYPES:
            x = torch.randn(2, 4, 5, 3).to(dtype)
            y = make(name, 4)(x)
            assert y.dtype == dtype
            assert y.shape == x.shape
            assert set(y.unique().tolist()) == {-1.0, 1.0}

    def test_the_sign_of_zero_is_plus_one(self, name: str) -> None:
        activation = make(name, 4, **({"scale": 0.0} if name == "design" else {}))
        for zero in (0.0, -0.0):
            assert (activation(torch.full((1, 4, 2, 2), zero)) == 1).all()

    def test_nan_gives_minus_one_and_infinities_their_sign(self, name: str) -> None:
        activation = make(name, 4)
        for value, bit in [(math.nan, -1), (math.inf, 1), (-math.inf, -1)]:
            assert (activation(torch.full((1, 4, 2, 2), value)) == bit).all()

    @pytest.mark.parametrize("shape", [(0, 4, 3, 3), (1, 4, 1, 1), (4, 5, 3), (3, 4), (0, 4)])
    def test_unusual_shapes(self, name: str, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape, requires_grad=True)
        y = make(name, 4)(x)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape

    def test_it_needs_a_batch_and_channels(self, name: str) -> None:
        if name != "sign":  # which needs no channels
            with pytest.raises(ValueError, match=r"at least \[B, C\], not an input of shape \[4\]"):
                make(name, 4)(torch.zeros(4))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_give_the_same(self, name: str, copied: Any) -> None:
        activation = make(name, 4)
        x = torch.randn(2, 4, 5, 5)
        assert copied(activation)(x).equal(activation(x))
        assert repr(copied(activation)) == repr(activation)

    @pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
    def test_its_state_stays_in_float32(self, name: str, cast: str) -> None:
        activation = make(name, 4, **({"learn_kernel": True} if name == "design" else {}))
        for parameter in activation.parameters():
            parameter.data.add_(torch.rand_like(parameter) / 1000)
            parameter.grad = torch.ones_like(parameter)
        before = {key: value.clone() for key, value in activation.state_dict().items()}
        getattr(activation, cast)()
        for key, value in activation.state_dict().items():
            assert value.dtype == torch.float32
            assert value.equal(before[key])
        for parameter in activation.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32

    def test_an_unknown_layout_is_named(self, name: str) -> None:
        with pytest.raises(ValueError, match="unknown layout 'NWHC': use 'NCHW'"):
            make(name, 4, layout="NWHC")

    def test_an_unknown_estimator_is_named(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"unknown estimator 'sste'.*'ste'"):
            make(name, 4, estimator="sste")

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_the_gradient_is_the_estimator_s_at_the_distance_to_the_threshold(
        self, reference: ModuleType, name: str, estimator: str
    ) -> None:
        activation = make(name, 4, estimator=estimator)
        if name == "rsign":
            activation.get_parameter("shift").data.copy_(torch.randn(4))
        x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(x.shape, dtype=torch.float64)
        activation(x).backward(upstream)
        u = x - activation.threshold(x).double()
        expected = [reference.ESTIMATORS[estimator](value) for value in u.flatten().tolist()]
        torch.testing.assert_close(
            x.grad, upstream * torch.tensor(expected, dtype=torch.float64).view(x.shape), rtol=1e-6, atol=1e-7
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_the_gradient_has_the_input_s_type_and_is_computed_in_float32(self, name: str, dtype: torch.dtype) -> None:
        x = torch.randn(2, 4, 3, 5).to(dtype).requires_grad_()
        wide = x.detach().float().requires_grad_()
        activation = make(name, 4)
        activation(x).sum().backward()
        activation(wide).sum().backward()
        assert x.grad is not None
        assert wide.grad is not None
        assert x.grad.equal(wide.grad.to(dtype))

    def test_a_second_derivative_exists(self, name: str) -> None:
        x = torch.rand(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        activation = make(name, 4, "floats", estimator="ede", estimator_args={"temperature": 2.0})
        (first,) = torch.autograd.grad(activation(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        u = x - activation.threshold(x).double()
        expected = -8 * torch.tanh(2 * u) * (1 - torch.tanh(2 * u) ** 2)  # d/du of 2 (1 - tanh(2 u)^2)
        torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-6)

    def test_functional_transforms(self, name: str) -> None:
        activation = make(name, 4)
        x = torch.randn(3, 2, 4, 5, 5)
        torch.testing.assert_close(torch.func.vmap(activation)(x), torch.stack([activation(image) for image in x]))
        per_sample = torch.func.vmap(torch.func.grad(lambda image: (activation(image) * image.detach()).sum()))(x)
        x.requires_grad_()
        (activation(x.flatten(0, 1)).view_as(x) * x.detach()).sum().backward()
        torch.testing.assert_close(per_sample, x.grad)


class TestGradientsOfThresholds:
    """The threshold's gradient is minus that of the input, summed over the places that share a value."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("align", ALIGNMENTS)
    @pytest.mark.parametrize("with_gamma", [False, True])
    @pytest.mark.parametrize("name", ["3x3_symmetric_v2", "2x2x4_baseline", "2x4x3"])
    def test_of_a_learned_kernel_and_of_gamma(
        self, reference: ModuleType, name: str, with_gamma: bool, align: str, dtype: torch.dtype
    ) -> None:
        scale, gamma = 0.7, torch.rand(4) + 0.5
        norm = norm_of(gamma) if with_gamma else None
        activation = DeSign(KERNELS[name], scale=scale, align=align, learn_kernel=True, gamma_from=norm)  # type: ignore[arg-type]
        keep_for_backward_(activation, "exact")
        x = torch.randn(2, 4, 5, 4, dtype=dtype, requires_grad=True)
        upstream = torch.randn(x.shape, dtype=dtype)
        activation(x).backward(upstream)

        levels = np.array(activation.kernel.levels)
        to_levels, to_gamma = np.zeros(levels.shape), np.zeros(4)
        depth, h, w = levels.shape
        oi, oj = ((math.ceil(5 / h) * h - 5) // 2, (math.ceil(4 / w) * w - 4) // 2) if align == "center" else (0, 0)
        thresholds = reference.design_thresholds(
            levels, tuple(x.shape), scale=scale, gamma=gamma.numpy() if with_gamma else None, align=align
        )
        for b, c, i, j in np.ndindex(*x.shape):
            place = c % depth, (i + oi) % h, (j + oj) % w
            u = x[b, c, i, j].item() - float(thresholds[b, c, i, j])
            flow = -upstream[b, c, i, j].item() * reference.approx_sign(u) * scale
            to_levels[place] += flow * (gamma[c].item() if with_gamma else 1)
            to_gamma[c] += flow * levels[place]
        assert activation.levels.grad is not None
        assert activation.levels.grad.numpy() == pytest.approx(to_levels, rel=2e-5, abs=1e-5)
        if norm is not None:
            assert norm.weight.grad is not None
            assert norm.weight.grad.numpy() == pytest.approx(to_gamma, rel=2e-5, abs=1e-5)

    @pytest.mark.parametrize("layout", get_args(Layout))
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_of_a_learned_shift(self, reference: ModuleType, estimator: str, layout: Layout) -> None:
        activation = RSign(3, layout=layout, estimator=estimator)
        keep_for_backward_(activation, "exact")
        activation.shift.data.copy_(torch.tensor([-0.25, 0.0, 0.5]))
        x = torch.randn((2, 3, 4, 5) if layout == "NCHW" else (2, 4, 5, 3), requires_grad=True)
        activation(x).sum().backward()
        values = (x if layout == "NCHW" else x.permute(0, 3, 1, 2)).transpose(0, 1).flatten(1).tolist()
        expected = [
            -math.fsum(reference.ESTIMATORS[estimator](v - shift) for v in row)
            for row, shift in zip(values, activation.shift.tolist(), strict=True)
        ]
        assert activation.shift.grad is not None
        assert activation.shift.grad.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


class TestRSign:
    @pytest.mark.parametrize("layout", get_args(Layout))
    def test_each_channel_has_its_shift(self, layout: Layout) -> None:
        activation = RSign(3, layout=layout)
        activation.shift.data.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        x = torch.zeros((1, 3, 2, 2) if layout == "NCHW" else (1, 2, 2, 3))
        y = activation(x) if layout == "NCHW" else activation(x).permute(0, 3, 1, 2)
        assert y[0, :, 0, 0].tolist() == [1.0, 1.0, -1.0]

    def test_another_number_of_channels_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"RSign of 3 channels got an input of 4: \[1, 4, 2, 2\]"):
            RSign(3)(torch.zeros(1, 4, 2, 2))


class TestDeSignState:
    def test_levels_and_scale_are_in_the_state_dict(self) -> None:
        stored = DeSign("3x3_symmetric_v1", scale=0.5).state_dict()
        assert stored["scale"] == 0.5
        assert stored["levels"].equal(ThresholdKernel.named("3x3_symmetric_v1").tensor())
        other = DeSign("3x3_symmetric_v2")
        other.load_state_dict(stored)
        x = torch.randn(1, 1, 5, 5)
        assert other(x).equal(DeSign("3x3_symmetric_v1", scale=0.5)(x))

    def test_the_norm_of_gamma_is_no_part_of_it(self) -> None:
        activation = DeSign("2x2_v1", gamma_from=nn.BatchNorm2d(3))
        assert set(activation.state_dict()) == {"levels", "scale", "unit"}
        assert not list(activation.parameters())

    def test_a_copied_network_takes_gamma_from_its_own_norm(self) -> None:
        norm = nn.BatchNorm2d(2)
        network = nn.Sequential(norm, DeSign("2x2_v1", gamma_from=norm))
        copied = copy.deepcopy(network)
        assert copied[1].gamma_from is copied[0]
        assert copied[1].gamma_from is not norm

    def test_gamma_in_another_precision_counts_in_float32(self, reference: ModuleType) -> None:
        norm = norm_of(torch.rand(2) + 0.5).bfloat16()
        activation = DeSign("2x2_v1", scale=0.3, gamma_from=norm)
        gamma = norm.weight.detach().float().numpy()
        thresholds = reference.design_thresholds(activation.kernel.levels, (1, 2, 3, 3), scale=0.3, gamma=gamma)
        assert np.array_equal(activation.threshold(torch.zeros(1, 2, 3, 3)).detach().numpy(), thresholds[0])

    def test_its_repr_says_what_differs_from_the_default(self) -> None:
        text = repr(DeSign("2x2_v1", scale=0.5, align="center", learn_kernel=True, grid=(2, 3), prefix_tokens=1))
        for part in ("2x2_v1", "scale=0.5", "align=center", "learn_kernel=True", "grid=(2, 3)", "prefix_tokens=1"):
            assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "2x2_v9"}, "unknown kernel '2x2_v9'.*'2x2_v[12]'"),
        ({"align": "middle"}, "unknown alignment 'middle'.*'topleft' or 'center'"),
        ({"gamma_from": nn.BatchNorm2d(3, affine=False)}, "BatchNorm2d.*has no weight"),
        ({"gamma_from": nn.Identity()}, "Identity.*has no weight"),
        ({"estimator_args": {"clip": 2.0}, "estimator": "st"}, "unknown estimator 'st'.*'ste'"),
    ],
)
def test_a_wrong_argument_of_design_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeSign(**arguments)


@pytest.mark.parametrize(
    ("activation", "shape", "message"),
    [
        (DeSign("2x2x4_baseline"), (1, 6, 2, 2), "kernel has 4 channels, but the input has 6, not a multiple of 4"),
        (DeSign("2x2_v1", gamma_from=nn.BatchNorm2d(3)), (1, 6, 2, 2), r"norm .* has 3 channels .* input has 6"),
        (
            DeSign(grid=(2, 3), prefix_tokens=1, layout="NHWC"),
            (1, 6, 8),
            "6 tokens are not 1 prefix tokens and a grid of 2 x 3",
        ),
    ],
)
def test_an_input_that_does_not_fit_is_named(activation: DeSign, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activation(torch.zeros(shape))
