"""Sensitivity: the numbers are those of networks that are built anew with overrides, and the model is left as it was."""

import copy
import csv
import dataclasses
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.surgery import binary_layers
from design_lightning.training.batch_norm import recalibrate_batch_norm_
from design_lightning.training.sensitivity import LayerSensitivity, Sensitivity, hold_batches, measure_sensitivity

CLASSES = 4
Batches = list[tuple[Tensor, Tensor]]


def float_network() -> nn.Module:
    """A small network whose statistics and accuracy are not those of its birth."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet", num_classes=CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for images, labels in labelled(6, seed=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def labelled(batches: int, seed: int, size: int = 16) -> Batches:
    """Images whose class is the quarter of the image that is bright."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        images = torch.randn(size, 3, 32, 32, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 16 * (label // 2) :, 16 * (label % 2) :][:, :16, :16] += 1
        found.append((images, labels))
    return found


def config(weight: str = "xnor", overrides: dict[str, Any] | None = None) -> dl.BinaryConfig:
    # Activations as they are, since an activation whose layers are all float has no companion in a rebuilt network.
    return dl.BinaryConfig(kernel="2x2_v1", weight=weight, companion="keep", overrides=overrides or {})


def accuracy(model: nn.Module, batches: Batches) -> float:
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(images).argmax(-1) == labels for images, labels in batches])
    return float(right.double().mean())


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return float_network()


@pytest.fixture(scope="module")
def batches() -> Batches:
    return labelled(3, seed=2)


def binarized(network: nn.Module, **kwargs: Any) -> nn.Module:
    model = copy.deepcopy(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a binarizer behind a ReLU
        dl.binarize_(model, config(**kwargs), (2, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("recalibrate", [False, True], ids=["as they are", "recalibrated"])
@pytest.mark.parametrize("weight", ["xnor", *(pytest.param(w, marks=pytest.mark.slow) for w in ("learned", "recu"))])
def test_numbers_are_those_of_networks_built_with_overrides(
    network: nn.Module, batches: Batches, weight: str, recalibrate: bool
) -> None:
    recalibration = [images for images, _ in labelled(2, seed=3)] if recalibrate else None

    def rebuilt(overrides: dict[str, Any]) -> float:
        rebuilt = binarized(network, weight=weight, overrides=overrides)
        for name, layer in binary_layers(
            rebuilt
        ).items():  # surgery may see other sizes of inputs where others are float
            layer.activation.unit.copy_(model.get_submodule(name).activation.unit)
        return measured(rebuilt)

    def measured(model: nn.Module) -> float:
        if recalibration is not None:
            recalibrate_batch_norm_(model, recalibration)
        return accuracy(model, batches)

    model = binarized(network, weight=weight)
    names = list(binary_layers(model))
    found = measure_sensitivity(model, batches, recalibration)
    assert [row.layer for row in found.rows] == names
    assert found.images == 3 * 16
    assert found.binary_accuracy == rebuilt({})
    for row in found.rows:
        assert row.without == rebuilt({row.layer: None})
        assert row.alone == rebuilt({name: None for name in names if name != row.layer})
        assert row.loss == pytest.approx(found.float_accuracy - row.alone)
        assert row.gain == pytest.approx(row.without - found.binary_accuracy)
        assert row.weights == model.get_submodule(row.layer).weight.numel()
    dl.set_stage_(model, "float")
    if recalibration is not None:
        recalibrate_batch_norm_(model, recalibration)
    assert found.float_accuracy == accuracy(model, batches)
    assert len({row.without for row in found.rows} | {row.alone for row in found.rows}) > 2, "nothing was measured"


def test_errors_are_those_of_a_paired_difference() -> None:
    """A network of one binary layer by hand, where float and binary are right on different images."""
    layer = dl.BinaryLinear(2, 2, bias=False, activation=dl.Sign(layout="NHWC"), weight="sign")
    layer.weight.data = torch.tensor([[0.1, 1.0], [1.0, 0.1]])
    model = nn.Sequential(layer)
    images = torch.tensor([[1.0, 3.0], [3.0, 1.0], [-1.0, 3.0], [3.0, -1.0]])
    with torch.no_grad():
        as_float = (images @ layer.weight.T).argmax(-1)
        as_binary = (images.sign() @ layer.weight.sign().T).argmax(-1)
    labels = torch.tensor([0, 1, 0, 0])
    differences = (as_float == labels).double() - (as_binary == labels).double()
    assert differences.abs().sum() > 0
    (row,) = measure_sensitivity(model, [(images, labels)]).rows
    assert row.loss == pytest.approx(float(differences.mean()))
    assert row.loss_error == pytest.approx(float(differences.std() / 4**0.5))
    assert (row.gain, row.gain_error) == (pytest.approx(row.loss), pytest.approx(row.loss_error))


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(network: nn.Module, batches: Batches, fails: bool) -> None:
    model = binarized(network, weight="learned").train()
    layers = binary_layers(model)
    first, second, *_ = layers.values()
    first.set_stage("activations")
    second.weight_binarizer.alpha.data.mul_(3)  # type: ignore[operator, union-attr]  # as training would
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    recalibration = [images for images, _ in labelled(1, seed=3)]
    if fails:
        with pytest.raises(RuntimeError):
            measure_sensitivity(model, [batches[0], (torch.zeros(1, 5, 32, 32), torch.zeros(1).long())], recalibration)
    else:
        measure_sensitivity(model, batches, recalibration)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key
    assert [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scale_that_was_trained_is_measured_as_it_is(network: nn.Module, batches: Batches) -> None:
    model = binarized(network, weight="learned")
    for layer in binary_layers(model).values():
        layer.weight_binarizer.alpha.data.copy_(torch.rand_like(layer.weight_binarizer.alpha))  # type: ignore[arg-type, union-attr, operator]
    expected = accuracy(model, batches)
    assert measure_sensitivity(model, batches).binary_accuracy == expected


def test_padding_of_an_evaluation_sampler_counts_nowhere(network: nn.Module, batches: Batches) -> None:
    model = binarized(network)
    images, labels = batches[0]
    padded = [(images, torch.where(torch.arange(16) < 10, labels, -100)), *batches[1:]]
    found = measure_sensitivity(model, padded)
    assert found.images == 10 + 2 * 16
    assert found == measure_sensitivity(model, [(images[:10], labels[:10]), *batches[1:]])


def test_a_compiled_model_is_not_compiled_for_each_measurement(network: nn.Module, batches: Batches) -> None:
    model = binarized(network)
    expected = measure_sensitivity(model, batches[:1])
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph

    model.compile(backend=backend)
    assert measure_sensitivity(model, batches[:1]) == expected
    assert not calls


def test_progress_counts_every_pass(network: nn.Module, batches: Batches) -> None:
    model = binarized(network)
    seen: list[tuple[int, int]] = []
    measure_sensitivity(model, batches[:1], progress=lambda done, total: seen.append((done, total)))
    total = 2 * len(binary_layers(model)) + 2
    assert seen == [(done, total) for done in range(1, total + 1)]


# What is made of the numbers


@pytest.fixture(scope="module")
def found(network: nn.Module, batches: Batches) -> Sensitivity:
    return measure_sensitivity(binarized(network), batches)


@pytest.mark.parametrize("by", ["loss", "gain"])
def test_overrides_leave_the_most_sensitive_layers_float(found: Sensitivity, network: nn.Module, by: Any) -> None:
    kept = yaml.safe_load(found.overrides_yaml(2, by))["overrides"]
    clear = [getattr(row, by) for row in found.rows if getattr(row, by) > getattr(row, f"{by}_error")]
    worst = sorted(clear, reverse=True)[:2]
    assert sorted((getattr(row, by) for row in found.rows if row.layer in kept), reverse=True) == worst
    names = {row.layer for row in found.rows}
    assert set(binary_layers(binarized(network, overrides=kept))) == names - set(kept)


def by_hand(float_accuracy: float = 0.9, binary_accuracy: float = 0.5) -> Sensitivity:
    """Layers whose loss and gain are, of one standard error: a 4 and 0, b 0.5 and 3, c -2 and 1.5, d 2 and 1."""
    figures = {"a": (0.4, 0.0), "b": (0.05, 0.3), "c": (-0.2, 0.15), "d": (0.2, 0.1)}
    rows = tuple(
        LayerSensitivity(name, 8, float_accuracy - loss, loss, 0.1, binary_accuracy + gain, gain, 0.1)
        for name, (loss, gain) in figures.items()
    )
    return Sensitivity(rows, 100, float_accuracy, binary_accuracy, "")


def test_only_layers_above_one_standard_error_are_overridden() -> None:
    assert by_hand().overrides(4, "loss") == {"a": None, "d": None}
    assert by_hand().overrides(1, "loss") == {"a": None}
    assert by_hand().overrides(4, "gain") == {"b": None, "c": None}
    still = dataclasses.replace(by_hand(), rows=by_hand().rows[1:2])
    assert yaml.safe_load(still.overrides_yaml(1, "loss")) == {"overrides": {}}


def test_gain_ranks_where_the_float_network_is_the_worse_one() -> None:
    assert [row.layer for row in by_hand().ranked()] == ["a", "d", "b", "c"]
    worse = by_hand(float_accuracy=0.4)
    assert [row.layer for row in worse.ranked()] == ["b", "c", "d", "a"]
    assert worse.overrides(1) == {"b": None}
    assert worse.overrides(1, "loss") == {"a": None}


def test_a_network_without_batch_norm_has_nothing_to_recalibrate(batches: Batches) -> None:
    layer = dl.BinaryLinear(8, CLASSES, activation=dl.Sign(layout="NHWC"), weight="sign")
    model = nn.Sequential(nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten(), nn.Linear(24, 8), layer)
    found = measure_sensitivity(model, batches, [images for images, _ in batches])
    assert found == measure_sensitivity(model, batches)
    assert found.batch_norm == "there is none with running statistics"
    assert not any("statistics" in note for note in found.notes)


def test_overrides_of_the_configuration_stay_in_front() -> None:
    block = yaml.safe_load(by_hand().overrides_yaml(1, others={"layer4.*": {"weight": "sign"}}))["overrides"]
    assert list(block) == ["layer4.*", "a"]
    assert block["layer4.*"] == {"weight": "sign"}


def test_table_is_sorted_and_fits_eighty_columns(found: Sensitivity) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(found.table())
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    names = [row.layer for row in found.rows]
    shown = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in names]
    assert shown == [row.layer for row in found.ranked()]
    assert any("the statistics that the model has" in line for line in lines)


def test_json_csv_and_picture_hold_every_layer(found: Sensitivity, tmp_path: Path) -> None:
    stored = json.loads(found.to_json())
    assert [row["layer"] for row in stored["rows"]] == [row.layer for row in found.rows]
    assert stored["binary_accuracy"] == found.binary_accuracy
    found.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row.loss for row in found.rows]
    found.draw(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5_000


def test_notes_say_what_limits_the_numbers(network: nn.Module, batches: Batches) -> None:
    model = binarized(network)
    with torch.no_grad():
        for layer in binary_layers(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight).pow(8))  # signs as they were, a poor float network
    found = measure_sensitivity(model, batches)
    assert any("recalibrate" in note for note in found.notes)
    assert any("rank by gain" in note for note in found.notes) == (found.float_accuracy < found.binary_accuracy)


# Batches in memory


class Loader:
    """Counts how often it is read."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.reads += 1
            yield batch


def test_batches_that_fit_are_read_once(batches: Batches) -> None:
    loader = Loader(batches)
    checked: list[Any] = []
    given, held = hold_batches(loader, limit=2, check=lambda batch: checked.append(batch) or batch)
    assert held
    assert [len(list(given)) for _ in range(3)] == [2, 2, 2]
    assert (loader.reads, len(checked)) == (2, 2)


@pytest.mark.parametrize("memory", [2e9, 1], ids=["held", "reread"])
def test_batches_are_held_as_bytes_and_converted_in_every_pass(memory: float) -> None:
    images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    loader = Loader([(images, torch.tensor([0, 1]))])
    checked: list[torch.dtype] = []

    def check(batch: Any) -> Any:
        checked.append(batch[0].dtype)
        return batch

    given, _ = hold_batches(loader, memory=memory, check=check, convert=lambda batch: (batch[0] / 255, batch[1]))
    for _ in range(2):
        ((converted, _),) = given
        assert torch.equal(converted, images / 255)
    assert set(checked) == {torch.uint8}


def test_batches_that_do_not_fit_are_read_in_every_pass(batches: Batches) -> None:
    loader = Loader(batches)
    given, held = hold_batches(loader, limit=2, memory=1)
    assert not held
    loader.reads = 0
    assert [len(list(given)) for _ in range(3)] == [2, 2, 2]
    assert loader.reads == 6


# Failures


def test_a_float_model_is_refused(batches: Batches) -> None:
    with pytest.raises(ValueError, match=r"has no binary layer; call binarize_\(model\) first"):
        measure_sensitivity(float_network(), batches)


def test_batches_that_are_read_once_are_refused(network: nn.Module, batches: Batches) -> None:
    with pytest.raises(ValueError, match="read only once; give a list"):
        measure_sensitivity(binarized(network), iter(batches))


def test_no_images_are_refused(network: nn.Module, batches: Batches) -> None:
    for empty in ([], [(batches[0][0], torch.full((16,), -100))]):
        with pytest.raises(ValueError, match="no images to measure on"):
            measure_sensitivity(binarized(network), empty)


def test_batches_that_change_are_refused(network: nn.Module, batches: Batches) -> None:
    class Shrinking:
        left = 3

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            Shrinking.left = max(Shrinking.left - 1, 1)
            return iter(batches[: Shrinking.left])

    with pytest.raises(ValueError, match="one pass saw 32 images, another 16"):
        measure_sensitivity(binarized(network), Shrinking())


def test_logits_that_are_not_finite_are_named(network: nn.Module, batches: Batches) -> None:
    model = binarized(network)
    with torch.no_grad():
        model.fc.bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite with every layer float"):
        measure_sensitivity(model, batches)


def test_more_float_layers_than_there_are_is_refused(found: Sensitivity) -> None:
    with pytest.raises(ValueError, match=rf"keep is 99, but there are {len(found.rows)} binary layers"):
        found.overrides(99)
    with pytest.raises(ValueError, match="unknown order 'size': use one of loss, gain"):
        found.ranked("size")  # type: ignore[arg-type]
