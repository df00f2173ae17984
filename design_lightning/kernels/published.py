"""The threshold kernels that the authors of DeSign published with their code, by slug.

Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.
A code is an output of a ReLU after a one-channel 3x3 convolution of +-1 by +-1; its threshold is the code's place in the
batch-normalised domain ("entry scaling"). The thresholds are 3 to 6 % above the exact ones of `lloyd_max_half_normal(7)`.
"""

PUBLISHED_LEVELS: dict[int, float] = {
    0: 0.31178307,
    1: 0.63100557,
    3: 0.96713846,
    5: 1.33518974,
    7: 1.76555877,
    9: 2.34193425,
}

Levels = tuple[tuple[tuple[float, ...], ...], ...]


def _from_codes(*slices: str) -> Levels:
    """Thresholds from codes written as `"1 1; 0 3"`, one text for each channel phase."""
    return tuple(
        tuple(tuple(PUBLISHED_LEVELS[int(code)] for code in row.split()) for row in text.split(";")) for text in slices
    )


PUBLISHED: dict[str, Levels] = {
    "2x2_v1": _from_codes("1 1; 0 3"),
    "2x2_v2": _from_codes("1 1; 3 3"),
    "2x2x2_complement_v1": _from_codes("1 1; 0 3", "7 7; 9 5"),
    "2x2x2_complement_v2": _from_codes("1 1; 3 3", "7 7; 5 5"),
    "2x2x4_shifted_v1": _from_codes("1 1; 0 3", "3 3; 1 5", "5 5; 3 7", "7 7; 5 9"),
    "2x2x4_shifted_v2": _from_codes("1 1; 3 3", "3 3; 5 5", "5 5; 7 7", "7 7; 9 9"),
    "3x3_symmetric_v1": _from_codes("3 1 3; 1 0 1; 3 1 3"),
    "3x3_symmetric_v2": _from_codes("5 1 3; 1 0 1; 3 1 5"),
    "3x3_symmetric_v3": _from_codes("3 0 3; 0 1 0; 3 0 3"),
    "3x3x2_complement_v1": _from_codes("1 3 1; 3 1 3; 1 3 1", "7 5 7; 5 7 5; 7 5 7"),
    "3x3x4_shifted_v1": _from_codes(
        "1 3 1; 3 1 3; 1 3 1", "3 5 3; 5 3 5; 3 5 3", "5 7 5; 7 5 7; 5 7 5", "7 9 7; 9 7 9; 7 9 7"
    ),
    "2x2x4_half_profile": _from_codes("1 3; 1 3", "1 3; 1 3", "1 3; 1 3", "1 3; 1 3"),
    "2x2x4_baseline": (
        ((1.35667966, 1.99840603), (0.41900698, 0.85981385)),
        ((0.85981385, 0.41900698), (1.35667966, 1.99840603)),
        ((1.99840603, 1.35667966), (0.85981385, 0.41900698)),
        ((0.41900698, 0.85981385), (1.35667966, 1.99840603)),
    ),
}
