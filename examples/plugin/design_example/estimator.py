"""A pseudo-gradient in the shape of a triangle."""

from torch import Tensor

from design_lightning.binary import Estimator


class Triangle(Estimator):
    """Falls evenly from the threshold on.

        forward   sign(u)
        gradient  max(0, 1 - |u| / width) / width

    Its integral is 1 whatever the width, which goes into a configuration as `estimator_args: {width: 2.0}`.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be positive, not {width}")
        self.width = float(width)

    def derivative(self, u: Tensor) -> Tensor:
        """The derivative at u, of its shape."""
        return (1 - u.abs() / self.width).clamp_min(0) / self.width

    def derivative_range(self) -> tuple[float, float]:
        """The least and the greatest one: so 4 bits hold it until the backward pass."""
        return 0.0, 1 / self.width
