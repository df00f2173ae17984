"""The published kernels hold exactly the values of SPEC section 1, typed here a second time."""

import pytest

from design_lightning.kernels import PUBLISHED, PUBLISHED_LEVELS, ThresholdKernel

CODES = (0, 1, 3, 5, 7, 9)
THRESHOLDS = (0.31178307, 0.63100557, 0.96713846, 1.33518974, 1.76555877, 2.34193425)
A, B, C, D = 0.41900698, 0.85981385, 1.35667966, 1.99840603

TABLE = {
    "2x2_v1": [[[1, 1], [0, 3]]],
    "2x2_v2": [[[1, 1], [3, 3]]],
    "2x2x2_complement_v1": [[[1, 1], [0, 3]], [[7, 7], [9, 5]]],
    "2x2x2_complement_v2": [[[1, 1], [3, 3]], [[7, 7], [5, 5]]],
    "2x2x4_shifted_v1": [[[1, 1], [0, 3]], [[3, 3], [1, 5]], [[5, 5], [3, 7]], [[7, 7], [5, 9]]],
    "2x2x4_shifted_v2": [[[1, 1], [3, 3]], [[3, 3], [5, 5]], [[5, 5], [7, 7]], [[7, 7], [9, 9]]],
    "3x3_symmetric_v1": [[[3, 1, 3], [1, 0, 1], [3, 1, 3]]],
    "3x3_symmetric_v2": [[[5, 1, 3], [1, 0, 1], [3, 1, 5]]],
    "3x3_symmetric_v3": [[[3, 0, 3], [0, 1, 0], [3, 0, 3]]],
    "3x3x2_complement_v1": [[[1, 3, 1], [3, 1, 3], [1, 3, 1]], [[7, 5, 7], [5, 7, 5], [7, 5, 7]]],
    "3x3x4_shifted_v1": [
        [[1, 3, 1], [3, 1, 3], [1, 3, 1]],
        [[3, 5, 3], [5, 3, 5], [3, 5, 3]],
        [[5, 7, 5], [7, 5, 7], [5, 7, 5]],
        [[7, 9, 7], [9, 7, 9], [7, 9, 7]],
    ],
    "2x2x4_half_profile": [[[1, 3], [1, 3]]] * 4,
}
BASELINE = [[[C, D], [A, B]], [[B, A], [C, D]], [[D, C], [B, A]], [[A, B], [C, D]]]

COMPLEMENTED = {"2x2x2_complement_v1": "2x2_v1", "2x2x2_complement_v2": "2x2_v2", "3x3x2_complement_v1": None}
SHIFTED = {"2x2x4_shifted_v1": "2x2_v1", "2x2x4_shifted_v2": "2x2_v2", "3x3x4_shifted_v1": None}


def as_lists(levels: tuple) -> list:
    return [[list(row) for row in plane] for plane in levels]


def test_the_levels_are_those_of_the_table() -> None:
    assert dict(zip(CODES, THRESHOLDS, strict=True)) == PUBLISHED_LEVELS


def test_every_published_kernel_is_in_the_table_and_nothing_else() -> None:
    assert set(PUBLISHED) == {*TABLE, "2x2x4_baseline"}
    assert ThresholdKernel.names() == tuple(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_kernel_has_the_values_of_the_table(name: str) -> None:
    expected = BASELINE
    if name != "2x2x4_baseline":
        expected = [[[THRESHOLDS[CODES.index(code)] for code in row] for row in plane] for plane in TABLE[name]]
    kernel = ThresholdKernel.named(name)
    assert as_lists(kernel.levels) == expected
    assert kernel.name == name
    assert "2405.02220" in kernel.provenance


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_slug_begins_with_its_size(name: str) -> None:
    rows, columns, *depth = (int(size) for size in name.split("_")[0].split("x"))
    assert ThresholdKernel.named(name).shape == (depth[0] if depth else 1, rows, columns)


@pytest.mark.parametrize(("name", "base"), COMPLEMENTED.items())
def test_a_complement_kernel_is_its_base_and_the_complement_of_it(name: str, base: str | None) -> None:
    kernel = ThresholdKernel.named(name)
    first = ThresholdKernel.named(base) if base else ThresholdKernel(kernel.levels[:1])
    assert kernel.levels == first.levels + first.complement().levels


@pytest.mark.parametrize(("name", "base"), SHIFTED.items())
def test_a_shifted_kernel_is_its_base_and_three_shifts_of_it(name: str, base: str | None) -> None:
    kernel = ThresholdKernel.named(name)
    first = ThresholdKernel.named(base) if base else ThresholdKernel(kernel.levels[:1])
    assert kernel.levels == first.levels + first.shift(1).levels + first.shift(2).levels + first.shift(3).levels
