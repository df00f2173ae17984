"""Whether a file would give back the very network that is saved: it is rebuilt, and compared, before anything is written."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from design_lightning._names import in_a_line
from design_lightning.export.metadata import Metadata
from design_lightning.export.state import load_state_


def check_rebuilds(model: nn.Module, metadata: Metadata) -> None:
    """Rebuilds a network with its state, and compares modules, shared tensors, indices of feature maps, and outputs.

    The outputs are those of one batch of the probe's shape in eval mode, and must be equal bit for bit. The model, its modes
    and the random state are left as they were. A warning says if its own forward fails, so that there are no outputs.

    Raises:
        ValueError: with the first difference.
    """
    rebuilt = metadata.build()
    difference = _difference_in_structure(model, rebuilt)
    if (
        difference is None and metadata.input_shape is not None
    ):  # without a shape no forward went through at its surgery
        difference = _difference_in_outputs(model, rebuilt, metadata.input_shape)
    if difference is not None:
        raise ValueError(
            f"the model differs from {metadata.creation} after binarize_: {difference}; "
            "pass as model_args what it was created with"
        )


def _difference_in_structure(model: nn.Module, rebuilt: nn.Module) -> str | None:
    try:
        load_state_(rebuilt, model.state_dict())
    except ValueError as error:
        return str(error)
    ours, theirs = _structure(model), _structure(rebuilt)
    differing = (part for part in {**ours, **theirs} if ours.get(part) != theirs.get(part))
    part = next(differing, None)
    if part is None:
        return None
    return f"{part} is {ours.get(part, 'not there')}, but {theirs.get(part, 'not there')} when rebuilt"


def _structure(model: nn.Module) -> dict[str, str]:
    """What a model is made of, in words: every module, its maps, and which tensors are one and the same."""
    words = {f"module {name!r}": _in_words(module) for name, module in model.named_modules()}
    words["the choice of feature maps"] = str(getattr(getattr(model, "feature_info", None), "out_indices", None))
    first: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            words[f"tensor {key!r}"] = f"that of {first.setdefault(id(value), key)!r}"
    return words


def _in_words(module: nn.Module) -> str:
    # Training on several devices leaves batch norms of classes of its own (SyncBatchNorm), which compute the same here.
    kind = "BatchNorm" if isinstance(module, _BatchNorm) else type(module).__name__
    return f"{kind}({module.extra_repr()})"


def _difference_in_outputs(model: nn.Module, rebuilt: nn.Module, shape: Sequence[int]) -> str | None:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.randn(min(shape[0], 2), *shape[1:], generator=torch.Generator().manual_seed(0))
    x = x.to(parameter.device, parameter.dtype)
    try:
        ours = _evaluated(model, x)
    except Exception as error:  # whatever a forward may raise
        warnings.warn(
            f"the saved network's outputs were not compared with those of the rebuilt one, for its forward of a {x.dtype} "
            f"{list(shape)} fails: {in_a_line(error)}",
            stacklevel=4,
        )
        return None
    try:
        theirs = _evaluated(rebuilt, x)
    except Exception as error:
        return f"the rebuilt one's forward fails: {in_a_line(error)}"
    try:
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
    except (AssertionError, TypeError) as error:  # TypeError where one gives a tensor and the other several
        return f"for the same batch its outputs are others: {' '.join(str(error).split())}"
    return None


def _evaluated(model: nn.Module, x: Tensor) -> Any:
    """The outputs in eval mode, uncompiled and with deterministic convolutions, so that equal networks have equal ones."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[x.device] if x.is_cuda else []),
            torch.compiler.set_stance("force_eager"),
            torch.backends.cudnn.flags(enabled=True, deterministic=True),
        ):
            return model(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
