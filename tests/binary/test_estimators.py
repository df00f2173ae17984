"""Every registered pseudo-gradient against its formula in SPEC section 2."""

from types import ModuleType
from typing import Any

import pytest
import torch

from design_lightning.binary import ESTIMATORS, STE, Estimator, binarize, make_estimator

BOUNDARIES = [0.0, 0.1, 0.48, 1.0, 1.25, 1.5, 3.0]
NEAR = [b + d for b in BOUNDARIES for d in (0.0, -1e-6, 1e-6, -0.05, 0.05)]
POINTS = [s * u for u in [*NEAR, *(i / 16 for i in range(64)), 7.0, 20.0] for s in (1, -1)]
HUGE = [1e3, 1e10, 3e38, float("inf")]
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "ste": [{}, {"clip": 1.25}, {"clip": 3.0}],
    "approx_sign": [{}],
    "swish_sign": [{}, {"beta": 2.0}],
    "ede": [{}, {"temperature": 1.0}, {"temperature": 10.0}],
    "reste": [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"temperature": 3.0}],
}
CASES = [(name, arguments) for name in ESTIMATORS for arguments in ARGUMENTS.get(name, [{}])]
ANNEALED = [name for name in ESTIMATORS if hasattr(make_estimator(name), "temperature")]


def test_every_registered_estimator_has_a_reference(reference: ModuleType) -> None:
    assert set(reference.ESTIMATORS) == set(ESTIMATORS)


@pytest.mark.parametrize(("name", "arguments"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_the_derivative_is_the_formula(
    reference: ModuleType, name: str, arguments: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    u = torch.tensor(POINTS, dtype=dtype)
    estimator = make_estimator(name, **arguments)
    expected = torch.tensor([reference.ESTIMATORS[name](value, **arguments) for value in u.tolist()], dtype=dtype)
    # float32 cannot write 0.1 itself, where ReSTE takes its secant; the nearest float32 lies above it.
    derivative = estimator.derivative(u)
    assert derivative.dtype == dtype
    # temperatures are float32 buffers; those of the cases are whole in it, but for the default 0.1 of EDE
    if name == "ede" and not arguments:
        tolerance = max(tolerance, 1e-7)
    torch.testing.assert_close(derivative, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_it_is_what_backward_takes(reference: ModuleType, name: str, arguments: dict[str, Any]) -> None:
    x = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.25)
    upstream = torch.randn(x.shape, dtype=torch.float64)
    binarize(x, threshold, make_estimator(name, **arguments), "exact").backward(upstream)
    expected = [
        g * reference.ESTIMATORS[name](u - 0.25, **arguments)
        for g, u in zip(upstream.tolist(), x.tolist(), strict=True)
    ]
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "arguments"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_finite_at_huge_values_and_vanishes_there(
    name: str, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    u = torch.tensor([s * h for h in HUGE for s in (1, -1)], dtype=torch.float64).to(dtype)
    derivative = make_estimator(name, **arguments).derivative(u)
    assert derivative.isfinite().all()
    assert derivative.abs().max() < 1e-6


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_it_is_even(name: str, arguments: dict[str, Any]) -> None:
    u = torch.tensor(POINTS)
    estimator = make_estimator(name, **arguments)
    assert estimator.derivative(u).equal(estimator.derivative(-u))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_negative_zero_is_zero(name: str) -> None:
    estimator = make_estimator(name)
    assert estimator.derivative(torch.tensor(-0.0)) == estimator.derivative(torch.tensor(0.0))


@pytest.mark.parametrize("name", ANNEALED)
def test_a_temperature_is_part_of_the_state(name: str) -> None:
    estimator = make_estimator(name, temperature=2.5)
    assert estimator.state_dict()["temperature"] == 2.5
    other = make_estimator(name)
    other.load_state_dict(estimator.state_dict())
    u = torch.tensor(POINTS)
    assert other.derivative(u).equal(estimator.derivative(u))


@pytest.mark.parametrize("name", ANNEALED)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_temperature_stays_in_float32(name: str, cast: str) -> None:
    estimator = make_estimator(name, temperature=1.001)
    getattr(estimator, cast)()
    assert estimator.temperature.dtype == torch.float32
    assert estimator.temperature == torch.tensor(1.001)


@pytest.mark.parametrize("name", ANNEALED)
def test_annealing_moves_the_gradient(name: str) -> None:
    estimator = make_estimator(name)
    u = torch.tensor(0.3)
    before = estimator.derivative(u)
    estimator.get_buffer("temperature").fill_(2.75)
    assert estimator.derivative(u) == make_estimator(name, temperature=2.75).derivative(u)
    assert estimator.derivative(u) != before


@pytest.mark.parametrize("argument", ["clip", "beta", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_width_that_is_not_positive_is_named(argument: str, value: float) -> None:
    name = {"clip": "ste", "beta": "swish_sign", "temperature": "ede"}[argument]
    with pytest.raises(ValueError, match=f"{argument} must be positive, not {value}"):
        make_estimator(name, **{argument: value})


def test_a_finished_estimator_is_taken_as_it_is() -> None:
    estimator = STE(clip=2.0)
    assert make_estimator(estimator) is estimator
    with pytest.raises(ValueError, match=r"estimator_args \{'clip': 1\.0\}.*finished"):
        make_estimator(estimator, clip=1.0)


def test_a_class_path_names_an_estimator() -> None:
    made = make_estimator("design_lightning.binary.STE", clip=1.5)
    assert isinstance(made, STE)
    assert made.clip == 1.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aprox_sign", "unknown estimator 'aprox_sign'.*did you mean.*'approx_sign'"),
        ("zzz", "unknown estimator 'zzz'.*known are approx_sign"),
        ("torch.nn.Conv9d", r"estimator 'torch\.nn\.Conv9d' cannot be imported"),
        ("torch.nn.Conv2d", r"'torch\.nn\.Conv2d' is not a subclass of .*Estimator"),
    ],
)
def test_a_wrong_name_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_estimator(name)


def test_an_estimator_of_ones_own_is_enough() -> None:
    class Half(Estimator):
        def derivative(self, u: torch.Tensor) -> torch.Tensor:
            return torch.full_like(u, 0.5)

    x = torch.randn(3, requires_grad=True)
    binarize(x, torch.zeros(()), Half()).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5] * 3
