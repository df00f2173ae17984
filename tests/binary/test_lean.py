"""Float modules that keep less for the backward pass: what they compute, and their gradients, are torch's."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import design_lightning as dl
from design_lightning.binary import BinaryConv2d, Sign
from design_lightning.binary.lean import BatchNorm2d, MaxPool2d, Pointwise, make_lean_, make_plain_


def run(module: nn.Module, x: Tensor, call: Any = None) -> dict[str, Tensor]:
    """The output, the gradients, and what the module's buffers hold afterwards."""
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = (call or module)(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found, **{n: b.clone() for n, b in module.named_buffers()}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].equal(value), name
        assert ours[name].stride() == value.stride(), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": [3, 3], "stride": [2, 1], "padding": [1, 1]},
    ],
    ids=str,
)
def test_max_pool(settings: dict[str, Any], channels_last: bool) -> None:
    ours, theirs = MaxPool2d(**settings), nn.MaxPool2d(**settings)
    for size in ((5, 8, 9, 11), (2, 8, 12, 300)):
        x = torch.randn(size).relu()  # with ties
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        assert_same(run(ours, x), run(theirs, x))


def test_a_strided_pointwise_convolution() -> None:
    for bias in (True, False):
        theirs = nn.Conv2d(8, 6, 1, stride=2, bias=bias)
        ours = nn.Conv2d(8, 6, 1, stride=2, bias=bias)
        ours.load_state_dict(theirs.state_dict())
        make_lean_(ours)
        assert type(ours) is Pointwise
        x = torch.randn(3, 8, 9, 10)
        mine, its = run(ours, x), run(theirs, x)
        assert mine["output"].equal(its["output"])
        for name, value in its.items():
            torch.testing.assert_close(mine[name], value)


@pytest.mark.parametrize("weight", ["sign", "xnor", "learned", "recu", "irnet"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_norm_behind_a_binary_convolution(weight: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(8, 6, 3, padding=1, activation=Sign(estimator="ste"), weight=weight)
    if weight == "learned":
        with torch.no_grad():
            layer.weight_binarizer.alpha[:3] = torch.tensor([0.0, -0.3, 1e-30])  # type: ignore[index, operator]
    network = nn.Sequential(layer, nn.BatchNorm2d(6))
    twin = nn.Sequential(layer, nn.BatchNorm2d(6))
    make_lean_(network)
    assert type(network[1]) is BatchNorm2d
    x = torch.randn(4, 8, 7, 9)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert_same(run(network, x), run(twin, x))


@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_a_large_batch_norm_goes_back_in_slices(settings: dict[str, Any]) -> None:
    first = nn.Conv2d(4, 7, 1)
    network, twin = (nn.Sequential(first, nn.BatchNorm2d(7, **settings)) for _ in range(2))
    make_lean_(network)
    x = torch.randn(8, 4, 150, 150)
    assert network(x).grad_fn.name() == "_BatchNormBackward"
    twin(x)  # as often as the other: both move their statistics
    assert_same(run(network, x), run(twin, x))


def test_what_waits_for_the_backward_pass() -> None:
    layer = BinaryConv2d(8, 16, 3, padding=1, activation=Sign(estimator="ste"))
    network = nn.Sequential(layer, nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.Conv2d(16, 4, 1, stride=2))
    make_lean_(network)
    strided = network(torch.randn(4, 8, 16, 16)).grad_fn
    pool = strided.next_functions[0][0]
    norm = pool.next_functions[0][0]
    counts, *_ = norm._raw_saved_input.data
    assert (counts.dtype, counts.shape) == (torch.int16, (4, 16, 16, 16))
    assert [(t.dtype, t.shape) for t in pool.saved_tensors] == [(torch.uint8, (4, 16, 8, 8))]
    assert strided.saved_tensors[0].shape == (4, 16, 4, 4)


def test_another_reader_of_the_norm_is_not_taken_for_counts() -> None:
    """Between the convolution and the norm somebody changed the numbers, or they were none of a convolution."""
    layer = BinaryConv2d(8, 6, 3, activation=Sign(estimator="ste"))
    x = torch.randn(4, 8, 7, 7)
    for between in (nn.Dropout(0.5), nn.Hardtanh(inplace=True), nn.Sequential(nn.Identity(), nn.LeakyReLU(0.3))):
        networks = [nn.Sequential(layer, between, nn.BatchNorm2d(6)) for _ in range(2)]
        make_lean_(networks[0])
        results = []
        for network in networks:
            torch.manual_seed(1)
            results.append(run(network, x))
        assert_same(*results)
    norm = nn.BatchNorm2d(8)
    lean = nn.BatchNorm2d(8)
    make_lean_(lean)
    assert_same(run(lean, x), run(norm, x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_a_gradient_it_is_torch_s(mode: Any) -> None:
    network = nn.Sequential(BinaryConv2d(8, 6, 3, activation=Sign()), nn.BatchNorm2d(6), nn.MaxPool2d(2)).eval()
    x = torch.randn(2, 8, 8, 8)
    with mode():
        expected = network(x)
    make_lean_(network)
    with mode():
        assert network(x).equal(expected)


def test_gradient_checkpointing_decides_what_is_kept() -> None:
    layer = BinaryConv2d(8, 6, 3, padding=1, activation=Sign(estimator="ste"))
    network = nn.Sequential(layer, nn.BatchNorm2d(6, momentum=None), nn.MaxPool2d(2))
    x = torch.randn(4, 8, 8, 8)
    expected = run(network, x)
    make_lean_(network)
    for reentrant in (True, False):
        actual = run(network, x, lambda x, r=reentrant: checkpoint(network, x, use_reentrant=r))
        assert actual["input"].equal(expected["input"])


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"])
def test_a_whole_network_trains_alike(name: str) -> None:
    """Both networks keep bits in their binary layers; one has torch's own float modules."""
    x = torch.randn(4, 3, 64, 64)
    results = []
    for lean in (True, False):
        torch.manual_seed(0)
        model = timm.create_model(name)
        dl.binarize_(model, dl.BinaryConfig(estimator="ste"))
        if not lean:
            make_plain_(model)
        results.append(run(model.train(), x))
    for key, value in results[1].items():
        # The strided convolution adds in another order.
        torch.testing.assert_close(results[0][key], value, rtol=0, atol=1e-4 * float(value.abs().max()))


def test_surgery_makes_lean_and_takes_it_back() -> None:
    model = timm.create_model("resnet18")
    classes = [type(module) for module in model.modules()]
    dl.binarize_(model)
    kinds = {type(module) for module in model.modules()}
    assert {BatchNorm2d, MaxPool2d, Pointwise} <= kinds
    assert nn.BatchNorm2d not in kinds
    dl.unbinarize_(model)
    assert [type(module) for module in model.modules()] == classes
    assert all("keeps" not in vars(module) for module in model.modules())
