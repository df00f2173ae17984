"""Real-valued shortcuts: where they end, where there is none, and what happens when others replace norms."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.surgery import reattach_shortcuts_

CONFIG = dl.BinaryConfig(shortcut="bireal")


class Net(nn.Module):
    """A stem, a block, a head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 1), block, nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


def reasons(model: nn.Module) -> dict[str, str]:
    report = dl.binarize_(model, CONFIG, torch.randn(2, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    return {row.name: row.reason for row in report.binary}


def test_without_a_norm_it_ends_behind_the_layer() -> None:
    model = Net(nn.Conv2d(8, 8, 3, padding=1))
    plain = copy.deepcopy(model)
    assert reasons(model)["block"].endswith(", shortcut (no norm follows)")
    dl.binarize_(plain, example_input=torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    stream = plain.stem(x)
    assert torch.equal(model(x), plain.head(plain.block(stream) + stream))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))


def test_a_norm_of_several_layers_ends_no_shortcut() -> None:
    found = reasons(Net(SharedNorm()))
    assert all(reason.endswith("no shortcut: other layers share the norm that follows") for reason in found.values())


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.group_norm(self.a(x), 2)) * 3


def test_a_functional_norm_is_no_place_to_end() -> None:
    model = Net(FunctionalNorm())
    assert reasons(model)["block.a"].endswith("shortcut (no norm follows)")
    assert not model.block._forward_hooks
    assert not model._forward_hooks


class Rearranged(nn.Module):
    """A norm of channels last behind a convolution of channels first; 8 channels of 8 x 8 pixels, so that no shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Turns(nn.Module):
    """A norm that gives channels last of channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), TurningNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).permute(0, 3, 1, 2)


class TurningNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("block", [Rearranged, Turns])
@pytest.mark.parametrize("size", [8, 6])
def test_behind_a_permutation_no_shortcut_ends(block: type[nn.Module], size: int) -> None:
    model = Net(block())
    report = dl.binarize_(model, CONFIG, torch.randn(2, 3, size, size))
    assert report.binary[0].reason.endswith("no shortcut: in the norm that follows its output is arranged otherwise")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_norm_that_permutes_within_ends_a_shortcut() -> None:
    model = Net(nn.Sequential(nn.Conv2d(8, 8, 1), LayerNorm2d(8)))
    assert reasons(model)["block.0"].endswith(", shortcut")
    x = torch.randn(2, 3, 8, 8)
    stream = model.stem(x)
    plain = copy.deepcopy(model)
    dl.unbinarize_(plain)
    dl.binarize_(plain, example_input=torch.randn(2, 3, 8, 8))
    assert torch.equal(model.block(stream), plain.block(stream) + stream)


def test_threads_share_a_network_with_shortcuts() -> None:
    model = Net(nn.Sequential(nn.Conv2d(8, 8, 1), Meeting(8))).eval()
    reasons(model)
    model.block[1].barrier = threading.Barrier(2)
    inputs = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        together = list(pool.map(model, inputs, timeout=30))
    model.block[1].barrier = None
    assert all(torch.equal(model(x), y) for x, y in zip(inputs, together, strict=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs[0]), together[0])


class Meeting(nn.BatchNorm2d):
    """Waits until another thread has come as far."""

    barrier: threading.Barrier | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.barrier is not None:
            self.barrier.wait(timeout=20)
        return super().forward(x)


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


def test_a_shortcut_around_an_activation_too_is_not_added_again() -> None:
    assert reasons(Net(Activated()))["block.conv"].endswith("has a shortcut of its own")


def test_synchronised_batch_norms_keep_the_shortcuts() -> None:
    model = timm.create_model("test_resnet").eval()
    dl.binarize_(model, dl.BinaryConfig(policy="reactnet"))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    lost = converted(x)
    assert not torch.equal(lost, expected)
    converted(x)
    with pytest.raises(RuntimeError, match=r"call design_lightning\.surgery\.reattach_shortcuts_"):
        converted(x)
    reattach_shortcuts_(converted)
    assert torch.equal(converted(x), expected)
    reattach_shortcuts_(converted)
    assert torch.equal(converted(x), expected)
    dl.unbinarize_(converted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in converted.modules())


def test_an_interrupted_forward_is_no_lost_shortcut() -> None:
    model = Net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    reasons(model)
    handle = model.block[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(2, 3, 8, 8))
    handle.remove()
    model(torch.randn(2, 3, 8, 8))
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50x1_bit", "test_nfnet"])
def test_average_pools_in_front_of_every_kind_of_projection(name: str) -> None:
    model = timm.create_model(name).eval()
    report = dl.binarize_(model, dl.BinaryConfig(downsample="avgpool"), (2, 3, 64, 64))
    pooled = [row for row in report.rows if row.after.startswith("AveragePooled")]
    strided = [n for n, m in model.named_modules() if "downsample" in n and getattr(m, "stride", 1) == (2, 2)]
    assert strided == []
    assert bool(pooled) == (name != "test_nfnet")  # which has average pools of its own
    model(torch.randn(2, 3, 64, 64))
