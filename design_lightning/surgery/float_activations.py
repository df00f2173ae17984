"""The float activations that surgery knows: which are replaced by a companion, which are gates, and what they let through."""

import timm.layers
import timm.layers.activations as timm_activations
import timm.layers.activations_me as timm_activations_me
import torch
import torch.nn.functional as F
from timm.models.metaformer import SquaredReLU, StarReLU
from torch import Tensor, nn


def _classes(*names: str) -> tuple[type[nn.Module], ...]:
    """The classes of these names in torch.nn and in timm's two activation modules."""
    homes = (nn, timm_activations, timm_activations_me)
    found = [getattr(home, name) for home in homes for name in names if hasattr(home, name)]
    return tuple(dict.fromkeys(found))


ONE_SIDED = (*_classes("ReLU", "ReLU6", "Softplus"), SquaredReLU, StarReLU)
"""Their output is never negative (as their parameters start), so a Sign right behind one is constant."""

ACTIVATION_MODULES = (
    *ONE_SIDED,
    *_classes(
        "LeakyReLU",
        "PReLU",
        "Threshold",
        "RReLU",
        "ELU",
        "CELU",
        "SELU",
        "SiLU",
        "GELU",
        "Mish",
        "Hardswish",
        "Hardtanh",
        "Tanh",
        *("Softshrink", "Hardshrink", "Tanhshrink", "LogSigmoid"),
    ),
    *_classes("Softsign", "Swish", "HardSwish", "HardMish", "GELUTanh", "QuickGELU"),
    *_classes("SwishMe", "MishMe", "HardSwishMe", "HardMishMe"),
)
"""Replaced by the companion where their output reaches a binarizer."""

ACTIVATION_NORMS = (
    *(timm.layers.EvoNorm2dB0, timm.layers.EvoNorm2dB1, timm.layers.EvoNorm2dB2),
    *(timm.layers.EvoNorm2dS0, timm.layers.EvoNorm2dS0a, timm.layers.FilterResponseNormTlu2d),
)
"""Norms whose formula is an activation too, with no module inside that could be replaced; see `bare_norms`."""


def is_activation(module: nn.Module) -> bool:
    """Whether a module is a float activation, by itself or as part of its norm."""
    if isinstance(module, ACTIVATION_NORMS):
        return bool(module.apply_act)
    return isinstance(module, ACTIVATION_MODULES)


def is_one_sided(module: nn.Module) -> bool:
    """Whether an activation's output is never negative (as its parameters start)."""
    return isinstance(module, (*ONE_SIDED, timm.layers.FilterResponseNormTlu2d))


SIGMOIDS = _classes("Sigmoid", "Hardsigmoid", "HardSigmoid", "HardSigmoidMe")
"""Gates where their output weighs a stream; where it weighs none and a binarizer reads it, activations like others."""

GATE_MODULES = (*SIGMOIDS, *_classes("Softmax"))
"""Their output usually weighs a stream instead of being one."""

_functional = (F, torch, Tensor)


def _functions(*names: str) -> frozenset[object]:
    return frozenset(getattr(home, name) for home in _functional for name in names if hasattr(home, name))


ONE_SIDED_FUNCTIONS = _functions("relu", "relu_", "relu6", "softplus", "threshold", "threshold_")
ACTIVATION_FUNCTIONS = ONE_SIDED_FUNCTIONS | _functions(
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "rrelu",
    "elu",
    "elu_",
    "celu",
    "selu",
    "silu",
    "gelu",
    "mish",
    "hardswish",
    "hardtanh",
    *("softshrink", "hardshrink", "tanhshrink", "logsigmoid"),
)
GATE_FUNCTIONS = _functions("sigmoid", "sigmoid_", "hardsigmoid", "softmax")
