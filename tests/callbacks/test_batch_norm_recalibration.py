import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from design_lightning.binary import BinaryConv2d, DeSign
from design_lightning.callbacks import BatchNormRecalibration
from design_lightning.data import FashionMNISTSubset
from design_lightning.training import DesignClassifier
from design_lightning.training.batch_norm import recalibrate_batch_norm_, running_batch_norms


class Small(LightningModule):
    """Somebody's module with batch norm, dropout and a binary layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            BinaryConv2d(4, 8, 3, activation=DeSign("2x2_v1")),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/mean", self(batch[0]).mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/mean", self(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 + 1
LABELS = torch.arange(24) % 2


def data(**options: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(IMAGES, LABELS), **{"batch_size": 4, **options})


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in module.named_buffers() if n.endswith(("running_mean", "running_var"))}


def expected(module: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    model = copy.deepcopy(module)
    recalibrate_batch_norm_(model, images)
    return statistics(model)


class Probe(Callback):
    """Keeps a copy of the module as it is evaluated, and as training ends."""

    def __init__(self) -> None:
        self.copies: list[LightningModule] = []

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert not any(module.training for module in pl_module.modules())
        self.copies.append(copy.deepcopy(pl_module))

    on_validation_epoch_start = keep
    on_test_epoch_start = keep

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.copies.append(copy.deepcopy(pl_module))


@pytest.mark.parametrize("batches", [1, 3, 50])
def test_statistics_before_validation_are_those_of_the_training_batches(
    batches: int, trainer: Callable[..., Trainer]
) -> None:
    probe = Probe()
    callbacks = (BatchNormRecalibration(batches), probe)
    trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0).fit(Small(), data(), data())
    assert len(probe.copies) == 3
    for module in probe.copies[:2]:
        torch.testing.assert_close(statistics(module), expected(module, list(IMAGES.split(4))[:batches]))


def test_each_of_several_validations_in_an_epoch_has_new_statistics(trainer: Callable[..., Trainer]) -> None:
    probe = Probe()
    options = {"val_check_interval": 2, "num_sanity_val_steps": 0}
    trainer(BatchNormRecalibration(2), probe, **options).fit(Small(), data(), data())
    validated = probe.copies[:3]
    for module in validated:
        torch.testing.assert_close(statistics(module), expected(module, list(IMAGES.split(4))[:2]))
    assert not torch.equal(
        statistics(validated[0])["network.3.running_mean"], statistics(validated[1])["network.3.running_mean"]
    )


def test_the_sanity_check_changes_nothing(trainer: Callable[..., Trainer]) -> None:
    probe = Probe()
    trainer(BatchNormRecalibration(2), probe, num_sanity_val_steps=1).fit(Small(), data(), data())
    assert torch.equal(statistics(probe.copies[0])["network.1.running_mean"], torch.zeros(4))


def test_a_checkpoint_after_validation_holds_them(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    model = Small()
    trainer(BatchNormRecalibration(3), enable_checkpointing=True).fit(model, data(), data())
    (path,) = tmp_path.rglob("*.ckpt")
    stored = Small()
    stored.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    torch.testing.assert_close(statistics(stored), expected(stored, list(IMAGES.split(4))[:3]))
    trainer(BatchNormRecalibration(3), max_epochs=2).fit(Small(), data(), data(), ckpt_path=path)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Noise on its images from every generator that there is."""

    def __init__(self) -> None:
        self.own = torch.Generator().manual_seed(5)
        self.transforms = [np.random.default_rng(5), random.Random(5), np.random.RandomState(5)]

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        default, python, legacy = self.transforms
        noise = torch.randn(3, 1, 1) + torch.randn(1, generator=self.own) + random.random() + np.random.rand()
        assert isinstance(python, random.Random)
        return IMAGES[index] + noise + python.random() + default.normal() + legacy.normal(), LABELS[index]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"generator": 3},
        {"num_workers": 1},
        {"num_workers": 1, "persistent_workers": True, "generator": 3},
    ],
    ids=str,
)
def test_training_goes_on_bit_for_bit_as_without_it(options: dict[str, Any], trainer: Callable[..., Trainer]) -> None:
    def run(*callbacks: Callback) -> Small:
        own = {"generator": torch.Generator().manual_seed(options["generator"])} if "generator" in options else {}
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True, **{**options, **own})
        model = Small()
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        trainer(*callbacks, max_epochs=2, val_check_interval=2).fit(model, loader, data())
        return model

    without, with_it = run(), run(BatchNormRecalibration(3))
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), with_it.parameters(), strict=True))
    assert not torch.equal(statistics(without)["network.3.running_var"], statistics(with_it)["network.3.running_var"])


def test_the_projects_own_data_goes_on_as_without_it(trainer: Callable[..., Trainer]) -> None:
    def run(*callbacks: Callback) -> DesignClassifier:
        torch.manual_seed(0)
        model = DesignClassifier("resnet20_cifar", 10, backbone_args={"width": 0.25}, input_size=(1, 32, 32))
        limits = {"limit_train_batches": 3, "limit_val_batches": 1, "val_check_interval": 2}
        trainer(*callbacks, max_epochs=2, **limits).fit(
            model, FashionMNISTSubset(batch_size=8, num_workers=0, padding=4)
        )
        return model

    without, with_it = run(), run(BatchNormRecalibration(2))
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), with_it.parameters(), strict=True))


def test_an_epochs_own_order_is_read_and_the_sampler_keeps_its_place(trainer: Callable[..., Trainer]) -> None:
    class Order(torch.utils.data.Sampler[int]):
        """Another order each epoch, and a count of what it gave."""

        def __init__(self) -> None:
            self.epoch = 0
            self.given = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 24

        def __iter__(self) -> Iterator[int]:
            for index in torch.arange(24).roll(4 * self.epoch).tolist():
                self.given += 1
                yield index

    probe, order = Probe(), Order()
    options = {"max_epochs": 2, "num_sanity_val_steps": 0}
    trainer(BatchNormRecalibration(2), probe, **options).fit(Small(), data(sampler=order), data())
    assert order.given == 48
    for epoch, module in enumerate(probe.copies[:2]):
        images = list(IMAGES.roll(4 * epoch, 0).split(4))[:2]
        torch.testing.assert_close(statistics(module), expected(module, images))


@pytest.mark.own_process
@pytest.mark.slow
def test_two_processes_have_the_statistics_of_both_shares(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # of the order that Lightning deals images in

    class Keep(Callback):
        def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.global_rank}.pt")

    options = {"devices": 2, "strategy": "ddp_fork", "num_sanity_val_steps": 0}
    trainer(BatchNormRecalibration(2), Keep(), **options).fit(Small(), data(), data())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    module = Small()
    module.load_state_dict(first)
    orders = [list(DistributedSampler(range(24), 2, rank, seed=3)) for rank in (0, 1)]  # type: ignore[arg-type]
    batches = [IMAGES[order[i : i + 4]] for order in orders for i in (0, 4)]
    torch.testing.assert_close(statistics(module), expected(module, batches))
    assert all(torch.equal(first[name], second[name]) for name in statistics(module))


def test_accumulation_makes_no_difference_to_it(trainer: Callable[..., Trainer]) -> None:
    probe = Probe()
    options = {"accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
    trainer(BatchNormRecalibration(2), probe, **options).fit(Small(), data(), data())
    torch.testing.assert_close(statistics(probe.copies[0]), expected(probe.copies[0], list(IMAGES.split(4))[:2]))


def test_it_runs_in_the_precision_of_the_run(trainer: Callable[..., Trainer]) -> None:
    probe = Probe()
    options: dict[str, Any] = {"precision": "bf16-mixed", "num_sanity_val_steps": 0}
    trainer(BatchNormRecalibration(2), probe, **options).fit(Small(), data(), data())
    with torch.autocast("cpu", torch.bfloat16):
        found = expected(probe.copies[0], list(IMAGES.split(4))[:2])
    torch.testing.assert_close(statistics(probe.copies[0]), found)


@pytest.mark.slow
def test_a_compiled_network_is_compiled_no_oftener(trainer: Callable[..., Trainer]) -> None:
    def graphs(*callbacks: Callback) -> int:
        found = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            found.append(graph)
            return graph

        model = Small()
        torch._dynamo.reset()
        model.network.compile(backend=backend)
        trainer(*callbacks, max_epochs=2).fit(model, data(), data())
        return len(found)

    assert graphs(BatchNormRecalibration(2)) == graphs()


class Images(LightningDataModule):
    """Training data that is there after `setup("fit")`."""

    def __init__(self) -> None:
        super().__init__()
        self.train: DataLoader[Any] | None = None

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train = data()

    def train_dataloader(self) -> Any:
        assert self.train is not None
        return self.train

    def val_dataloader(self) -> Any:
        return data()

    test_dataloader = val_dataloader


@pytest.mark.parametrize(("moment", "verb"), [("test", "test"), ("validation", "validate")])
def test_without_fit_the_batches_come_from_the_datamodule(
    moment: Any, verb: str, trainer: Callable[..., Trainer]
) -> None:
    probe = Probe()
    getattr(trainer(BatchNormRecalibration(2, [moment]), probe), verb)(Small(), datamodule=Images(), verbose=False)
    torch.testing.assert_close(statistics(probe.copies[0]), expected(Small(), list(IMAGES.split(4))[:2]))


def test_without_fit_the_batches_may_come_from_the_module(trainer: Callable[..., Trainer]) -> None:
    class WithData(Small):
        def train_dataloader(self) -> Any:
            return data()

    probe = Probe()
    trainer(BatchNormRecalibration(2, ["test"]), probe).test(WithData(), data(), verbose=False)
    torch.testing.assert_close(statistics(probe.copies[0]), expected(Small(), list(IMAGES.split(4))[:2]))


def test_only_the_moments_that_are_named(trainer: Callable[..., Trainer]) -> None:
    module = Small()
    images = Images()
    runner = trainer(BatchNormRecalibration(2, ["test"]), num_sanity_val_steps=0)
    runner.fit(module, datamodule=images)
    before = statistics(module)
    runner.validate(module, datamodule=images, verbose=False)
    torch.testing.assert_close(statistics(module), before, rtol=0, atol=0)
    runner.test(module, datamodule=images, verbose=False)
    torch.testing.assert_close(statistics(module), expected(module, list(IMAGES.split(4))[:2]))


def test_before_an_export_is_the_end_of_training(trainer: Callable[..., Trainer]) -> None:
    module = Small()
    trainer(BatchNormRecalibration(2, ["export"])).fit(module, data())
    torch.testing.assert_close(statistics(module), expected(module, list(IMAGES.split(4))[:2]))
    assert running_batch_norms(module)["network.1"].num_batches_tracked == 6


def test_a_stream_of_images(trainer: Callable[..., Trainer]) -> None:
    class Stream(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(zip(IMAGES, LABELS, strict=True))

    probe = Probe()
    loader = DataLoader(Stream(), batch_size=4)
    trainer(BatchNormRecalibration(2), probe, num_sanity_val_steps=0).fit(Small(), loader, data())
    torch.testing.assert_close(statistics(probe.copies[0]), expected(probe.copies[0], list(IMAGES.split(4))[:2]))


def test_a_loader_that_is_not_torchs_own(trainer: Callable[..., Trainer]) -> None:
    class Batches:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(zip(IMAGES.split(4), LABELS.split(4), strict=True))

    probe = Probe()
    trainer(BatchNormRecalibration(2), probe, num_sanity_val_steps=0).fit(Small(), Batches(), data())
    torch.testing.assert_close(statistics(probe.copies[0]), expected(probe.copies[0], list(IMAGES.split(4))[:2]))


def test_what_cannot_be_read_is_an_error(
    trainer: Callable[..., Trainer], plain: Callable[[nn.Module], LightningModule]
) -> None:
    with pytest.raises(ValueError, match="this run has none: pass a datamodule"):
        trainer(BatchNormRecalibration(before=["test"])).test(Small(), data())
    once = iter(list(zip(IMAGES.split(4), LABELS.split(4), strict=True)))
    with pytest.raises(ValueError, match="can be read only once"):
        trainer(BatchNormRecalibration(before=["export"])).fit(Small(), once)

    class Several(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["first"], batch_idx)

    with pytest.raises(ValueError, match="one training loader, and this run has 2"):
        trainer(BatchNormRecalibration(before=["export"])).fit(Several(), {"first": data(), "second": data()})
    with pytest.raises(ValueError, match="Plain has no batch norm with running statistics: take Batch"):
        trainer(BatchNormRecalibration()).fit(plain(nn.Linear(2, 2)), data())
    with pytest.raises(ValueError, match=r"Plain has no forward\(images\)"):
        trainer(BatchNormRecalibration(before=["export"])).fit(plain(Small().network), data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "batches must be at least 1, not 0"),
        ({"before": ["predict"]}, "before has 'predict': use validation, test, export"),
        ({"before": []}, "before is empty"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchNormRecalibration(**arguments)


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None]) -> None:
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")
    run_with_yaml("fit", "BatchNormRecalibration", *options, batches=2, before=["validation", "export"])


def test_statistics_are_of_images_that_the_data_normalizes(trainer: Callable[..., Trainer]) -> None:
    """A loader of bytes: the data module makes floats of them."""
    data = FashionMNISTSubset(batch_size=1000)
    module = DesignClassifier("resnet20_cifar", 10, backbone_args={"width": 0.25}, input_size=data.input_size)
    module.backbone = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1024, 10))
    trainer(BatchNormRecalibration(6, ["test"])).test(module, data, verbose=False)
    (norm, *_) = module.backbone
    train = data.normalize(data.samples("train").images)
    torch.testing.assert_close(norm.running_mean[0], train.mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(norm.running_var[0], train.var(), atol=0.1, rtol=0)
