"""`pack_layers_`: the binary layers of a trained network in their packed form, in place. Their weights are +-1 for good."""

from torch import nn

from design_lightning.binary import BinaryLayer
from design_lightning.binary.packed import PackedLayer, packed
from design_lightning.surgery.hooks import share_hooks


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def pack_layers_(model: nn.Module) -> tuple[str, ...]:
    """Puts every binary layer's packed form in its place, hooks and all; what the network computes in eval mode stays equal.

    Returns:
        The names of the layers.

    Raises:
        ValueError: if there is none, or one is in another stage than `both`, or has weights that are no scaled signs; names it.
            The model is as it was then.
    """
    forms: dict[nn.Module, PackedLayer] = {}
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, BinaryLayer):
            continue
        names.append(name)
        if module not in forms:
            try:
                forms[module] = packed(module)
            except ValueError as error:
                raise ValueError(f"{name!r} cannot be packed: {error}") from error
    if not names:
        raise ValueError(f"{type(model).__name__} has no binary layer with latent weights, so there is nothing to pack")
    for name in names:
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        layer = parent._modules[leaf]
        assert layer is not None
        share_hooks(layer, forms[layer])
        parent._modules[leaf] = forms[layer]
    return tuple(names)
