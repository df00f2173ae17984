"""The Lloyd-Max quantizer of the half-normal distribution, the source of the published kernels' levels.

A batch-normalised pre-activation is about N(0, 1), and what a ReLU passes of it is half-normal. The decision thresholds of
its optimal quantizer spread a kernel's levels over it. S. P. Lloyd, "Least squares quantization in PCM", 1982; J. Max,
"Quantizing for minimum distortion", 1960.
"""

import itertools
import math
from collections.abc import Callable


def _density(x: float) -> float:
    return math.sqrt(2 / math.pi) * math.exp(-x * x / 2)


def _centroid(low: float, high: float) -> float:
    """The mean of |N(0, 1)| between two values: the density is minus its own derivative over x, so this is a difference."""
    if high - low < 1e-9:
        return (low + high) / 2
    return (_density(low) - _density(high)) / (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def lloyd_max_half_normal(levels: int = 7) -> tuple[float, ...]:
    """The `levels - 1` decision thresholds of the minimum mean squared error quantizer of |N(0, 1)|, increasing.

    The optimum is where each threshold is the middle of its two neighbours' centroids; since the half-normal density is
    log-concave, there is one such point. The first threshold decides all: it gives the next centroid, that the next
    threshold, and so on; it is right when the last centroid is that of what remains above the last threshold.

    Args:
        levels: the number of output values of the quantizer, from 2 to 64. The published kernels take 7: six thresholds.

    Raises:
        ValueError: if `levels` is out of range.

    >>> [round(t, 6) for t in lloyd_max_half_normal(7)]
    [0.293514, 0.595882, 0.918039, 1.276582, 1.70307, 2.281837]
    """
    if not 2 <= levels <= 64:
        raise ValueError(f"a quantizer of {levels} levels: use from 2 (one threshold) to 64")
    first = _bisect(
        lambda t: len(found := _thresholds_from(t, levels)) == levels - 1 and _falls_short(found), 0.0, _FAR
    )
    return tuple(_thresholds_from(first, levels))


_FAR = 8.0
"""Above it the half-normal distribution holds 1e-15."""


def _thresholds_from(first: float, levels: int) -> list[float]:
    """The thresholds that follow from the first, as far as they stay below `_FAR`."""
    found = [first]
    centroid = _centroid(0.0, first)
    while len(found) < levels - 1:
        centroid = 2 * found[-1] - centroid
        if centroid >= _centroid(found[-1], _FAR):
            break
        low = found[-1]
        found.append(_bisect(lambda t, low=low, c=centroid: _centroid(low, t) < c, low, _FAR))  # type: ignore[misc]
    return found


def _falls_short(thresholds: list[float]) -> bool:
    """Whether the last centroid lies below that of all that remains, so that the first threshold was too low."""
    centroid = 0.0
    for low, high in itertools.pairwise([0.0, *thresholds]):
        centroid = _centroid(low, high)
    return 2 * thresholds[-1] - centroid < _centroid(thresholds[-1], _FAR)
