"""Student's t: quantiles and intervals of a mean, paired or not, without a package for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean of n values, and the half width of its two-sided interval."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Its lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t-interval of a mean; infinitely wide for a single value.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("an interval needs at least one value, and there is none")
    n = len(values)
    if n == 1:
        return Interval(values[0], math.inf, 1)
    return Interval(fmean(values), t_quantile((1 + confidence) / 2, n - 1) * stdev(values) / math.sqrt(n), n)


def paired(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t-interval of the mean difference `values - others`, pair by pair.

    Raises:
        ValueError: if they are not equally many.
    """
    return interval([a - b for a, b in zip(values, others, strict=True)], confidence)


def p_value(difference: Sequence[float]) -> float:
    """Two-sided, of the hypothesis that the mean is 0.

    Raises:
        ValueError: if there are fewer than two values.
    """
    if len(difference) < 2:
        raise ValueError(f"a test needs at least two values, not {len(difference)}")
    spread = stdev(difference)
    if spread == 0:
        return 1.0 if fmean(difference) == 0 else 0.0
    t = abs(fmean(difference)) / (spread / math.sqrt(len(difference)))
    return 2 * (1 - t_distribution(t, len(difference) - 1))


def t_quantile(p: float, degrees: int) -> float:
    """The value that Student's t stays below with probability p, by bisection.

    Raises:
        ValueError: if p is not between 1/2 and 1, or there are no degrees of freedom.

    >>> round(t_quantile(0.975, 7), 4)
    2.3646
    """
    if not 0.5 <= p < 1 or degrees < 1:
        raise ValueError(f"p={p} must be from 0.5 to below 1, and degrees={degrees} at least 1")
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def t_distribution(t: float, degrees: int, parts: int = 2000) -> float:
    """The probability that Student's t is below t, for t >= 0.

    With t = sqrt(degrees) * tan(a) the density is proportional to cos(a)^(degrees - 1), which Simpson's rule integrates.
    """
    end = math.atan(t / math.sqrt(degrees))
    width = end / parts
    heights = [math.cos(i * width) ** (degrees - 1) for i in range(parts + 1)]
    area = (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])) * width / 3
    log_whole = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
    return 0.5 + area * math.exp(log_whole)
