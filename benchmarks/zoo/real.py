"""A network of real numbers: float, binary, saved, rebuilt, and float again."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import design_lightning as dl
from zoo.architecture import Architecture
from zoo.bits import count_units, plain_signs_, watched_bits, watched_products
from zoo.checks import (
    FloatFailureError,
    Original,
    check_latent_weights,
    check_report,
    check_restored,
    check_stage_weights,
    expect,
    expect_finite,
    expect_same,
    expect_same_state,
    keeping_activations,
    note_report,
    structure,
    tolerance_of,
)
from zoo.row import Row
from zoo.tensors import forward, loss_of


def check_real(architecture: Architecture, config: dl.BinaryConfig, row: Row) -> None:
    model, x = architecture.build(), architecture.batch()
    original = Original(model)
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in model.state_dict().items()}
    try:
        with original.watched(model):
            trained = _train_once(model, x)
            model.load_state_dict(before)
            expected = _evaluated(model, x)
        expect_finite(expected, "the output")
    except Exception as error:
        raise FloatFailureError(f"{type(error).__name__}: {error}") from error
    _check_float_stage(copy.deepcopy(model), config, x, expected)

    report = dl.binarize_(model, config, x)
    note_report(report, model, row)
    row.units = count_units(model)
    check_report(report, model, original, config)
    check_latent_weights(report, model, original)
    check_stage_weights(model)
    with watched_products(model):
        still_trained = _train_once(model, x)
    with watched_bits(model) as bits, torch.no_grad():
        forward(model, x)
    row.least_share = round(bits.check(model), 5)
    _check_gradients(architecture, model, trained, still_trained)
    with plain_signs_(model), watched_bits(model) as bits, torch.no_grad():
        forward(model, x)
    bits.check_inputs()
    _check_file(architecture, model, x)

    dl.unbinarize_(model)
    check_restored(model, original)
    model.load_state_dict(before)
    expect_same(expected, _evaluated(model, x), "after unbinarize_ the output is another than the float network's")


def _train_once(model: nn.Module, x: Tensor) -> set[str]:
    """A forward and a backward in training mode; the parameters that get a gradient other than 0."""
    model.train()
    model.zero_grad()
    output = forward(model, x)
    loss = loss_of(output)
    loss.backward()
    expect_finite([output, loss], "the output in training or its loss")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        expect_finite(gradient, f"the gradient of {name}")
    model.zero_grad()
    return {name for name, gradient in gradients.items() if bool(gradient.any())}


def _evaluated(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return forward(model.eval(), x)


def _check_float_stage(model: nn.Module, config: dl.BinaryConfig, x: Tensor, expected: Any) -> None:
    """With its activations kept, a binary network in stage `float` is the float network."""
    dl.binarize_(model, keeping_activations(config), x)
    dl.set_stage_(model, "float")
    actual = _evaluated(model, x)
    expect_same(expected, actual, "in stage float the output is another than the float network's", tolerance_of(model))


def _check_gradients(architecture: Architecture, model: nn.Module, before: set[str], after: set[str]) -> None:
    lost = (before - after) & dict(model.named_parameters()).keys()
    if lost:
        lost -= _rounding_only(architecture, lost)
    expect(not lost, f"{len(lost)} parameters lost their gradient, such as {sorted(lost)[:3]}")


def _rounding_only(architecture: Architecture, names: set[str]) -> set[str]:
    """Those whose gradient in the float network is nothing but rounding: a bias in front of a softmax, say, which it cancels.

    In float64 it is below a millionth of what float32 rounds, relative to the largest gradient.
    """
    model = architecture.build().double()
    loss_of(forward(model, architecture.batch().double())).backward()
    sizes = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None}
    return {name for name in names if sizes[name] < 1e-13 * max(sizes.values())}


def _check_file(architecture: Architecture, model: nn.Module, x: Tensor) -> None:
    """What `load` rebuilds from the file of `save` is the same network and gives the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = dl.save(model, Path(folder) / "model.safetensors", architecture.arguments)
        rebuilt = dl.load(path)
    expect_same_state(model.state_dict(), rebuilt.state_dict())
    expect(structure(model) == structure(rebuilt), "the rebuilt network has other modules")
    expect_same(_evaluated(model, x), _evaluated(rebuilt, x), "the rebuilt network gives another output")
