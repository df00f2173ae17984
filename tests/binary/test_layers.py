"""`BinaryConv2d` and `BinaryLinear`: +-1 inputs, padded by numpy, convolved with the weights of the reference."""

import copy
import io
import pickle
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from design_lightning.binary import (
    ACTIVATIONS,
    ESTIMATORS,
    WEIGHT_BINARIZERS,
    BinaryActivation,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    DeSign,
    PaddingValue,
    RSign,
    Sign,
    Stage,
)
from design_lightning.binary.keeping import Keeps, keep_for_backward_

STAGES = get_args(Stage)
PADDING_VALUES = get_args(PaddingValue)
CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": (3, 5), "padding": (1, 2), "bias": True},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (2, 3), "padding": (1, 0), "stride": (2, 1)},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": True},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": (2, 1), "padding": (0, 1), "groups": 2, "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)},
    {"kernel_size": 3, "padding": "valid"},
]


def make_activation(name: str, channels: int, layout: Any = "NCHW", **arguments: Any) -> BinaryActivation:
    return RSign(channels, layout, **arguments) if name == "rsign" else ACTIVATIONS[name](layout=layout, **arguments)


def make_layer(
    kind: str, activation: str = "design", estimator: str = "approx_sign", keeps: Keeps = "exact", **arguments: Any
) -> tuple[BinaryLayer, Tensor]:
    """A convolution or a linear layer, and an input for it."""
    layer: Any
    if kind == "conv":
        binarizer = make_activation(activation, 4, estimator=estimator)
        layer, x = (
            BinaryConv2d(4, 6, 3, padding=1, bias=True, activation=binarizer, **arguments),
            torch.randn(2, 4, 5, 6),
        )
    else:
        binarizer = make_activation(activation, 4, "NHWC", estimator=estimator)
        layer, x = BinaryLinear(4, 6, activation=binarizer, **arguments), torch.randn(2, 9, 4)
    keep_for_backward_(layer, keeps)
    return layer, x


def pads_of(convolution: dict[str, Any]) -> list[tuple[int, int]]:
    """(before, after) of rows and of columns."""

    def pair(key: str, default: int) -> tuple[int, int]:
        value = convolution.get(key, default)
        return value if isinstance(value, tuple) else (value, value)

    if convolution.get("padding") == "same":
        totals = [d * (k - 1) for d, k in zip(pair("dilation", 1), pair("kernel_size", 1), strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in ((0, 0) if convolution.get("padding") == "valid" else pair("padding", 0))]


def padded(x: Tensor, pads: list[tuple[int, int]], value: Any) -> Tensor:
    widths = [(0, 0), (0, 0), *pads]
    kept: dict[str, Any] = {"mode": "edge"} if value == "replicate" else {"mode": "constant", "constant_values": value}
    return torch.from_numpy(np.pad(x.numpy(), widths, **kept))


class TestConvolution:
    @pytest.mark.parametrize("padding_value", PADDING_VALUES)
    @pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
    def test_it_is_a_convolution_of_the_padded_bits(
        self, reference: ModuleType, convolution: dict[str, Any], padding_value: PaddingValue
    ) -> None:
        layer = BinaryConv2d(
            4, 8, **convolution, activation=DeSign("2x2x4_baseline"), weight="sign", padding_value=padding_value
        )
        x = torch.randn(2, 4, 7, 6)
        thresholds = reference.design_thresholds(layer.activation.kernel.levels, tuple(x.shape))  # type: ignore[union-attr]
        bits = padded(reference.shifted_sign(x, thresholds), pads_of(convolution), padding_value)
        weight = reference.binary_weight("sign", layer.weight)
        geometry = {key: convolution[key] for key in ("stride", "dilation", "groups") if key in convolution}
        expected = F.conv2d(bits.double(), weight.double(), **geometry)
        if layer.bias is not None:
            expected += layer.bias.double().view(-1, 1, 1)
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-6)
        else:
            assert layer(x).double().equal(expected)  # sums of +-1 are exact

    @pytest.mark.parametrize("padding_value", PADDING_VALUES)
    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation_goes_with_every_weight_and_padding(
        self, reference: ModuleType, activation: str, weight: str, padding_value: PaddingValue
    ) -> None:
        layer, x = make_layer("conv", activation, weight=weight, padding_value=padding_value)
        levels = [[[0.0]]] if activation != "design" else layer.activation.kernel.levels  # type: ignore[union-attr]
        bits = reference.shifted_sign(x, reference.design_thresholds(levels, tuple(x.shape)))
        expected = F.conv2d(
            padded(bits, [(1, 1), (1, 1)], padding_value).double(),
            reference.binary_weight(weight, layer.weight.double()),
            layer.get_parameter("bias").double(),
        )
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
    def test_torch_s_padding_modes_pad_the_bits(self, padding_mode: Any) -> None:
        layer = BinaryConv2d(3, 4, 3, padding=1, padding_mode=padding_mode, activation=DeSign(), weight="sign")
        x = torch.randn(1, 3, 5, 5)
        bits = F.pad(DeSign()(x), (1, 1, 1, 1), mode=padding_mode)
        assert layer(x).equal(F.conv2d(bits, torch.where(layer.weight >= 0, 1.0, -1.0)))

    @pytest.mark.parametrize("padding_value", PADDING_VALUES)
    def test_one_image_and_an_empty_batch(self, padding_value: PaddingValue) -> None:
        layer, x = make_layer("conv", padding_value=padding_value)
        torch.testing.assert_close(layer(x[0]), layer(x)[0])
        assert layer(x[:0]).shape == (0, 6, 5, 6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("padding_value", PADDING_VALUES)
    def test_other_precisions(self, padding_value: PaddingValue, dtype: torch.dtype) -> None:
        layer = BinaryConv2d(4, 8, 3, padding=1, activation=DeSign(), weight="sign", padding_value=padding_value)
        x = torch.randn(2, 4, 5, 5).to(dtype)
        expected = layer(x.float())
        y = layer.to(dtype)(x)
        assert y.dtype == dtype
        assert y.float().equal(expected)  # sums of 36 bits are exact in all of them

    @pytest.mark.parametrize("padding_value", [2, "zeros", None, "edge"])
    def test_an_unknown_padding_value_is_named(self, padding_value: Any) -> None:
        with pytest.raises(ValueError, match=f"must be 0, 1, -1 or 'replicate', not {padding_value!r}"):
            BinaryConv2d(1, 1, 3, activation=Sign(), padding_value=padding_value)

    def test_a_padding_value_excludes_a_padding_mode(self) -> None:
        with pytest.raises(ValueError, match="padding_value -1 does not go with padding_mode 'circular'; use 0"):
            BinaryConv2d(1, 1, 3, padding=1, padding_mode="circular", activation=Sign(), padding_value=-1)

    def test_its_repr_names_what_is_binary(self) -> None:
        text = repr(BinaryConv2d(1, 2, 3, activation=DeSign("2x2_v2"), padding_value="replicate", stage="activations"))
        for part in ("2x2_v2", "padding_value='replicate'", "stage=activations", "XNORWeight"):
            assert part in text


class TestLinear:
    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    @pytest.mark.parametrize("shape", [(3, 4), (2, 9, 4), (2, 3, 5, 4), (0, 4)], ids=str)
    def test_it_is_a_product_of_bits(self, reference: ModuleType, shape: tuple[int, ...], weight: str) -> None:
        layer = BinaryLinear(4, 6, activation=DeSign("2x2x4_baseline", layout="NHWC"), weight=weight)
        x = torch.randn(shape)
        thresholds = reference.design_thresholds(layer.activation.kernel.levels, shape, "NHWC")  # type: ignore[union-attr]
        bits = reference.shifted_sign(x, thresholds).double()
        expected = bits @ reference.binary_weight(weight, layer.weight.double()).T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)

    def test_its_activation_has_its_channels_last(self) -> None:
        with pytest.raises(ValueError, match="channels last: give Sign layout='NHWC'"):
            BinaryLinear(4, 6, activation=Sign())
        with pytest.raises(ValueError, match="channels last: give DeSign layout='NHWC'"):
            BinaryLinear.from_float(nn.Linear(4, 6), DeSign())


def test_the_activation_of_a_convolution_has_its_channels_first() -> None:
    with pytest.raises(ValueError, match="channels first: give DeSign layout='NCHW'"):
        BinaryConv2d(4, 6, 3, activation=DeSign(layout="NHWC"))
    with pytest.raises(ValueError, match="channels first: give Sign layout='NCHW'"):
        BinaryConv2d.from_float(nn.Conv2d(4, 6, 3), Sign(layout="NHWC"))


def float_twin(layer: BinaryLayer) -> Any:
    """A float layer with the same parameters, made anew."""
    twin: Any = nn.Conv2d(4, 6, 3, padding=1) if isinstance(layer, nn.Conv2d) else nn.Linear(4, 6)
    twin.load_state_dict({key: value for key, value in layer.state_dict().items() if key in ("weight", "bias")})
    return twin


@pytest.mark.parametrize("kind", ["conv", "linear"])
class TestStages:
    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    def test_float_is_the_float_layer_bit_for_bit(self, kind: str, weight: str) -> None:
        layer, x = make_layer(kind, weight=weight, stage="float")
        assert layer(x).equal(float_twin(layer)(x))

    @pytest.mark.parametrize("padding_value", [0, 1, -1])
    def test_a_float_input_is_padded_with_zeros(self, kind: str, padding_value: PaddingValue) -> None:
        if kind == "conv":
            layer, x = make_layer(kind, padding_value=padding_value, stage="float")
            assert layer(x).equal(float_twin(layer)(x))

    def test_activations_binarizes_the_input_alone(self, kind: str) -> None:
        layer, x = make_layer(kind, stage="activations")
        assert layer.activation is not None
        assert layer(x).equal(float_twin(layer)(layer.activation(x)))

    def test_both_binarizes_the_weights_too(self, kind: str) -> None:
        layer, x = make_layer(kind)
        twin = float_twin(layer)
        twin.weight.data.copy_(layer.weight_binarizer(layer.weight))
        assert layer.activation is not None
        torch.testing.assert_close(layer(x), twin(layer.activation(x)))

    @pytest.mark.parametrize("stage", STAGES)
    def test_without_an_activation_the_input_stays_float(self, kind: str, stage: Stage) -> None:
        make: Any = (
            BinaryConv2d(4, 6, 3, padding=1, bias=True, activation=None, stage=stage) if kind == "conv" else None
        )
        layer = make or BinaryLinear(4, 6, activation=None, stage=stage)
        assert not layer.input_is_binary
        x = torch.randn((2, 4, 5, 6) if kind == "conv" else (2, 9, 4))
        twin = float_twin(layer)
        if stage == "both":
            twin.weight.data.copy_(layer.weight_binarizer(layer.weight))
        assert layer(x).equal(twin(x))

    def test_a_stage_takes_effect_on_the_same_parameters(self, kind: str) -> None:
        layer, x = make_layer(kind)
        parameters = {name: id(p) for name, p in layer.named_parameters()}
        outputs = []
        for stage in STAGES:
            layer.set_stage(stage)
            outputs.append(layer(x))
        assert {name: id(p) for name, p in layer.named_parameters()} == parameters
        assert not any(outputs[i].equal(outputs[j]) for i, j in [(0, 1), (1, 2), (0, 2)])

    @pytest.mark.parametrize("stage", STAGES)
    def test_the_state_dict_carries_the_stage(self, kind: str, stage: Stage) -> None:
        layer, x = make_layer(kind, stage=stage)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        for start in STAGES:
            other, _ = make_layer(kind, stage=start)
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
            assert other.stage == stage
            assert other(x).equal(layer(x))

    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    def test_the_latent_weights_keep_the_float_layer_s_keys(self, kind: str, weight: str) -> None:
        layer, _ = make_layer(kind, weight=weight)
        assert set(float_twin(layer).state_dict()) <= set(layer.state_dict())
        stages = []
        for stage in STAGES:
            layer.set_stage(stage)
            stages.append(list(layer.state_dict()))
        assert stages[0] == stages[1] == stages[2]

    def test_an_unknown_stage_is_named(self, kind: str) -> None:
        with pytest.raises(ValueError, match="unknown stage 'bothh': use one of float, activations, both"):
            make_layer(kind, stage="bothh")
        layer, _ = make_layer(kind)
        with pytest.raises(ValueError, match="unknown stage 'binary'"):
            layer.set_stage("binary")  # type: ignore[arg-type]
        assert layer.stage == "both"

    def test_an_unknown_weight_binarizer_is_named(self, kind: str) -> None:
        with pytest.raises(ValueError, match=r"unknown weight binarizer 'xnorr'.*did you mean.*'xnor'"):
            make_layer(kind, weight="xnorr")

    def test_arguments_reach_the_weight_binarizer(self, kind: str) -> None:
        layer, _ = make_layer(kind, weight="recu", weight_args={"tau": 0.9})
        assert layer.state_dict()["weight_binarizer.tau"] == torch.tensor(0.9)

    def test_the_latent_weights_and_the_input_get_gradients(self, kind: str) -> None:
        for weight in WEIGHT_BINARIZERS:
            for stage in STAGES:
                layer, x = make_layer(kind, weight=weight, stage=stage)
                x.requires_grad_()
                layer(x).square().sum().backward()
                for tensor in (x, layer.get_parameter("weight"), layer.get_parameter("bias")):
                    assert tensor.grad is not None
                    assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["conv", "linear"])
class TestFromFloat:
    def test_it_takes_the_parameters_over_without_a_copy(self, kind: str) -> None:
        for weight in WEIGHT_BINARIZERS:
            layer, x = make_layer(kind)
            twin = float_twin(layer)
            expected = twin(x)
            made: BinaryLayer = type(layer).from_float(twin, layer.activation, weight, stage="float")  # type: ignore[attr-defined]
            assert made.weight is twin.weight
            assert made.bias is twin.bias
            assert made(x).equal(expected)
            assert not hasattr(twin, "activation")  # nothing was added to the float layer
            assert set(twin.state_dict()) == {"weight", "bias"}

    def test_it_gives_what_the_constructor_gives(self, kind: str) -> None:
        layer, x = make_layer(kind, weight="irnet")
        made = type(layer).from_float(float_twin(layer), copy.deepcopy(layer.activation), "irnet")  # type: ignore[attr-defined]
        assert made(x).equal(layer(x))
        assert repr(made) == repr(layer)

    def test_mode_gradient_flags_and_hooks_come_along(self, kind: str) -> None:
        layer, x = make_layer(kind)
        twin = float_twin(layer).eval()
        twin.weight.requires_grad_(False)
        seen = []
        twin.register_forward_hook(lambda module, args, output: seen.append(module))
        made = type(layer).from_float(twin, layer.activation)  # type: ignore[attr-defined]
        made(x)
        assert seen == [made]
        assert not made.training
        assert not made.weight.requires_grad


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_give_the_same_and_share_nothing(self, kind: str, weight: str, copied: Any) -> None:
        layer, x = make_layer(kind, weight=weight, stage="activations")
        other = copied(layer)
        assert other.stage == "activations"
        assert other(x).equal(layer(x))
        before = layer(x)
        for parameter in other.parameters():
            parameter.data.zero_()
        assert layer(x).equal(before)

    @pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
    def test_a_cast_moves_the_parameters_and_keeps_the_float32_state(self, kind: str, weight: str, cast: str) -> None:
        layer, x = make_layer(kind, weight=weight)
        getattr(layer, cast)()
        assert layer.weight.dtype != torch.float32
        kept = {
            k: v
            for k, v in layer.state_dict().items()
            if k.rsplit(".")[-1] in ("levels", "scale", "tau", "temperature")
        }
        assert kept
        assert all(value.dtype == torch.float32 for value in kept.values())
        y = layer(x.to(layer.weight.dtype))
        assert y.dtype == layer.weight.dtype
        y.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.isfinite().all()


class TestAutocast:
    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    def test_bits_survive_bfloat16(self, weight: str) -> None:
        layer, x = make_layer("conv", weight=weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.1)
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["conv", "linear"])
class TestTransforms:
    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    def test_per_sample_gradients(self, kind: str, weight: str) -> None:
        layer, x = make_layer(kind, weight=weight)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
            return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)

    def test_a_double_backward(self, kind: str) -> None:
        for estimator in ESTIMATORS:
            layer, x = make_layer(kind, estimator=estimator, keeps="floats")
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            gradient.square().sum().backward()
            assert layer.weight.grad is not None
            assert layer.weight.grad.isfinite().all()
            assert layer.weight.grad.abs().max() > 0
