"""Learning rates at every step against a formula, and after a resume."""

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

from design_lightning.training import CosineDecay, LinearDecay, StepDecay, with_warm_up

STEPS, WARM_UP, BASE = 40, 7, 0.2

FORMULAS: dict[str, tuple[Callable[[torch.optim.Optimizer], LRScheduler], Callable[[float], float]]] = {
    "cosine": (CosineDecay, lambda s: (1 + math.cos(math.pi * s)) / 2),
    "cosine to a tenth": (lambda o: CosineDecay(o, final=0.1), lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * s)) / 2),
    "linear": (LinearDecay, lambda s: 1 - s),
    "steps": (lambda o: StepDecay(o, [0.5, 0.75], 0.1), lambda s: 0.1 ** ((s >= 0.5) + (s >= 0.75))),
}


def optimizer_of_two_groups() -> torch.optim.Optimizer:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": BASE / 2}]
    return torch.optim.SGD(groups, lr=BASE)


def run(scheduler: LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        first, second = (group["lr"] for group in scheduler.optimizer.param_groups)
        assert second == pytest.approx(first / 2)
        rates.append(first)
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("warm_up", [0, 1, WARM_UP])
def test_rate_of_every_step(name: str, warm_up: int) -> None:
    make, formula = FORMULAS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = with_warm_up(make(optimizer_of_two_groups()), warm_up, STEPS)
        rates = run(scheduler, STEPS)
    rise = [BASE * (k + 1) / (warm_up + 1) for k in range(warm_up)]
    decay = [BASE * formula(k / (STEPS - warm_up)) for k in range(STEPS - warm_up)]
    assert rates == pytest.approx(rise + decay)


def test_torchs_own_scheduler_behind_a_warm_up() -> None:
    rest = STEPS - WARM_UP
    scheduler = with_warm_up(CosineAnnealingLR(optimizer_of_two_groups(), rest), WARM_UP, STEPS)
    rates = run(scheduler, STEPS)
    assert rates[:WARM_UP] == pytest.approx([BASE * (k + 1) / (WARM_UP + 1) for k in range(WARM_UP)])
    assert rates[WARM_UP:] == pytest.approx([BASE * (1 + math.cos(math.pi * k / rest)) / 2 for k in range(rest)])


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("stop", [3, WARM_UP, 20])
def test_resume_goes_on_as_if_it_had_not_stopped(name: str, stop: int) -> None:
    whole = run(with_warm_up(FORMULAS[name][0](optimizer_of_two_groups()), WARM_UP, STEPS), STEPS)
    first = with_warm_up(FORMULAS[name][0](optimizer_of_two_groups()), WARM_UP, STEPS)
    run(first, stop)
    second = with_warm_up(FORMULAS[name][0](optimizer_of_two_groups()), WARM_UP, STEPS)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert run(second, STEPS - stop) == whole[stop:]


@pytest.mark.parametrize("warm_up", [0, WARM_UP])
def test_resume_with_more_steps_goes_on_along_the_longer_schedule(warm_up: int) -> None:
    whole = run(with_warm_up(CosineDecay(optimizer_of_two_groups()), warm_up, 2 * STEPS), 2 * STEPS)
    first = with_warm_up(CosineDecay(optimizer_of_two_groups()), warm_up, STEPS)
    run(first, STEPS)
    second = with_warm_up(CosineDecay(optimizer_of_two_groups()), warm_up, 2 * STEPS)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert run(second, STEPS)[1:] == pytest.approx(whole[STEPS + 1 :])


def test_the_shape_of_a_resumed_schedule_is_the_configurations() -> None:
    first = with_warm_up(CosineDecay(optimizer_of_two_groups()), 0, STEPS)
    run(first, 10)
    second = with_warm_up(CosineDecay(optimizer_of_two_groups(), final=0.5), 0, STEPS)
    second.load_state_dict(first.state_dict())
    assert run(second, STEPS - 10)[-1] > 0.5 * BASE


@pytest.mark.parametrize(("stored", "asked"), [(0, 5), (5, 0), (2, 5)])
def test_resume_with_another_warm_up_is_refused(stored: int, asked: int) -> None:
    first = with_warm_up(CosineDecay(optimizer_of_two_groups()), stored, STEPS)
    second = with_warm_up(CosineDecay(optimizer_of_two_groups()), asked, STEPS)
    with pytest.raises(ValueError, match=f"has {stored} steps of warm-up, this run's has {asked}"):
        second.load_state_dict(first.state_dict())


def test_rate_stays_at_the_end_beyond_the_end() -> None:
    assert run(with_warm_up(LinearDecay(optimizer_of_two_groups(), final=0.5), 0, 4), 6)[4:] == pytest.approx(
        [BASE / 2] * 2
    )


def test_warm_up_longer_than_training_only_rises_and_says_so() -> None:
    with pytest.warns(UserWarning, match="the warm-up of 9 steps is longer than training, 4 steps"):
        scheduler = with_warm_up(CosineDecay(optimizer_of_two_groups()), 9, 4)
    assert run(scheduler, 4) == pytest.approx([BASE * (k + 1) / 10 for k in range(4)])


def test_errors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="CosineDecay goes by the share of training done, but training has no end"):
        with_warm_up(CosineDecay(optimizer_of_two_groups()), 0, math.inf)
    with pytest.raises(ValueError, match=r"milestones \[50\] must be shares of training"):
        StepDecay(optimizer_of_two_groups(), [50])


TORCHS_OWN: dict[str, tuple[Callable[[torch.optim.Optimizer], LRScheduler], Callable[[int], float]]] = {
    "cosine": (lambda o: CosineAnnealingLR(o, STEPS - WARM_UP), lambda k: (1 + math.cos(math.pi * k / 33)) / 2),
    "milestones": (lambda o: MultiStepLR(o, [10, 20]), lambda k: 0.1 ** ((k >= 10) + (k >= 20))),
    "constant": (lambda o: ConstantLR(o, factor=1.0), lambda k: 1.0),
}


@pytest.mark.parametrize("name", TORCHS_OWN)
def test_torchs_own_schedulers_follow_a_warm_up_at_every_step_without_a_warning(name: str) -> None:
    make, formula = TORCHS_OWN[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = run(with_warm_up(make(optimizer_of_two_groups()), WARM_UP, STEPS), STEPS)
    rise = [BASE * (k + 1) / (WARM_UP + 1) for k in range(WARM_UP)]
    assert rates == pytest.approx(rise + [BASE * formula(k) for k in range(STEPS - WARM_UP)], abs=1e-12)


@pytest.mark.parametrize("name", TORCHS_OWN)
@pytest.mark.parametrize("stop", range(1, STEPS, 6))
def test_torchs_own_schedulers_resume_from_a_file_as_if_they_had_not_stopped(name: str, stop: int) -> None:
    make, _ = TORCHS_OWN[name]
    whole = run(with_warm_up(make(optimizer_of_two_groups()), WARM_UP, STEPS), STEPS)
    first = with_warm_up(make(optimizer_of_two_groups()), WARM_UP, STEPS)
    run(first, stop)
    file = io.BytesIO()
    torch.save([first.optimizer.state_dict(), first.state_dict()], file)
    file.seek(0)
    optimizer_state, state = torch.load(file, weights_only=True)
    second = with_warm_up(make(optimizer_of_two_groups()), WARM_UP, STEPS)
    second.optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    assert run(second, STEPS - stop) == whole[stop:]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("warm_up", [0, WARM_UP])
@pytest.mark.parametrize("stop", [1, WARM_UP - 1, WARM_UP + 1, STEPS - 1])
def test_state_survives_a_file_read_with_weights_only(name: str, warm_up: int, stop: int) -> None:
    make, _ = FORMULAS[name]
    whole = run(with_warm_up(make(optimizer_of_two_groups()), warm_up, STEPS), STEPS)
    first = with_warm_up(make(optimizer_of_two_groups()), warm_up, STEPS)
    run(first, stop)
    file = io.BytesIO()
    torch.save([first.optimizer.state_dict(), first.state_dict()], file)
    file.seek(0)
    optimizer_state, state = torch.load(file, weights_only=True)
    second = with_warm_up(make(optimizer_of_two_groups()), warm_up, STEPS)
    second.optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    assert run(second, STEPS - stop) == whole[stop:]


def test_a_length_of_its_own_beats_the_trainers() -> None:
    rates = run(with_warm_up(LinearDecay(optimizer_of_two_groups(), total_steps=10), 0, STEPS), 12)
    assert rates == pytest.approx([BASE * max(1 - k / 10, 0) for k in range(12)])
    endless = run(with_warm_up(LinearDecay(optimizer_of_two_groups(), total_steps=10), 2, math.inf), 4)
    assert endless == pytest.approx([BASE / 3, BASE * 2 / 3, BASE, BASE * 0.9])


def test_a_constant_rate_may_have_a_warm_up_and_no_end() -> None:
    rates = run(with_warm_up(ConstantLR(optimizer_of_two_groups(), factor=1.0), 3, math.inf), 6)
    assert rates == pytest.approx([BASE / 4, BASE / 2, BASE * 3 / 4, BASE, BASE, BASE])
