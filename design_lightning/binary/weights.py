"""Weight binarizers: from the real-valued latent weights of a layer to signs times a scale per output channel.

Each is a module: `signs(w)` and `scale(w)` give the two factors of its output, so that an export can store the signs as
bits and fold the scales. Weights are [O, ...]: everything but the first axis is the fan-in of an output channel.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from design_lightning._names import class_by_name
from design_lightning.binary._float32 import Float32State
from design_lightning.binary._indicator import indicator
from design_lightning.binary.estimators import EDE, STE
from design_lightning.binary.functional import fan_in_axes, scaled_signs, sign
from design_lightning.binary.keeping import Keeping


def _mean_abs(w: Tensor) -> Tensor:
    """The mean of |w| of each output channel, float32 (float64 for such weights): [O]."""
    wide = w if w.dtype == torch.float64 else w.float()
    return wide.abs().sum(fan_in_axes(w)) / math.prod(w.shape[1:])


class WeightBinarizer(Float32State, Keeping):
    """The base of the weight binarizers.

        forward   sign(normalized(w)) * scale
        gradient  `derivative` for that of the sign, and on through `normalized`

    A subclass says what these three are; one that gives something else than signs times a factor per output channel has a
    forward of its own.

    Args:
        latent: the layer's weights [O, ...], for the sizes and the starting scale of binarizers that learn one.
    """

    has_scale: ClassVar[bool] = True
    """Whether `scale` gives factors."""

    scales_gradient: ClassVar[bool] = True
    """Whether the scale is a factor of the gradient, too."""

    def __init__(self, latent: Tensor) -> None:
        super().__init__()

    def forward(self, w: Tensor) -> Tensor:
        """The binarized weights, of the shape and type of w, with a gradient to w."""
        v = self.normalized(w)
        scale = self._factor(v)
        return scaled_signs(v, scale, self.derivative, self.scales_gradient, self.keeps).to(w.dtype)

    @property
    def gives_bits(self) -> bool:
        """Whether the output is known to be signs times a factor per output channel: not of a forward of one's own."""
        return type(self).forward is WeightBinarizer.forward

    def normalized(self, w: Tensor) -> Tensor:
        """What the sign is taken of: w, or w standardised; of its shape."""
        return w

    def derivative(self, v: Tensor) -> Tensor:
        """What stands for d sign(v) / dv at the normalized weights; of their shape and type."""
        raise NotImplementedError(f"{type(self).__name__} lacks `derivative`")

    def signs(self, w: Tensor) -> Tensor:
        """The +-1 of the output, of the shape and type of w."""
        return sign(self.normalized(w)).to(w.dtype)

    def scale(self, w: Tensor) -> Tensor | None:
        """The positive or negative factor of each output channel [O], or None where there is none: output = signs * scale."""
        factor = self._factor(self.normalized(w))
        return None if factor is None else factor.to(w.dtype)

    def _factor(self, v: Tensor) -> Tensor | None:
        """The scale, from the normalized weights."""
        return None

    @torch.no_grad()
    def reset_scale(self, w: Tensor) -> None:
        """Sets a learned scale to the best one for the latent weights w, mean |w| per channel; else does nothing."""


class SignWeight(WeightBinarizer):
    """The signs alone.

        forward   sign(w)
        gradient  1 for |w| <= 1, else 0

    Courbariaux et al., "BinaryConnect", NeurIPS 2015, arXiv:1511.00363.
    """

    has_scale = False
    estimator: STE

    def __init__(self, latent: Tensor) -> None:
        super().__init__(latent)
        self.estimator = STE()

    def derivative(self, v: Tensor) -> Tensor:  # noqa: D102
        return self.estimator.derivative(v)


class XNORWeight(SignWeight):
    """The signs times the mean size of the latent weights.

        forward   sign(w) * mean |w| over the output channel
        gradient  1 for |w| <= 1, else 0 (the scale is a constant to it, and no factor of it: ReActNet)

    Rastegari et al., "XNOR-Net", ECCV 2016, arXiv:1603.05279; Liu et al., "ReActNet", ECCV 2020, arXiv:2003.03488.
    """

    has_scale = True
    scales_gradient = False

    @torch.no_grad()
    def _factor(self, v: Tensor) -> Tensor:
        return _mean_abs(v).to(v.dtype)


class LearnedScaleWeight(SignWeight):
    """The signs times a learned factor per output channel.

        forward   sign(w) * alpha
        gradient  of w: alpha for |w| <= 1, else 0; of alpha: the sum over its channel of sign(w) times the gradient

    Alpha starts at mean |w|. Bulat and Tzimiropoulos, "XNOR-Net++", BMVC 2019, arXiv:1909.13863.
    """

    has_scale = True

    def __init__(self, latent: Tensor) -> None:
        super().__init__(latent)
        self.alpha = nn.Parameter(_mean_abs(latent.detach()).to(latent.dtype))

    def _factor(self, v: Tensor) -> Tensor:
        return self.alpha

    def reset_scale(self, w: Tensor) -> None:  # noqa: D102
        self.alpha.data.copy_(_mean_abs(w.detach()))


class ReCUWeight(WeightBinarizer):
    """Signs of latent weights that are standardised and clamped, so that weights far from zero can still flip.

        w1 = (w - mean) / (sqrt(var + 1e-5) / (2 sqrt 2))      per output channel, unbiased var
        Q  = -E ln(2 - 2 tau),  E = mean |w1| over the layer   (a constant to the gradient)
        forward   sign(clamp(w1, -Q, Q)) * alpha
        gradient  of w1: alpha for |w1| <= Q, else 0, and on through the standardisation

    `tau` is annealed from 0.85 to 0.99; alpha is learned per output channel, and starts at mean |w|.
    Xu et al., "ReCU: Reviving the Dead Weights in Binary Neural Networks", ICCV 2021, arXiv:2103.12369.

    Args:
        latent: as in `WeightBinarizer`.
        tau: the quantile that the clamp keeps, above 0.5 and below 1. A persistent 0-dim buffer.
    """

    tau: Tensor
    float32_state: ClassVar[tuple[str, ...]] = ("tau",)

    def __init__(self, latent: Tensor, tau: float = 0.85) -> None:
        super().__init__(latent)
        if not 0.5 < tau < 1:
            raise ValueError(f"tau must be above 0.5 and below 1, not {tau}")
        if latent[0].numel() < 2:
            raise ValueError(
                f"ReCU standardises over the fan-in, which is 1 in weights of shape {list(latent.shape)}; use 'xnor'"
            )
        self.register_buffer("tau", torch.tensor(float(tau)))
        self.start = {"tau": float(tau)}
        self.alpha = nn.Parameter(_mean_abs(latent.detach()).to(latent.dtype))

    def normalized(self, w: Tensor) -> Tensor:  # noqa: D102
        wide = w if w.dtype == torch.float64 else w.float()
        flat = wide.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        return (centred / (torch.sqrt(flat.var(1, keepdim=True) + 1e-5) / (2 * 2**0.5))).view_as(wide)

    def derivative(self, v: Tensor) -> Tensor:  # noqa: D102
        size = v.abs()
        return indicator(torch.le, size, -size.mean() * torch.log(2 - 2 * self.tau))

    def _factor(self, v: Tensor) -> Tensor:
        return self.alpha

    def reset_scale(self, w: Tensor) -> None:  # noqa: D102
        self.alpha.data.copy_(_mean_abs(w.detach()))


class IRNetWeight(WeightBinarizer):
    """Signs of standardised latent weights, with a power-of-two scale and an annealed gradient.

        w1 = (w - mean) / std                                   per output channel, unbiased std
        forward   sign(w1) * 2^round(log2(mean |w1|))           the scale is a constant to the gradient
        gradient  of w1: the scale times that of `EDE` at w1, and on through the standardisation

    Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural Networks" (IR-Net), CVPR 2020,
    arXiv:1909.10788.

    Args:
        latent: as in `WeightBinarizer`.
        temperature: of the EDE gradient, annealed from 0.1 to 10.
    """

    def __init__(self, latent: Tensor, temperature: float = 0.1) -> None:
        super().__init__(latent)
        if latent[0].numel() < 2:
            raise ValueError(
                f"IR-Net standardises over the fan-in, which is 1 in weights of shape {list(latent.shape)}; use 'xnor'"
            )
        self.estimator = EDE(temperature)

    def normalized(self, w: Tensor) -> Tensor:  # noqa: D102
        wide = w if w.dtype == torch.float64 else w.float()
        flat = wide.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        # A channel of equal weights has no deviation to divide by: it stays 0, whose sign is +1.
        return (centred / flat.std(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)).view_as(wide)

    def derivative(self, v: Tensor) -> Tensor:  # noqa: D102
        return self.estimator.derivative(v)

    @torch.no_grad()
    def _factor(self, v: Tensor) -> Tensor:
        return torch.exp2(torch.round(torch.log2(_mean_abs(v))))


WEIGHT_BINARIZERS: dict[str, type[WeightBinarizer]] = {
    "sign": SignWeight,
    "xnor": XNORWeight,
    "learned": LearnedScaleWeight,
    "recu": ReCUWeight,
    "irnet": IRNetWeight,
}


def make_weight_binarizer(name: str, latent: Tensor, **arguments: Any) -> WeightBinarizer:
    """A weight binarizer for a layer's latent weights, by its name or the dotted path of a class.

    Raises:
        ValueError: if the name is unknown, or the weights do not suit it.
    """
    return class_by_name(name, WEIGHT_BINARIZERS, WeightBinarizer, "weight binarizer")(latent, **arguments)
