import re
from collections.abc import Callable

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.binary import BinaryLayer
from design_lightning.callbacks import BinarySummary
from design_lightning.surgery import BinaryConfig, binarize_
from design_lightning.training import DesignClassifier

ROW = re.compile(r"^(?P<part>\S+)\s+(?P<type>\S+)\s+(?:(?P<binary>\d+)/(?P<layers>\d+)\s+)?(?P<numbers>[\d,. ]+)$")


def images(size: int = 32, channels: int = 3) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(2, channels, size, size), torch.tensor([0, 1])), batch_size=2)


def rows(text: str) -> dict[str, tuple[int, int, list[float]]]:
    """From a part to its binary layers, its layers, and the numbers behind them."""
    found = {}
    for match in filter(None, map(ROW.match, text.splitlines())):
        numbers = [float(number.replace(",", "")) for number in match["numbers"].split()]
        found[match["part"]] = (int(match["binary"] or 0), int(match["layers"] or 0), numbers)
    return found


def counted(module: nn.Module) -> tuple[int, int, list[float]]:
    """The same from the modules themselves."""
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    binary = [m for m in layers if isinstance(m, BinaryLayer)]
    one_bit = sum(m.weight.numel() for m in binary)
    return len(binary), len(layers), [one_bit, sum(p.numel() for p in module.parameters()) - one_bit]


def operations(network: nn.Module, size: int) -> tuple[float, float]:
    """Millions of binary and of float multiply-accumulates, from the shapes of a forward pass."""
    found = {True: 0, False: 0}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        found[isinstance(module, BinaryLayer)] += module.weight.numel() * output[0, 0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    network.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return found[True] / 1e6, found[False] / 1e6


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(
    ("backbone", "binary", "size"),
    [
        ("resnet18", BinaryConfig(companion="rprelu", shortcut="bireal"), 64),
        ("vgg_small", BinaryConfig(weight="recu"), 32),
        ("mobilenetv3_small_050", BinaryConfig(), 64),
        ("resnet20_cifar", None, 32),
    ],
)
def test_numbers_are_those_of_the_modules_and_fit_eighty_columns(
    backbone: str,
    binary: BinaryConfig | None,
    size: int,
    trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = DesignClassifier(backbone, num_classes=10, binary=binary, input_size=(3, size, size))
    trainer(BinarySummary()).fit(module, images(size))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    shown = rows(text)
    parts = {name: part for name, part in module.backbone.named_children() if any(True for _ in part.parameters())}
    assert shown.keys() == {*parts, "all"}
    for name, part in {**parts, "all": module.backbone}.items():
        binary_layers, layers, numbers = shown[name]
        assert (binary_layers, layers, numbers[:2]) == counted(part), name
    if binary is not None:
        assert shown["all"][2][2:] == pytest.approx(operations(module.backbone, size), abs=0.06)


def test_deeper_parts_add_up_to_the_same_total(
    trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    module = DesignClassifier("resnet18_cifar", num_classes=10, backbone_args={"width": 0.25})
    trainer(BinarySummary(max_depth=3)).fit(module, images())
    *parts, total = rows(capsys.readouterr().out).values()
    assert len(parts) > 20
    for column in range(2):
        assert (
            sum(numbers[column] for _, _, numbers in parts) == total[2][column] == counted(module.backbone)[2][column]
        )


def test_a_plain_module_is_shown_with_its_own_parameters_too(
    plain: Callable[[nn.Module], LightningModule],
    trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = timm.create_model("resnet18", num_classes=2)
    binarize_(network)
    module = plain(network)
    module.temperature = nn.Parameter(torch.ones(3))
    trainer(BinarySummary()).fit(module, images(64))
    shown = rows(capsys.readouterr().out)
    assert shown["network"] == counted(network)
    assert shown["(own)"][2] == [0, 3]
    assert shown["all"][2] == counted(module)[2]


def test_a_lazy_layer_counts_as_nothing_until_its_shape_is_known(
    plain: Callable[[nn.Module], LightningModule],
    trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    trainer(BinarySummary()).fit(plain(network), images())
    assert rows(capsys.readouterr().out)["all"][2] == [0, 3 * 4 * 9 + 4]


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    run_with_yaml("fit", "BinarySummary", "--trainer.fast_dev_run", "true", every_layer=True)
    text = capsys.readouterr().out
    assert "why" in text.splitlines()[0]
    assert ".0.conv1" in text
