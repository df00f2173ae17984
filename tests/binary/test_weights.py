"""Every registered weight binarizer against SPEC section 3; their gradients against plain torch with a straight-through."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from design_lightning.binary import WEIGHT_BINARIZERS, WeightBinarizer, make_weight_binarizer
from design_lightning.binary.keeping import keep_for_backward_

SHAPES = [(4, 3, 3, 3), (2, 1, 2, 3), (5, 7), (3, 2, 5), (1, 3, 1, 1)]
LEARNED = [name for name in WEIGHT_BINARIZERS if hasattr(make_weight_binarizer(name, torch.randn(2, 3)), "alpha")]


def learned_scale(binarizer: WeightBinarizer) -> Tensor:
    return binarizer.get_parameter("alpha")


def latent(shape: tuple[int, ...] = (4, 3, 3, 3), dtype: torch.dtype = torch.float64) -> Tensor:
    """Latent weights of which some lie beyond 1."""
    return (torch.randn(shape, dtype=torch.float64) * 0.8 + 0.1).to(dtype)


def straight_through(w: Tensor, forward: Tensor) -> Tensor:
    """`forward` in value, the identity in gradient."""
    return forward.detach() + w - w.detach()


def reference_of(name: str, w: Tensor, alpha: Tensor | None, tau: float = 0.85, temperature: float = 0.1) -> Tensor:
    """Each binarizer from torch's own operations, so that autograd finds its gradient."""
    per_output = (-1, *(1 for _ in w.shape[1:]))
    signs = torch.where(w >= 0, 1.0, -1.0).to(w.dtype)
    if name in ("sign", "xnor", "learned"):
        clipped = straight_through(w.clamp(-1, 1), signs)
        if name == "sign":
            return clipped
        if name == "learned":
            assert alpha is not None
            return clipped * alpha.view(per_output)
        value = signs * w.detach().abs().flatten(1).mean(1).view(per_output)
        return straight_through(w.clamp(-1, 1), value)
    dims = tuple(range(1, w.dim()))
    centred = w - w.mean(dims, keepdim=True)
    if name == "recu":
        assert alpha is not None
        w1 = centred / (torch.sqrt(w.var(dims, keepdim=True, unbiased=True) + 1e-5) / (2 * math.sqrt(2)))
        bound = float(-w1.detach().abs().mean() * math.log(2 - 2 * tau))
        return straight_through(w1.clamp(-bound, bound), torch.where(w1 >= 0, 1.0, -1.0)) * alpha.view(per_output)
    assert name == "irnet"
    w1 = centred / w.std(dims, keepdim=True, unbiased=True)
    scale = 2 ** torch.round(torch.log2(w1.detach().abs().mean(dims, keepdim=True)))
    # The derivative of k tanh(t u) is k t (1 - tanh(t u)^2).
    soft = max(1 / temperature, 1.0) * torch.tanh(temperature * w1)
    return straight_through(soft, torch.where(w1 >= 0, 1.0, -1.0)) * scale


def made(name: str, w: Tensor, **arguments: Any) -> WeightBinarizer:
    binarizer = make_weight_binarizer(name, w, **arguments)
    if name in LEARNED:
        learned_scale(binarizer).data.copy_(torch.rand(w.shape[0]) + 0.5)
    return binarizer


@pytest.mark.parametrize("name", WEIGHT_BINARIZERS)
class TestEveryBinarizer:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_the_output_is_the_formula(
        self, reference: ModuleType, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        w = latent(shape, dtype)
        binarizer = made(name, w)
        alpha = learned_scale(binarizer).tolist() if name in LEARNED else None
        output = binarizer(w)
        assert output.dtype == dtype
        torch.testing.assert_close(output, reference.binary_weight(name, w, alpha), rtol=1e-6, atol=0)

    def test_the_signs_and_the_scale_are_the_two_factors_of_the_output(self, reference: ModuleType, name: str) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            w = latent(dtype=dtype)
            binarizer = made(name, w)
            signs, scale = binarizer.signs(w), binarizer.scale(w)
            expected, _ = reference.weight_rows(name, w)
            assert signs.dtype == dtype
            assert signs.flatten(1).tolist() == expected
            product = signs if scale is None else signs * scale.view(-1, 1, 1, 1)
            assert binarizer(w).equal(product)

    def test_the_learned_scale_starts_at_the_mean_size(self, reference: ModuleType, name: str) -> None:
        w = latent()
        torch.testing.assert_close(make_weight_binarizer(name, w)(w), reference.binary_weight(name, w))
        other = latent()
        binarizer = make_weight_binarizer(name, w)
        binarizer.reset_scale(other)
        torch.testing.assert_close(binarizer(other), reference.binary_weight(name, other))

    def test_the_sign_of_zero_is_plus_one(self, name: str) -> None:
        w = torch.tensor([[0.0, 1.0, -1.0], [-0.0, 2.0, -2.0]])
        binarizer = make_weight_binarizer(name, w)
        assert binarizer.signs(w).tolist() == [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0]]
        assert (binarizer(w)[:, 0] > 0).all()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)], ids=str)
    def test_the_gradient_is_that_of_the_reference(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
    ) -> None:
        w = latent(shape, dtype).requires_grad_()
        binarizer = made(name, w.detach())
        upstream = torch.randn(shape, dtype=dtype)
        binarizer(w).backward(upstream)
        twin = w.detach().double().requires_grad_()
        alpha = learned_scale(binarizer).detach().double().requires_grad_() if name in LEARNED else None
        reference_of(name, twin, alpha).backward(upstream.double())
        assert w.grad is not None
        torch.testing.assert_close(w.grad.double(), twin.grad, rtol=tolerance, atol=tolerance)
        if alpha is not None:
            to_scale = learned_scale(binarizer).grad
            assert to_scale is not None
            torch.testing.assert_close(to_scale.double(), alpha.grad, rtol=tolerance, atol=tolerance)

    def test_equal_weights_give_finite_values_and_gradients(self, name: str) -> None:
        for value in (0.0, 0.5, -0.25):
            w = torch.full((2, 3, 2, 2), value, requires_grad=True)
            output = make_weight_binarizer(name, w.detach())(w)
            output.sum().backward()
            assert output.isfinite().all()
            assert w.grad is not None
            assert w.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision_keeps_its_type(self, name: str, dtype: torch.dtype) -> None:
        w = latent(dtype=dtype).requires_grad_()
        binarizer = make_weight_binarizer(name, w.detach())
        output = binarizer(w)
        output.sum().backward()
        assert output.dtype == dtype
        assert w.grad is not None
        assert w.grad.dtype == dtype
        assert w.grad.isfinite().all()

    def test_a_second_derivative_exists(self, name: str) -> None:
        w = latent().requires_grad_()
        weight = torch.randn_like(w).requires_grad_()
        binarizer = made(name, w.detach())
        keep_for_backward_(binarizer, "floats")
        (first,) = torch.autograd.grad((binarizer(w) * weight).sum(), w, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        assert second.isfinite().all()
        assert second.abs().max() > 0

    def test_functional_transforms(self, name: str) -> None:
        w = latent((3, 4, 2, 3, 3))
        binarizer = made(name, w[0])
        torch.testing.assert_close(torch.func.vmap(binarizer)(w), torch.stack([binarizer(one) for one in w]))
        gradient = torch.func.grad(lambda v: (binarizer(v) * v.detach()).sum())(w[0])
        twin = w[0].clone().requires_grad_()
        (binarizer(twin) * twin.detach()).sum().backward()
        torch.testing.assert_close(gradient, twin.grad)

    def test_its_state_comes_back(self, name: str) -> None:
        w = latent()
        binarizer = made(name, w)
        other = make_weight_binarizer(name, latent())
        other.load_state_dict(binarizer.state_dict())
        assert other(w).equal(binarizer(w))


class TestGradientsByFormula:
    @pytest.mark.parametrize(
        ("value", "passes"), [(0.0, 1), (0.5, 1), (1.0, 1), (-1.0, 1), (1.0001, 0), (-1.0001, 0), (9.0, 0)]
    )
    @pytest.mark.parametrize("name", ["sign", "xnor", "learned"])
    def test_the_clipped_identity_ends_at_one(self, name: str, value: float, passes: int) -> None:
        w = torch.tensor([[value, 0.25]], requires_grad=True)
        binarizer = made(name, w.detach())
        binarizer(w).backward(torch.tensor([[3.0, 0.0]]))
        factor = learned_scale(binarizer).item() if name == "learned" else 1.0
        assert w.grad is not None
        assert w.grad.tolist() == [[pytest.approx(3.0 * passes * factor), 0.0]]  # XNOR's scale is no factor of it

    @pytest.mark.parametrize("tau", [0.6, 0.85, 0.99])
    def test_tau_moves_the_clamp_of_recu(self, tau: float) -> None:
        w = latent().requires_grad_()
        binarizer = make_weight_binarizer("recu", w.detach())
        binarizer.get_buffer("tau").fill_(tau)
        upstream = torch.randn_like(w)
        binarizer(w).backward(upstream)
        twin = w.detach().requires_grad_()
        reference_of("recu", twin, learned_scale(binarizer).detach(), tau=tau).backward(upstream)
        torch.testing.assert_close(w.grad, twin.grad, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
    def test_the_temperature_moves_the_gradient_of_irnet(self, temperature: float) -> None:
        w = latent().requires_grad_()
        binarizer = make_weight_binarizer("irnet", w.detach())
        binarizer.get_buffer("estimator.temperature").fill_(temperature)
        upstream = torch.randn_like(w)
        binarizer(w).backward(upstream)
        twin = w.detach().requires_grad_()
        reference_of("irnet", twin, None, temperature=temperature).backward(upstream)
        torch.testing.assert_close(w.grad, twin.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
@pytest.mark.parametrize(("name", "key"), [("recu", "tau"), ("irnet", "estimator.temperature")])
def test_annealed_values_stay_in_float32(name: str, key: str, cast: str) -> None:
    binarizer = make_weight_binarizer(name, latent())
    before = binarizer.state_dict()[key].clone()
    getattr(binarizer, cast)()
    assert binarizer.state_dict()[key].dtype == torch.float32
    assert binarizer.state_dict()[key] == before


@pytest.mark.parametrize("tau", [0.5, 1.0, 0.0, 1.5])
def test_a_tau_without_a_clamp_is_named(tau: float) -> None:
    with pytest.raises(ValueError, match=f"tau must be above 0.5 and below 1, not {tau}"):
        make_weight_binarizer("recu", latent(), tau=tau)


@pytest.mark.parametrize("name", ["recu", "irnet"])
def test_a_fan_in_of_one_cannot_be_standardised(name: str) -> None:
    with pytest.raises(ValueError, match=r"fan-in, which is 1 in weights of shape \[4, 1, 1, 1\]; use 'xnor'"):
        make_weight_binarizer(name, torch.randn(4, 1, 1, 1))


def test_a_wrong_name_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown weight binarizer 'recue'.*did you mean 'recu'"):
        make_weight_binarizer("recue", latent())
    with pytest.raises(ValueError, match=r"is not a subclass of .*WeightBinarizer"):
        make_weight_binarizer("torch.nn.Linear", latent())
