"""From one class of module to another that holds the very same parameters."""

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def adopt(kind: type[Module], module: nn.Module) -> Module:
    """A module of class `kind` with the parameters, buffers, submodules, hooks and attributes of `module`; nothing is copied.

    Its constructor does not run. Its dicts are its own, so that what is added to it is not added to `module`.
    """
    adopted = kind.__new__(kind)
    for name, value in vars(module).items():
        adopted.__dict__[name] = value.copy() if isinstance(value, dict) else value
    return adopted
