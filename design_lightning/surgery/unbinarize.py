"""`unbinarize_`: the float network back, with the latent weights."""

from torch import nn

from design_lightning.binary import BinaryLayer
from design_lightning.surgery.downsampling import AveragePooledConv2d
from design_lightning.surgery.fused_bias import fuse_qkv_bias_again_
from design_lightning.surgery.fusing import allow_fusing_
from design_lightning.surgery.record import forget_surgery
from design_lightning.surgery.shortcuts import remove_shortcuts_
from design_lightning.surgery.stages import binary_layers

_ORIGINAL = "_float_original"


def remember_original(replacement: nn.Module, original: nn.Module) -> None:
    """Keeps a float module with its replacement, as no submodule of it: for `unbinarize_`."""
    replacement.__dict__[_ORIGINAL] = (original,)


def unbinarize_(model: nn.Module) -> tuple[str, ...]:
    """Takes back what `binarize_` did, in place: float layers of their former classes, with the latent weights as weights.

    Float activations are as they were; shortcuts that surgery added are gone, and so is what only the binary network had
    (thresholds, learned scales, shifts and slopes). Training mode and hooks stay. The result can be binarized again.

    Returns:
        The names of the modules that were put back.

    Raises:
        ValueError: if the model has no binary layer.
    """
    if not binary_layers(model):
        raise ValueError(f"{type(model).__name__} has no binary layer, so there is nothing to take back")
    remove_shortcuts_(model)
    allow_fusing_(model)
    restored: dict[nn.Module, nn.Module] = {}
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        original = restored.get(module) or _original(module)
        if original is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            fuse_qkv_bias_again_(parent)
            parent._modules[name.rpartition(".")[2]] = restored[module] = original
            names.append(name)
    forget_surgery(model)
    return tuple(names)


def _original(module: nn.Module) -> nn.Module | None:
    if isinstance(module, BinaryLayer | AveragePooledConv2d):
        return module.to_float()
    if _ORIGINAL not in module.__dict__:
        return None
    original: nn.Module = module.__dict__[_ORIGINAL][0]
    reference = next((value for value in (*module.parameters(), *module.buffers())), None)
    if reference is not None:
        original.to(reference.device)
    # What both have is as it is by now: trained, moved, cast.
    original._parameters.update({k: v for k, v in module._parameters.items() if k in original._parameters})
    original._buffers.update({k: v for k, v in module._buffers.items() if k in original._buffers})
    original.train(module.training)
    return original
