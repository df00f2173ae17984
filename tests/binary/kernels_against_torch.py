"""The Triton kernels against the operations of torch that they stand for: the same bits. `test_triton_kernels` runs this file.

Triton decides about its interpreter when it is imported; so TRITON_INTERPRET=1 must be set before, for kernels on a CPU.
"""

import os

import pytest
import torch
from torch import Tensor, nn

from design_lightning.binary import (
    BinaryConv2d,
    BinaryLinear,
    DeSign,
    RSign,
    Sign,
    elementwise,
    make_estimator,
    plain,
    triton_kernels,
)
from design_lightning.binary.derivatives import code_of, decode, encode, step_of
from design_lightning.binary.packing import pack_bits, packing_axis

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = [((2, 16, 3, 5), False), ((2, 16, 3, 5), True), ((2, 5, 8, 3), True), ((2, 3, 8), False), ((4, 24), False)]
CASES = [
    ("ste", torch.bfloat16),
    ("approx_sign", torch.float32),
    ("approx_sign", torch.float16),
    ("ede", torch.float32),
]


def thresholds_for(shape: tuple[int, ...]) -> list[Tensor]:
    """One for all, one for each place, one for each element, and one for each channel."""
    return [torch.zeros(()), torch.randn(shape[1:]), torch.randn(shape), torch.randn(shape[1], *[1] * (len(shape) - 2))]


@pytest.mark.parametrize(("estimator", "dtype"), CASES)
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES)
def test_there_and_back(shape: tuple[int, ...], dtype: torch.dtype, estimator: str, channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    gradient = torch.randn(shape).to(dtype)  # of the other format where there are two
    its_estimator = make_estimator(estimator)
    code = code_of(its_estimator, "bits")
    if code == "mask":
        x[(0,) * x.dim()] = float("nan")
    for threshold in thresholds_for(shape):
        signs = plain.sign(x, threshold)
        kept = encode(plain.distance(x, threshold), its_estimator, code)
        bits = pack_bits((signs > 0).float(), packing_axis(shape))
        on_device = x.to(DEVICE), threshold.to(DEVICE), its_estimator.to(DEVICE), code
        found = triton_kernels.signs_and_derivative(*on_device, with_bits=True)
        for ours, theirs in zip(found, (signs, kept, bits), strict=True):
            assert ours.cpu().equal(theirs)
        assert found[0].is_contiguous(memory_format=memory_format)
        assert triton_kernels.signs_and_derivative(*on_device, with_bits=False)[2] is None
        again = triton_kernels.signs_of(found[2], shape, dtype, memory_format)
        assert again.cpu().equal(signs)
        assert again.is_contiguous(memory_format=memory_format)
        step = step_of(its_estimator, code)
        flow = triton_kernels.through_derivative(gradient.to(DEVICE), found[1], step, its_estimator, code)
        expected = gradient * decode(kept, step.cpu(), its_estimator.cpu(), code, x.shape, dtype)
        assert flow.dtype == expected.dtype
        assert flow.cpu().equal(expected)


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Layers, and the shape of an input of each."""
    return [
        (
            BinaryConv2d(8, 6, 3, padding=1, activation=DeSign("2x2_v1", learn_kernel=True, estimator="ste")),
            (4, 8, 5, 6),
        ),
        (BinaryConv2d(16, 6, 3, padding_value=-1, activation=RSign(16, estimator="approx_sign")), (2, 16, 5, 6)),
        (
            BinaryLinear(8, 6, activation=DeSign("2x2_v1", layout="NHWC", grid=(3, 3), estimator="swish_sign")),
            (2, 9, 8),
        ),
        (Sign(estimator="approx_sign"), (3, 8, 4, 4)),
    ]


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("number", range(4))
def test_layers_take_them_by_themselves(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, shape = layers()[number]
    layer, x = layer.to(DEVICE), torch.randn(shape, device=DEVICE)
    calls = []
    for name in ("signs_and_derivative", "through_derivative"):
        original = getattr(triton_kernels, name)
        monkeypatch.setattr(
            triton_kernels, name, lambda *a, name=name, original=original: calls.append(name) or original(*a)
        )
    with_kernels = gradients(layer, x)
    assert calls == ["signs_and_derivative", "through_derivative"]
    monkeypatch.setattr(elementwise, "_kernels_for", lambda *arguments: None)
    without = gradients(layer, x)
    for ours, theirs in zip(with_kernels, without, strict=True):
        # Only what a GPU's convolution adds in another order may differ.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if DEVICE == "cpu" else 1e-5)


@pytest.mark.parametrize(
    "odd",
    [
        torch.randn(2, 5, 3),
        torch.randn(8),
        torch.randn(2, 8).double(),
        torch.randn(2, 8, 6).transpose(1, 2),
        torch.zeros(0, 8),
    ],
    ids=["no whole bytes", "one axis", "float64", "not dense", "empty"],
)
def test_what_they_do_not_take(odd: Tensor) -> None:
    assert not triton_kernels.serve(odd, odd.shape, odd.dtype)
    if odd.dim() > 1:
        activation = Sign(estimator="ste")
        assert gradients(activation, odd)[0].equal(plain.sign(odd))
