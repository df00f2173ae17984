"""`PerGroupOptimizer`: two optimizers that are one to schedulers, precision and checkpoints."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.cli import main
from design_lightning.training import Bop, CosineDecay, DesignClassifier, PerGroupOptimizer, parameter_groups

SMALL: dict[str, Any] = {
    "backbone": "resnet20_cifar",
    "backbone_args": {"width": 0.25},
    "num_classes": 10,
    "input_size": (1, 16, 16),
}

Make = Callable[[Any], Optimizer]
PAIRS: dict[str, tuple[Make, Make]] = {
    "adam, sgd": (
        lambda groups: torch.optim.Adam(groups, lr=1e-2),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "bop, adam": (
        lambda groups: Bop(groups, lr=0.1, threshold=1e-6),
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
    ),
    "adagrad, rmsprop": (  # the first has a state before its first step
        lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
        lambda groups: torch.optim.RMSprop(groups, lr=1e-3),
    ),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
    )
    dl.binarize_(model, dl.BinaryConfig(kernel="2x2_v1"), example_input=(2, 1, 8, 8))
    return model


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    other = second.state_dict()
    for key, value in first.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("pair", PAIRS)
def test_steps_are_those_of_two_optimizers_side_by_side(pair: str) -> None:
    latent, rest = PAIRS[pair]
    one, two = network(), network()
    optimizer = PerGroupOptimizer(parameter_groups(one), latent, rest)
    groups = parameter_groups(two)
    optimizers = latent(groups[:1]), rest(groups[1:])
    assert groups[0]["params"]
    schedulers = [CosineDecay(each, total_steps=8) for each in (optimizer, *optimizers)]
    for i in range(8):
        step(one, optimizer, i)
        for each in optimizers:
            each.zero_grad()
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        nn.functional.cross_entropy(two(images), torch.tensor([0, 1, 2, 0])).backward()
        for each in optimizers:
            each.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_equal(one, two)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for each in optimizers for group in each.param_groups]


def test_groups_are_the_same_dicts_with_the_settings_of_their_optimizer() -> None:
    groups = parameter_groups(network(), latent_weight_decay=0.0)
    optimizer = PerGroupOptimizer(groups, *PAIRS["adam, sgd"])
    assert all(mine is given for mine, given in zip(optimizer.param_groups, groups, strict=True))
    assert [group["name"] for group in optimizer.param_groups] == ["latent", "decay", "no_decay"]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1, 0.0]
    assert ["momentum" in group for group in optimizer.param_groups] == [False, True, True]
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.latent.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("pair", PAIRS)
def test_state_goes_on_where_it_was(tmp_path: Path, pair: str) -> None:
    one = network()
    optimizer = PerGroupOptimizer(parameter_groups(one), *PAIRS[pair])
    for i in range(3):
        step(one, optimizer, i)
    for group in optimizer.param_groups:
        group["lr"] /= 2
    two = network()
    again = PerGroupOptimizer(parameter_groups(two), *PAIRS[pair])
    two.load_state_dict(one.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(stored)
    for i in range(3, 6):
        step(one, optimizer, i)
        step(two, again, i)
    assert_equal(one, two)
    for group, other in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
    again.param_groups[1]["weight_decay"] = 0.75
    assert again.rest.param_groups[0]["weight_decay"] == 0.75


def test_state_dict_is_that_of_any_optimizer() -> None:
    model = network()
    optimizer = PerGroupOptimizer(parameter_groups(model), *PAIRS["adam, sgd"])
    step(model, optimizer, 0)
    stored = optimizer.state_dict()
    assert stored.keys() == {"state", "param_groups"}
    indices = [index for group in stored["param_groups"] for index in group["params"]]
    assert indices == list(range(len(list(model.parameters()))))
    assert {"exp_avg", "exp_avg_sq", "step"} == stored["state"][0].keys()
    assert stored["state"][indices[-1]].keys() == {"momentum_buffer"}


def test_a_copy_steps_on_its_own() -> None:
    model = network()
    optimizer = PerGroupOptimizer(parameter_groups(model), *PAIRS["adam, sgd"])
    step(model, optimizer, 0)
    twin, other = copy.deepcopy((model, optimizer))
    assert other.latent.param_groups[0] is other.param_groups[0]
    for i in range(1, 3):
        step(model, optimizer, i)
        step(twin, other, i)
    assert_equal(model, twin)


def test_closure_runs_once() -> None:
    model = network()
    optimizer = PerGroupOptimizer(parameter_groups(model), *PAIRS["adam, sgd"])
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = model(torch.ones(2, 1, 8, 8)).square().sum()
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), Tensor)
    assert calls == [True]


def test_what_has_no_latent_group_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"takes the groups of parameter_groups\(model\), one of them named 'latent'"):
        PerGroupOptimizer(model.parameters(), *PAIRS["adam, sgd"])  # type: ignore[arg-type]
    optimizer = PerGroupOptimizer(parameter_groups(network()), *PAIRS["adam, sgd"])
    with pytest.raises(ValueError, match="group 'more' cannot be added later"):
        optimizer.add_param_group({"name": "more", "params": list(model.parameters())})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_decay_that_bop_does_not_have_is_refused(tmp_path: Path) -> None:
    latent, rest = PAIRS["bop, adam"]
    model = DesignClassifier(
        **SMALL, latent_weight_decay=0.1, optimizer=lambda groups: PerGroupOptimizer(groups, latent, rest)
    )
    with pytest.raises(ValueError, match="Bop has no weight decay"):
        trainer(tmp_path).fit(model, batches())


def trainer(folder: Path, **arguments: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return lightning.Trainer(default_root_dir=folder, **{**quiet, **arguments})


def batches() -> DataLoader[Any]:
    images = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(16) % 10), batch_size=4)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
        {"precision": "bf16-mixed"},
    ],
)
@pytest.mark.parametrize("pair", ["adam, sgd", "bop, adam"])
def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, pair: str, arguments: dict[str, Any]
) -> None:
    def make() -> DesignClassifier:
        torch.manual_seed(0)
        latent, rest = PAIRS[pair]
        return DesignClassifier(
            **SMALL, warmup_steps=2, optimizer=lambda groups: PerGroupOptimizer(groups, latent, rest)
        )

    whole = make()
    trainer(tmp_path, max_epochs=4, **arguments).fit(whole, batches())

    class StopAfterTwo(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    first = trainer(tmp_path, max_epochs=4, callbacks=[StopAfterTwo()], **arguments)
    first.fit(make(), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    trainer(tmp_path, max_epochs=4, **arguments).fit(
        resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert_equal(whole, resumed)
    assert not torch.equal(whole.backbone.conv1.weight, make().backbone.conv1.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("latent", "expected"),
    [
        ({"class_path": "Adam", "init_args": {"lr": 0.01}}, "betas"),
        ({"class_path": "Bop", "init_args": {"lr": 0.01, "threshold": 1e-6}}, "threshold"),
    ],
)
def test_optimizers_of_a_yaml_step_their_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latent: dict[str, Any], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "accelerator": "cpu"},
        "model": {
            "init_args": {
                "backbone_args": {"width": 0.125},
                "scheduler": None,
                "warmup_epochs": 0,
                "optimizer": {
                    "class_path": "PerGroupOptimizer",
                    "init_args": {
                        "latent": latent,
                        "rest": {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.5}},
                    },
                },
            }
        },
        "data": {"init_args": {"batch_size": 4}},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "quickstart", "--config", "mine.yaml"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    (optimizer,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    groups = optimizer["param_groups"]
    assert [group["name"] for group in groups] == ["latent", "decay", "no_decay"]
    assert [group["lr"] for group in groups] == [0.01, 0.1, 0.1]
    assert [expected in group for group in groups] == [True, False, False]
    (saved,) = tmp_path.rglob("config.yaml")
    main(["fit", "--config", str(saved), "--trainer.fast_dev_run", "true"])
