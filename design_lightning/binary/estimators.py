"""Pseudo-gradients (estimators): what the backward pass takes for the derivative of the sign, which is zero almost everywhere.

Each is a module with one method, `derivative(u)`, at `u = x - threshold`. Annealed ones keep their `temperature` as a
persistent 0-dim buffer, so that it is part of a checkpoint and changing it recompiles nothing.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from design_lightning._names import class_by_name
from design_lightning.binary._float32 import Float32State
from design_lightning.binary._indicator import indicator, is_eager_on_cpu


class Estimator(nn.Module):
    """The base of all pseudo-gradients. A subclass gives `derivative`."""

    is_mask: ClassVar[bool] = False
    """Whether the derivative is always 0 or 1, so that one bit holds it."""

    def derivative(self, u: Tensor) -> Tensor:
        """What stands for d sign(u) / du, elementwise; of the shape and type of `u`."""
        raise NotImplementedError(f"{type(self).__name__} lacks `derivative`")

    def derivative_(self, u: Tensor) -> Tensor:
        """The derivative, which may take the memory of `u`."""
        return self.derivative(u)

    def derivative_range(self) -> tuple[float, float | Tensor] | None:
        """The least and the greatest derivative, if they are known: then 4 bits can hold one. The least is 0 or below."""
        return None


class AnnealedEstimator(Float32State, Estimator):
    """A pseudo-gradient whose shape moves with a `temperature`, by a callback or by hand (`temperature.fill_(value)`)."""

    temperature: Tensor
    float32_state: ClassVar[tuple[str, ...]] = ("temperature",)

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.start = {"temperature": float(temperature)}

    def extra_repr(self) -> str:  # noqa: D102
        return "" if self.temperature.is_meta else f"temperature={self.temperature.item():g}"


class STE(Estimator):
    """The straight-through estimator, clipped: the sign passes the gradient where its input is small.

        forward   sign(u)
        gradient  1 for |u| <= clip, else 0

    `clip` is 1 by default; QuickNet takes 1.25, PokeBNN up to 3.
    Courbariaux et al., "Binarized Neural Networks", 2016, arXiv:1602.02830.
    """

    is_mask = True

    def __init__(self, clip: float = 1.0) -> None:
        super().__init__()
        if not clip > 0:
            raise ValueError(f"clip must be positive, not {clip}")
        self.clip = float(clip)

    def derivative(self, u: Tensor) -> Tensor:  # noqa: D102
        return indicator(torch.le, u.detach().abs(), self.clip)

    def derivative_(self, u: Tensor) -> Tensor:  # noqa: D102
        if type(self).derivative is not STE.derivative:  # a subclass with a formula of its own
            return self.derivative(u)
        size = u.detach().abs_()
        return torch.le(size, self.clip, out=size) if is_eager_on_cpu(size) else indicator(torch.le, size, self.clip)

    def extra_repr(self) -> str:  # noqa: D102
        return f"clip={self.clip:g}"


class ApproxSign(Estimator):
    """The derivative of a piecewise quadratic that follows the sign closely.

        forward   sign(u)
        gradient  max(0, 2 - 2 |u|)

    Liu et al., "Bi-Real Net", ECCV 2018, arXiv:1808.00278. The authors of DeSign use it in ReCU + DeSign, too.
    """

    def derivative(self, u: Tensor) -> Tensor:  # noqa: D102
        return (2 - 2 * u.abs()).clamp_min(0)

    def derivative_range(self) -> tuple[float, float | Tensor]:  # noqa: D102
        return 0.0, 2.0


class SwishSign(Estimator):
    """The derivative of SignSwish, which is negative beyond its zero near |u| = 2.4 / b and so pulls values back.

        forward   sign(u)
        gradient  b (2 - b u tanh(b u / 2)) / (1 + cosh(b u))

    Darabi et al., "Regularized Binary Network Training" (BNN+), 2018, arXiv:1812.11800. `beta` is b, 5 by default.
    """

    least = -0.073829
    """The derivative's least value at b = 1, near |u| = 3.436."""

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta must be positive, not {beta}")
        self.beta = float(beta)

    def derivative(self, u: Tensor) -> Tensor:  # noqa: D102
        # Beyond 40 the value is below 1e-15; cosh would overflow in float32 at 89.
        z = (self.beta * u).clamp(-40, 40)
        return self.beta * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z))

    def derivative_range(self) -> tuple[float, float | Tensor]:  # noqa: D102
        return self.least * self.beta, self.beta

    def extra_repr(self) -> str:  # noqa: D102
        return f"beta={self.beta:g}"


class EDE(AnnealedEstimator):
    """The error decay estimator: from nearly the identity to nearly the sign's own derivative, as `temperature` rises.

        forward   sign(u)
        gradient  k t (1 - tanh(t u)^2),  k = max(1 / t, 1)

    The temperature t is annealed from 0.1 to 10. Qin et al., "Forward and Backward Information Retention for Accurate
    Binary Neural Networks" (IR-Net), CVPR 2020, arXiv:1909.10788.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__(temperature)

    def derivative(self, u: Tensor) -> Tensor:  # noqa: D102
        t = self.temperature.to(u.dtype)
        return t.clamp_min(1.0) * (1 - torch.tanh(t * u).square())

    def derivative_range(self) -> tuple[float, float | Tensor]:  # noqa: D102
        return 0.0, self.temperature.clamp_min(1.0)


class ReSTE(AnnealedEstimator):
    """The rectified straight-through estimator: the derivative of a root, from the identity towards the sign.

        forward   sign(u)
        gradient  (1 / o) |u|^((1 - o) / o)  for 0.1 <= |u| <= 1.5
                  0.1^(1 / o) / 0.1           for |u| < 0.1 (the secant, where the root is steep)
                  0                           for |u| > 1.5

    The temperature o is annealed from 1 to 3. Wu et al., "Estimator Meets Equilibrium Perspective: A Rectified
    Straight Through Estimator for Binary Neural Networks Training", ICCV 2023, arXiv:2308.06689.
    """

    near = 0.1
    far = 1.5

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(temperature)

    def derivative(self, u: Tensor) -> Tensor:  # noqa: D102
        o = self.temperature.to(u.dtype)
        size = u.abs()
        # The clamp keeps the power finite where it is not taken: 0 times infinity would be NaN.
        root = size.clamp(self.near, self.far).pow((1 - o) / o) / o
        secant = self.near ** (1 / o) / self.near
        return torch.where(size < self.near, secant, root) * (size <= self.far).to(u.dtype)

    def derivative_range(self) -> tuple[float, float | Tensor]:  # noqa: D102
        o = self.temperature
        ends = [size ** ((1 - o) / o) / o for size in (self.near, self.far)]  # below o = 1 the root grows
        return 0.0, torch.stack([self.near ** (1 / o) / self.near, *ends]).amax()


ESTIMATORS: dict[str, type[Estimator]] = {
    "ste": STE,
    "approx_sign": ApproxSign,
    "swish_sign": SwishSign,
    "ede": EDE,
    "reste": ReSTE,
}


def make_estimator(estimator: str | Estimator, **arguments: Any) -> Estimator:
    """An estimator from its name (a key of `ESTIMATORS`, or the dotted path of a class), or the object itself.

    Raises:
        ValueError: if the name is unknown, or arguments come with a finished object.
        TypeError: if the class does not take the arguments.
    """
    if isinstance(estimator, Estimator):
        if arguments:
            raise ValueError(f"estimator_args {arguments} do not go with a finished estimator {estimator!r}")
        return estimator
    return class_by_name(estimator, ESTIMATORS, Estimator, "estimator")(**arguments)
