"""Refuses to fold the branches or norms of a binary layer into one float layer.

RepVGG, MobileOne, FastViT and others train parallel branches and sum them into one convolution afterwards (`reparameterize`,
`fuse`, `switch_to_deploy`; `timm.utils.model.reparameterize_model` calls them). A sum of +-1 convolutions of the sign is no
+-1 convolution, so on binary layers that would silently give a float network of the latent weights. Such a method takes nothing;
one of the same name that takes something (a VAE's `reparameterize(mean, variance)`) is another thing, and is left alone.
"""

import inspect
from functools import partial
from typing import Any, NoReturn

from torch import nn

from design_lightning.binary import BinaryLayer

_METHODS = ("reparameterize", "fuse", "switch_to_deploy")


def _refuse(name: str, method: str) -> NoReturn:
    raise ValueError(
        f"{name or 'the model'}.{method}() would fold binary layers into a float one; "
        "call it before binarize_, or after unbinarize_"
    )


def _takes_nothing(method: Any) -> bool:
    if not inspect.ismethod(method):
        return False
    parameters = inspect.signature(method).parameters.values()
    return all(p.kind is p.VAR_KEYWORD or p.default is not p.empty for p in parameters)


def refuse_fusing_(model: nn.Module) -> None:
    """Has every module that could fold its own binary layers raise instead."""
    for name, module in model.named_modules():
        if any(isinstance(inner, BinaryLayer) for inner in module.modules()):
            for method in _METHODS:
                if _takes_nothing(getattr(module, method, None)):
                    module.__dict__[method] = partial(_refuse, name, method)


def allow_fusing_(model: nn.Module) -> None:
    """Takes back what `refuse_fusing_` did."""
    for module in model.modules():
        for method in _METHODS:
            held: Any = module.__dict__.get(method)
            if isinstance(held, partial) and held.func is _refuse:
                del module.__dict__[method]
