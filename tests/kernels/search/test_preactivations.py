"""A search on the pre-activations of a model in place of simulated maps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from design_lightning.kernels.search import Preactivations, SearchConfig, search_kernels, search_per_unit

CONFIG = SearchConfig(levels="published", min_share=0.001)


class Net(nn.Module):
    """Two layers of which the second sees smaller maps, a third that is not called, and one that sees no maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Conv2d(4, 5, 3)
        self.idle, self.last = nn.Conv2d(3, 3, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).mean((-2, -1)))


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(12, 3, 9, 8, generator=torch.Generator().manual_seed(0)).split(5))


def collected(batches: list[Tensor], **options: Any) -> Preactivations:
    net = Net()
    layers = {name: getattr(net, name) for name in ("first", "second", "idle", "last")}
    return Preactivations(net, layers, batches, 12, CONFIG.alphabet.peak, **options)


def test_layers_are_units_and_the_others_are_named(batches: list[Tensor]) -> None:
    maps = collected(batches)
    assert maps.units == ["first", "second"]
    assert maps.left_out == {"idle": "it is not called", "last": "its input has no places in an image"}
    maps = collected(batches, least=(6, 6))
    assert maps.units == ["first"]
    assert maps.left_out["second"] == "its maps are 5x4, smaller than the kernel"


def test_the_maps_are_what_the_layers_get(batches: list[Tensor]) -> None:
    found = [batch for batch in collected(batches) if int(batch.units[0]) == 0]
    assert torch.cat([batch.values for batch in found]).equal(torch.cat(batches))
    assert torch.cat([batch.images for batch in found]).tolist() == list(range(12))
    assert found[0].reference.equal(batches[0].relu() / CONFIG.alphabet.peak)


def test_a_search_averages_over_layers_or_takes_each_alone(batches: list[Tensor]) -> None:
    net = Net()
    layers = {"first": net.first, "second": net.second}
    maps = Preactivations(net, layers, batches, 12, CONFIG.alphabet.peak)
    alone = search_per_unit(maps, CONFIG)
    assert list(alone) == ["first", "second"]
    mean = (alone["first"].values + alone["second"].values) / 2
    assert search_kernels(maps, CONFIG).values.numpy() == pytest.approx(mean.numpy(), rel=1e-5, abs=1e-6)
    assert alone["first"].shares != alone["second"].shares


def test_what_does_not_serve_is_named(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="no images for the model"):
        collected([])
    net = Net()
    with pytest.raises(ValueError, match="Net has no layer to design a kernel for: idle: it is not called"):
        Preactivations(net, {"idle": net.idle}, batches, 12, 1.0)
    with pytest.raises(ValueError, match=r"levels 'codes': maps of a model go with .* 'published' or 'exact'"):
        search_kernels(collected(batches), SearchConfig())
    with pytest.raises(ValueError, match=r"reference 'grey'"):
        search_kernels(collected(batches), SearchConfig(levels="published", reference="grey"))
    broken = [torch.full((5, 3, 9, 8), float("nan"))]
    with pytest.raises(ValueError, match="first: a map of image 0 or one after it is not finite"):
        search_kernels(collected(broken), CONFIG)
