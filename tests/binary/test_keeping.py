"""What waits for the backward pass: bits, and gradients that are those of the naive layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from design_lightning.binary import (
    ESTIMATORS,
    WEIGHT_BINARIZERS,
    ApproxSign,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    DeSign,
    Estimator,
    Hardtanh,
    RSign,
    Sign,
    elementwise,
    keep_for_backward_,
    largest_error,
    make_estimator,
)
from design_lightning.binary.derivatives import code_of, decode, encode, step_of
from design_lightning.binary.keeping import Keeps
from design_lightning.binary.layers import PaddingValue, Stage
from design_lightning.binary.packing import pack_bits, pack_nibbles, packing_axis, unpack_bits, unpack_nibbles

PADDINGS: list[PaddingValue | str] = [0, 1, -1, "replicate", "reflect", "circular", "same", "even"]


def convolution(
    padding: PaddingValue | str = 0,
    estimator: str = "ste",
    weight: str = "xnor",
    stage: Stage = "both",
    groups: int = 1,
) -> BinaryConv2d:
    settings: dict[str, Any] = {"padding": 1, "padding_value": padding}
    if padding in ("reflect", "circular"):
        settings = {"padding": 1, "padding_mode": padding}
    elif padding == "same":
        settings = {"padding": "same", "dilation": 2}
    elif padding == "even":  # two pixels before, one behind
        settings = {"padding": "same", "padding_value": -1}
    activation = DeSign("2x2x4_baseline", learn_kernel=True, estimator=estimator)
    size = 4 if padding == "even" else 3
    return BinaryConv2d(
        8, 6, size, bias=True, groups=groups, activation=activation, weight=weight, stage=stage, **settings
    )


def linear(estimator: str = "ste", weight: str = "xnor", stage: Stage = "both", bias: bool = True) -> BinaryLinear:
    activation = DeSign("2x2_v1", learn_kernel=True, estimator=estimator, layout="NHWC", grid=(3, 3))
    return BinaryLinear(8, 6, bias=bias, activation=activation, weight=weight, stage=stage)


def input_for(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((5, 8, 6, 7) if isinstance(layer, BinaryConv2d) else (5, 9, 8)).to(dtype)


def gradients(layer: nn.Module, x: Tensor, keeps: Keeps, call: Any = None) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    keep_for_backward_(layer, keeps)
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = (call or layer)(x)
    generator = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad, **found}


def assert_same_bits(ours: dict[str, Tensor], naive: dict[str, Tensor]) -> None:
    """Of the gradients; the output is a whole number times a scale here, and a sum of rounded products there."""
    assert ours.keys() == naive.keys()
    torch.testing.assert_close(ours["output"], naive["output"])
    for name in naive.keys() - {"output"}:
        assert ours[name].equal(naive[name]), name


class TestGradients:
    """Of every estimator, weight binarizer and layer kind: the naive ones to the last bit, but for the 4 bits of some."""

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    @pytest.mark.parametrize("kind", [convolution, linear])
    def test_exact_is_naive(self, kind: Any, weight: str, estimator: str) -> None:
        layer = kind(weight=weight, estimator=estimator)
        x = input_for(layer)
        naive = gradients(layer, x, "floats")
        assert all(gradient.abs().max() > 0 for gradient in naive.values())
        assert_same_bits(gradients(layer, x, "exact"), naive)
        if layer.activation.estimator.is_mask:
            assert_same_bits(gradients(layer, x, "bits"), naive)

    @pytest.mark.parametrize("stage", ["activations", "both"])
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_every_padding(self, padding: PaddingValue | str, stage: Stage) -> None:
        layer = convolution(padding, stage=stage)
        x = input_for(layer)
        assert_same_bits(gradients(layer, x, "bits"), gradients(layer, x, "floats"))

    @pytest.mark.parametrize("groups", [1, 2])
    def test_channels_last(self, groups: int) -> None:
        layer = convolution(groups=groups).to(memory_format=torch.channels_last)
        x = torch.randn(3, 8, 40, 56).to(memory_format=torch.channels_last)
        ours, naive = gradients(layer, x, "bits"), gradients(layer, x, "floats")
        assert_same_bits(ours, naive)
        assert ours["output"].is_contiguous(memory_format=torch.channels_last)
        assert ours["input"].stride() == naive["input"].stride()

    @pytest.mark.parametrize("shape", [(9, 8), (2, 3, 9, 8), (0, 9, 8)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear_layers_of_other_shapes(self, shape: tuple[int, ...], bias: bool) -> None:
        layer = BinaryLinear(8, 6, bias=bias, activation=Sign("NHWC", "ste"))
        x = torch.randn(shape)
        assert_same_bits(gradients(layer, x, "bits"), gradients(layer, x, "floats"))

    def test_one_image_without_a_batch_and_no_image(self) -> None:
        layer = BinaryConv2d(8, 6, 3, padding=1, activation=Sign(estimator="ste"))
        for x in (torch.randn(8, 5, 5), torch.randn(0, 8, 5, 5)):
            ours, naive = gradients(layer, x, "bits"), gradients(layer, x, "floats")
            assert_same_bits(ours, naive)

    @pytest.mark.parametrize("estimator", ["ste", "approx_sign"])
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("samples", [0, 1, 2])
    def test_large_batches_go_in_pieces(
        self, monkeypatch: pytest.MonkeyPatch, samples: int, channels_last: bool, estimator: str
    ) -> None:
        layers = [BinaryConv2d(8, 6, 3, padding=1, activation=RSign(8, estimator=estimator)), linear(estimator)]
        for layer in layers:
            x = input_for(layer)
            if channels_last and x.dim() == 4:
                x = x.to(memory_format=torch.channels_last)
            whole = [gradients(layer, x, keeps) for keeps in ("bits", "exact")]
            with monkeypatch.context() as patch:
                patch.setattr(elementwise, "PIECE", max(1, samples * x[0].numel()))
                assert elementwise.goes_in_pieces(x)
                for keeps, expected in zip(("bits", "exact"), whole, strict=True):
                    in_pieces = gradients(layer, x, keeps)
                    assert all(in_pieces[name].equal(value) for name, value in expected.items())
                    assert in_pieces["input"].stride() == expected["input"].stride()

    @pytest.mark.parametrize("kind", [convolution, linear])
    @pytest.mark.parametrize("estimator", ["ste", "approx_sign"])
    def test_bfloat16_within_rounding(self, kind: Any, estimator: str) -> None:
        layer = kind(estimator=estimator)
        x = input_for(layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, naive = gradients(layer, x, "exact"), gradients(layer, x, "floats")
        assert ours["output"].dtype == torch.bfloat16
        for name, value in naive.items():
            torch.testing.assert_close(ours[name], value, rtol=0.02, atol=0.02 * float(value.abs().max()))

    def test_hooks_see_the_binarizer_and_change_nothing(self) -> None:
        layer = convolution(estimator="approx_sign")
        x = input_for(layer)
        expected = gradients(layer, x, "bits")
        seen: list[Tensor] = []
        layer.activation.register_forward_hook(lambda module, inputs, output: seen.append(output))  # type: ignore[union-attr]
        assert_same_bits(gradients(layer, x, "bits"), expected)
        assert set(seen[0].unique().tolist()) == {-1.0, 1.0}

    @pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
    @pytest.mark.parametrize("kind", [convolution, linear])
    def test_the_output_is_a_whole_number_times_a_scale(self, kind: Any, weight: str) -> None:
        """So it is the same however the sums are ordered: in one thread or many, sample by sample, channels last or first."""
        layer = kind(weight=weight)
        x = input_for(layer)
        y = layer(x)
        signs = layer.weight_binarizer.signs(layer.weight.detach())
        scale = layer.weight_binarizer.scale(layer.weight.detach())
        binary = (x >= layer.activation.threshold(x)).double() * 2 - 1
        if kind is linear:
            sums, per_output = nn.functional.linear(binary, signs.double()), (1, 1, -1)
        else:
            sums, per_output = nn.functional.conv2d(binary, signs.double(), padding=1), (1, -1, 1, 1)
        counts = sums.float()
        expected = counts if scale is None else counts * scale.abs().view(per_output)
        assert y.equal(expected + layer.bias.view(per_output))
        assert torch.cat([layer(one[None]) for one in x]).equal(y)

    def test_a_binarizer_with_a_forward_of_its_own_is_not_taken_for_bits(self) -> None:
        class Ternary(Sign):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * (x.abs() > 0.5)

        layer = BinaryConv2d(8, 6, 3, activation=Ternary(estimator="ste"))
        x = input_for(layer)
        assert_same_bits(gradients(layer, x, "bits"), gradients(layer, x, "floats"))


class TestFourBits:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("approx_sign", {}),
            ("swish_sign", {}),
            ("swish_sign", {"beta": 2.0}),
            *[("ede", {"temperature": t}) for t in (0.1, 1.0, 10.0)],
            *[("reste", {"temperature": t}) for t in (0.5, 1.0, 2.0, 3.0)],
        ],
    )
    def test_the_derivative_is_off_by_half_a_step_at_most(self, name: str, arguments: dict[str, float]) -> None:
        estimator = make_estimator(name, **arguments)
        u = torch.linspace(-3, 3, 48_008).view(1, -1)
        code = code_of(estimator, "bits")
        assert code == "levels"
        kept = encode(u, estimator, code)
        assert kept.numel() == u.numel() / 2
        derivative = decode(kept, step_of(estimator, code), estimator, code, u.shape, u.dtype)
        exact = estimator.derivative(u)
        bound = largest_error(estimator)
        assert (derivative - exact).abs().max() <= bound * (1 + 1e-5)
        assert bound <= float(exact.abs().max()) / 26  # 15 steps at most, one of which may be lost below 0
        assert derivative[exact == 0].abs().max() == 0 if (exact == 0).any() else True

    def test_the_bound_that_the_documentation_states(self) -> None:
        assert largest_error(ApproxSign()) == pytest.approx(1 / 15)
        assert largest_error(make_estimator("ste")) == 0

    def test_a_temperature_that_moves_before_the_backward_pass_changes_nothing(self) -> None:
        activation = DeSign(estimator="ede", estimator_args={"temperature": 2.0})
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        (expected,) = torch.autograd.grad(activation(x).sum(), x)
        y = activation(x).sum()
        activation.estimator.temperature.fill_(5)  # type: ignore[union-attr, operator]
        assert torch.autograd.grad(y, x)[0].equal(expected)

    def test_an_estimator_whose_range_is_unknown_is_kept_exactly(self) -> None:
        class Gauss(Estimator):
            def derivative(self, u: Tensor) -> Tensor:
                return torch.exp(-u.square())

        layer = BinaryConv2d(8, 6, 3, activation=Sign(estimator=Gauss()))
        x = input_for(layer)
        assert largest_error(Gauss()) == 0
        assert_same_bits(gradients(layer, x, "bits"), gradients(layer, x, "floats"))


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("kind", [convolution, linear])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("estimator", "bits"), [("ste", 2), ("approx_sign", 5), ("swish_sign", 5)])
def test_bits_are_all_that_grows_with_the_batch(kind: Any, hooked: bool, estimator: str, bits: int) -> None:
    layer: BinaryLayer = kind(estimator=estimator)
    if hooked:
        layer.activation.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    x = input_for(layer).requires_grad_()
    with saved_tensors() as kept:
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    of_the_batch = [t for t in kept if t.shape[:1] == x.shape[:1] and t.data_ptr() not in parameters]
    assert {t.dtype for t in of_the_batch} == {torch.uint8}
    assert sum(t.numel() for t in of_the_batch) == x.numel() * bits // 8
    assert all(t.numel() < x.numel() for t in kept)


def test_hardtanh_keeps_one_bit_and_has_torch_s_gradient() -> None:
    x = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, float("nan")]], requires_grad=True)
    ours, theirs = Hardtanh(), nn.Hardtanh()
    with saved_tensors() as kept:
        y = ours(x)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 1)]
    assert y.nan_to_num(7).equal(theirs(x).nan_to_num(7))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(theirs(x).sum(), x)
    assert gradient[:, :-1].equal(expected[:, :-1])


class TestCompany:
    """Checkpointing, export, transforms and the rest: they work, or are refused with a clear line."""

    @pytest.mark.parametrize("kind", [convolution, linear])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, kind: Any, reentrant: bool) -> None:
        layer = kind(estimator="approx_sign")
        x = input_for(layer)
        expected = gradients(layer, x, "bits")
        assert_same_bits(gradients(layer, x, "bits", lambda x: checkpoint(layer, x, use_reentrant=reentrant)), expected)

    @pytest.mark.parametrize("keeps", ["bits", "exact"])
    @pytest.mark.parametrize("kind", [convolution, linear])
    def test_a_double_backward_is_refused(self, kind: Any, keeps: Keeps) -> None:
        layer = kind()
        keep_for_backward_(layer, keeps)
        x = input_for(layer).requires_grad_()
        with pytest.raises(RuntimeError, match=r"keep_for_backward_\(model, 'floats'\)"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        keep_for_backward_(layer, "floats")
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.sum().backward()

    @pytest.mark.parametrize("kind", [convolution, linear])
    def test_transforms_of_torch_func_run_on_floats(self, kind: Any) -> None:
        layer = kind()
        x = input_for(layer)

        def loss(x: Tensor) -> Tensor:
            return layer(x).square().sum()

        expected = gradients(layer, x, "floats", lambda x: layer(x))
        assert torch.func.grad(lambda x: (layer(x) * expected["output"]).sum())(x).isfinite().all()
        (first,) = torch.autograd.grad(loss(x.requires_grad_()), x)
        torch.testing.assert_close(torch.func.grad(loss)(x), first)
        hessian_of_a_pixel = torch.func.grad(lambda x: torch.func.grad(loss)(x).flatten()[0])(x)
        assert hessian_of_a_pixel.isfinite().all()

    @pytest.mark.parametrize("kind", [convolution, linear])
    def test_export(self, kind: Any) -> None:
        layer = kind()
        x = input_for(layer)
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), layer(x))

    def test_no_gradient_no_bits(self) -> None:
        layer = convolution()
        x = input_for(layer)
        with torch.inference_mode():
            y = layer(x)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        with saved_tensors() as kept:
            assert layer(x).equal(y)
        assert kept == []

    @pytest.mark.parametrize("keeps", ["bit", None])
    def test_another_word_is_refused(self, keeps: Any) -> None:
        with pytest.raises(ValueError, match="'bits', 'exact' or 'floats'"):
            keep_for_backward_(convolution(), keeps)

    def test_a_model_without_a_binary_layer_is_named(self) -> None:
        with pytest.raises(ValueError, match="Conv2d has no binary layer"):
            keep_for_backward_(nn.Conv2d(1, 1, 1), "bits")


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 17), min_size=1, max_size=4)))


@given(shape=shapes(), data=st.data())
def test_what_is_packed_comes_out_again(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from([packing_axis(shape), *range(len(shape))]))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float32]))
    for pack, unpack, most, to_a_byte in ((pack_bits, unpack_bits, 2, 8), (pack_nibbles, unpack_nibbles, 16, 2)):
        values = torch.randint(most, shape)
        packed = pack(values.to(dtype), axis)
        assert packed.dtype == torch.uint8
        assert packed.shape[axis] == -(-shape[axis] // to_a_byte)
        assert unpack(packed, axis, shape[axis]).long().equal(values)
