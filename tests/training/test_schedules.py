"""Learning rates at every step against a formula, and after a resume."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

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
    return torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": BASE / 2}], lr=BASE)


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
