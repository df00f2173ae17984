"""`unbinarize_`: the float network back, with the latent weights."""

import torch
from torch import nn

from design_lightning.binary import BinaryLayer
from design_lightning.binary.lean import make_plain_
from design_lightning.surgery.downsampling import AveragePooled
from design_lightning.surgery.fusing import allow_fusing_
from design_lightning.surgery.hooks import share_hooks
from design_lightning.surgery.record import forget_surgery
from design_lightning.surgery.shortcuts import remove_shortcuts_
from design_lightning.surgery.stages import binary_layers
from design_lightning.surgery.uncalled import undo_call_layers_

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
    return restore_(model)


def restore_(model: nn.Module) -> tuple[str, ...]:
    """Takes back as much of `binarize_` as was done; returns the names of the modules that were put back."""
    reference = next(p for p in model.parameters() if p.is_floating_point())
    originals = {module: _original(module, reference) for module in model.modules()}
    restored = {module: original for module, original in originals.items() if original is not None}
    remove_shortcuts_(model)  # every original is there: from here on nothing fails
    allow_fusing_(model)
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        undo_call_layers_(module)
        if module in restored:
            parent = model.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = restored[module]
            share_hooks(module, restored[module])
            names.append(name)
    make_plain_(model)
    forget_surgery(model)
    return tuple(names)


def _original(module: nn.Module, reference: torch.Tensor) -> nn.Module | None:
    if isinstance(module, BinaryLayer | AveragePooled):
        return module.to_float()
    if _ORIGINAL not in module.__dict__:
        return None
    original: nn.Module = module.__dict__[_ORIGINAL][0]
    alone = [t for t in (*original.parameters(), *original.buffers()) if t.is_meta and not reference.is_meta]
    if alone:  # binarized on meta, and given storage since, as its replacement was
        original.to_empty(device=reference.device)
        original.reset_parameters()  # type: ignore[operator]
    # What both have is as it is by now: trained, moved, cast. What the original alone has follows the model.
    for parameter_name in original._parameters.keys() & module._parameters.keys():
        original._parameters[parameter_name] = module._parameters[parameter_name]
    for buffer_name in original._buffers.keys() & module._buffers.keys():
        original._buffers[buffer_name] = module._buffers[buffer_name]
    shared = {id(t) for t in (*module.parameters(), *module.buffers())}
    for tensor in (*original.parameters(), *original.buffers()):
        if id(tensor) not in shared:
            tensor.data = tensor.data.to(
                reference.device, reference.dtype if tensor.is_floating_point() else tensor.dtype
            )
    original.train(module.training)
    return original
