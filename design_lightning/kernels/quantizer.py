"""The Lloyd-Max quantizer of the half-normal distribution, the source of the published kernels' levels.

A batch-normalised pre-activation is about N(0, 1), and what a ReLU passes of it is half-normal. The decision thresholds of
its optimal quantizer spread a kernel's levels over it. S. P. Lloyd, "Least squares quantization in PCM", 1982; J. Max,
"Quantizing for minimum distortion", 1960.
"""

import itertools
import math


def _density(x: float) -> float:
    return math.sqrt(2 / math.pi) * math.exp(-x * x / 2) if math.isfinite(x) else 0.0


def lloyd_max_half_normal(levels: int = 7, tolerance: float = 1e-13) -> tuple[float, ...]:
    """The `levels - 1` decision thresholds of the minimum mean squared error quantizer of |N(0, 1)|, increasing.

    The optimum is where each threshold is the middle of its two neighbours' centroids. Since the half-normal density is
    log-concave, that point is unique, and alternating between centroids and middles (Lloyd's iteration) converges to it.

    Args:
        levels: the number of output values of the quantizer, at least 2. The published kernels take 7: six thresholds.
        tolerance: the largest change of a threshold in the last iteration, in standard deviations.

    Raises:
        ValueError: if `levels` is below 2.

    >>> [round(t, 6) for t in lloyd_max_half_normal(7)]
    [0.293514, 0.595882, 0.918039, 1.276582, 1.70307, 2.281837]
    """
    if levels < 2:
        raise ValueError(f"a quantizer of {levels} levels has no threshold; use at least 2")
    thresholds = [3.0 * (i + 1) / levels for i in range(levels - 1)]
    change = math.inf
    while change > tolerance:
        edges = [0.0, *thresholds, math.inf]
        centroids = [
            # The half-normal density is minus the derivative of itself over x, so its first moment is a difference.
            (_density(low) - _density(high)) / (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
            for low, high in itertools.pairwise(edges)
        ]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(centroids)]
        change = max(abs(a - b) for a, b in zip(middles, thresholds, strict=True))
        thresholds = middles
    return tuple(thresholds)
