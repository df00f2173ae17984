"""The Lloyd-Max thresholds of the half-normal distribution."""

import itertools

import numpy as np
import pytest

from design_lightning.kernels import PUBLISHED_LEVELS, lloyd_max_half_normal


def test_seven_levels_give_the_figures_of_the_specification() -> None:
    expected = [0.293514, 0.595882, 0.918039, 1.276582, 1.703070, 2.281837]
    assert lloyd_max_half_normal(7) == pytest.approx(expected, abs=1e-6)


def test_the_published_levels_are_three_to_six_percent_above() -> None:
    for published, exact in zip(PUBLISHED_LEVELS.values(), lloyd_max_half_normal(7), strict=True):
        assert 1.02 < published / exact < 1.065


def half_normal_on_a_grid() -> tuple[np.ndarray, np.ndarray]:
    x = (np.arange(1_000_000) + 0.5) * 1e-5
    mass = np.exp(-x * x / 2)
    return x, mass / mass.sum()


@pytest.mark.parametrize("levels", [2, 3, 7, 16])
def test_a_threshold_is_the_middle_of_its_neighbours_centroids(levels: int) -> None:
    x, mass = half_normal_on_a_grid()
    thresholds = np.array(lloyd_max_half_normal(levels))
    assert len(thresholds) == levels - 1
    assert (np.diff(thresholds) > 0).all()
    cell = np.searchsorted(thresholds, x)
    centroids = np.bincount(cell, mass * x) / np.bincount(cell, mass)
    assert (centroids[:-1] + centroids[1:]) / 2 == pytest.approx(thresholds, abs=2e-5)


def test_no_neighbouring_thresholds_have_a_smaller_error() -> None:
    x, mass = half_normal_on_a_grid()

    def squared_error(thresholds: np.ndarray) -> float:
        cell = np.searchsorted(thresholds, x)
        centroids = np.bincount(cell, mass * x) / np.bincount(cell, mass)
        return float((mass * (x - centroids[cell]) ** 2).sum())

    best = np.array(lloyd_max_half_normal(4))
    for moves in itertools.product((-0.02, 0, 0.02), repeat=3):
        assert squared_error(best) <= squared_error(best + np.array(moves)) + 1e-9


@pytest.mark.parametrize("levels", [32, 64])
def test_many_levels_take_a_short_time(levels: int) -> None:
    assert len(lloyd_max_half_normal(levels)) == levels - 1


@pytest.mark.parametrize("levels", [1, 0, -3, 65])
def test_a_number_of_levels_out_of_range_is_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=f"quantizer of {levels} levels: use from 2"):
        lloyd_max_half_normal(levels)
