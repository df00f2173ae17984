"""The 1-bit layers: pseudo-gradients, binary activations, weight binarizers, and the layers made of them."""

from design_lightning.binary.activations import ACTIVATIONS, BinaryActivation, DeSign, Layout, RSign, Sign
from design_lightning.binary.companions import ChannelPReLU, Hardtanh, RPReLU, make_companion
from design_lightning.binary.derivatives import largest_error
from design_lightning.binary.estimators import (
    EDE,
    ESTIMATORS,
    STE,
    ApproxSign,
    Estimator,
    ReSTE,
    SwishSign,
    make_estimator,
)
from design_lightning.binary.functional import binarize, sign
from design_lightning.binary.keeping import Keeps, keep_for_backward_
from design_lightning.binary.layers import BinaryConv2d, BinaryLayer, BinaryLinear, PaddingValue, Stage
from design_lightning.binary.registry import register
from design_lightning.binary.weights import (
    WEIGHT_BINARIZERS,
    IRNetWeight,
    LearnedScaleWeight,
    ReCUWeight,
    SignWeight,
    WeightBinarizer,
    XNORWeight,
    make_weight_binarizer,
)

__all__ = [
    "ACTIVATIONS",
    "EDE",
    "ESTIMATORS",
    "STE",
    "WEIGHT_BINARIZERS",
    "ApproxSign",
    "BinaryActivation",
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "ChannelPReLU",
    "DeSign",
    "Estimator",
    "Hardtanh",
    "IRNetWeight",
    "Keeps",
    "Layout",
    "LearnedScaleWeight",
    "PaddingValue",
    "RPReLU",
    "RSign",
    "ReCUWeight",
    "ReSTE",
    "Sign",
    "SignWeight",
    "Stage",
    "SwishSign",
    "WeightBinarizer",
    "XNORWeight",
    "binarize",
    "keep_for_backward_",
    "largest_error",
    "make_companion",
    "make_estimator",
    "make_weight_binarizer",
    "register",
    "sign",
]
