"""A line of the table."""

from dataclasses import dataclass


@dataclass
class Row:
    """The result for one architecture.

    Args:
        name: timm's.
        status: `pass` or `fail`.
        reason: why it failed.
        layers, binary_layers: how many weight layers it has, and how many became binary.
        binary_parameters_share, binary_operations_share: what of it is 1-bit.
        parameters: of the float network.
        numbers: `real`, or `fake, real by block`.
        input: the images' height and width.
        blocks: how many blocks ran with real numbers, where not all did at once.
        units: how many DeSigns took the size of their input as unit.
        least_share: the rarer sign's share of the bits, of the binarizer where it is least.
        timm, torch: versions.
        code: a hash of the sources of kernels, layers, surgery and these checks.
    """

    name: str
    status: str = "fail"
    reason: str = ""
    layers: int = 0
    binary_layers: int = 0
    binary_parameters_share: float = 0.0
    binary_operations_share: float = 0.0
    parameters: int = 0
    numbers: str = ""
    input: int = 0
    blocks: int = 0
    units: int = 0
    least_share: float = 0.0
    timm: str = ""
    torch: str = ""
    code: str = ""
