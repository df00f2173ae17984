"""Gradient checkpointing changes what is kept, and nothing else."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.training import DesignClassifier, Distillation

SMALL: dict[str, Any] = {"backbone": "test_resnet", "num_classes": 10, "input_size": (3, 32, 32)}


def trained(folder: Path, backend: str | None = None, precision: Any = "32-true", **options: Any) -> DesignClassifier:
    torch.manual_seed(0)
    model = DesignClassifier(**SMALL, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **options)
    if backend is not None:
        model.backbone.compile(backend=backend)
    run = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = torch.randn(12, 3, 32, 32)
    run.fit(model, DataLoader(TensorDataset(images, torch.arange(12) % 10), batch_size=4))
    return model


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    other = second.state_dict()
    for key, value in first.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_and_statistics_are_those_of_training_without_it(tmp_path: Path, precision: str) -> None:
    expected = trained(tmp_path, precision=precision)
    model = trained(tmp_path, precision=precision, gradient_checkpointing=True)
    assert_equal(model, expected)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {3}  # type: ignore[arg-type]
    assert all(norm.track_running_stats for norm in norms)


def test_activations_are_computed_again(tmp_path: Path) -> None:
    counts: dict[bool, int] = {}
    for on in (False, True):
        model = DesignClassifier(**SMALL, gradient_checkpointing=on)
        calls: list[int] = []
        model.backbone.layer2[0].conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[union-attr,index]
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        counts[on] = len(calls)
    assert counts == {False: 1, True: 2}


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.slow
def test_attention_transfer_goes_with_it(tmp_path: Path, backend: str | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    teacher = DesignClassifier(**SMALL, binary=None)
    run = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    run.strategy.connect(teacher)
    run.save_checkpoint(tmp_path / "teacher.ckpt", weights_only=True)
    teach = Distillation(str(tmp_path / "teacher.ckpt"), weight=0.5, attention=1.0)
    expected = trained(tmp_path, distillation=teach)
    model = trained(tmp_path, backend=backend, distillation=teach, gradient_checkpointing=True)
    other = model.state_dict()
    for key, value in expected.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [("resnet20_cifar", "it has no set_grad_checkpointing"), ("dla34", "gradient checkpointing not supported")],
)
def test_networks_without_it_say_so(backbone: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot do gradient checkpointing \({reason}\)"):
        DesignClassifier(backbone, num_classes=10, binary=None, gradient_checkpointing=True)
