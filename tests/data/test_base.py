"""What all data modules share, shown on the one that needs no files."""

import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

import design_lightning.data
from design_lightning.data import (
    CIFAR10,
    CIFAR100,
    STL10,
    FashionMNIST,
    FashionMNISTSubset,
    HuggingFace,
    ImageData,
    ImageFolder,
)
from design_lightning.data.batches import TensorBatches, TransformedBatches

DATA_SETS = [CIFAR10, CIFAR100, STL10, FashionMNIST, FashionMNISTSubset, HuggingFace, ImageFolder]


class Recorder(pl.LightningModule):
    """Sees what a model would see, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images: dict[str, torch.Tensor] = {}
        self.epochs: list[list[int]] = []
        self.predicted: list[str] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch, _):
        self.images["train"] = batch[0]
        self.epochs[-1] += batch[1].tolist()
        return self.weight * batch[0].mean()

    def validation_step(self, batch, _):
        assert batch[1].dtype == torch.int64
        self.images["val"] = batch[0]

    test_step = validation_step

    def predict_step(self, batch, _):
        self.images["predict"] = batch[0]
        self.predicted += batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, **quiet, **options)


def test_the_package_imports_nothing_heavy():
    code = "import sys, design_lightning.data; print({'torch', 'lightning', 'timm', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_every_public_name_is_there():
    for name in design_lightning.data.__all__:
        assert getattr(design_lightning.data, name) is not None
    assert set(design_lightning.data.__all__) == set(dir(design_lightning.data))
    with pytest.raises(AttributeError, match="ImageFolders"):
        _ = design_lightning.data.ImageFolders


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_every_option_of_the_base_class_can_be_set_from_a_configuration(data_set):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    arguments = [
        "--data",
        data_set.__name__,
        "--data.batch_size=7",
        "--data.val_size=0.25",
        "--data.auto_augment=rand-m9",
    ]
    arguments += ["--data.dataset=somewhere"] if data_set is HuggingFace else []
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert type(data) is data_set
    assert data.batch_size == 7
    assert data.val_size == 0.25
    assert data.augmentation.auto_augment == "rand-m9"


class Sized(Recorder):
    """A model that must be told about its data."""

    def __init__(self, num_classes: int, input_size: tuple[int, int, int], mean: tuple[float, ...]) -> None:
        super().__init__()
        self.told = num_classes, input_size, mean


class LinkedCLI(LightningCLI):
    """Tells the model about the data, as `design-train` does."""

    def add_arguments_to_parser(self, parser) -> None:
        for name in ("num_classes", "input_size", "mean"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")


def test_the_command_line_tells_the_model_about_the_data():
    arguments = [
        "--data=FashionMNISTSubset",
        "--data.channels=3",
        "--trainer.logger=false",
        "--trainer.accelerator=cpu",
    ]
    cli = LinkedCLI(Sized, ImageData, subclass_mode_data=True, run=False, args=arguments)
    assert cli.model.told == (10, (3, 32, 32), cli.datamodule.mean)


def test_lightning_fits_tests_and_predicts_with_it():
    data, model = FashionMNISTSubset(batch_size=500), Recorder()
    trainer(max_epochs=2).fit(model, data)
    assert [len(epoch) for epoch in model.epochs] == [6000, 6000]
    assert model.epochs[0] != model.epochs[1], "Lightning set the epoch of the sampler"
    trainer().test(model, data, verbose=False)
    trainer().predict(model, data)
    assert model.predicted[:2] == ["test/000000", "test/000001"]
    assert len(model.predicted) == 1000


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
@pytest.mark.parametrize("re_prob", [0.0, 0.5])
def test_a_model_gets_normalized_images_in_the_precision_of_the_trainer(precision, dtype, re_prob):
    data, model = FashionMNISTSubset(batch_size=2000, re_prob=re_prob), Recorder()
    trainer(max_epochs=1, precision=precision).fit(model, data)
    trainer(precision=precision).predict(model, data)
    for images in model.images.values():
        assert images.dtype == dtype
        assert abs(images.mean()) < 0.3
        assert abs(images.std() - 1) < 0.2
    pixels = data.samples("val").images[:1000].to(dtype)
    expected = (pixels / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(model.images["val"], expected, rtol=0, atol=1e-6)
    assert torch.equal(model.images["predict"], model.images["val"])


def test_bytes_become_floats_once_and_floats_stay():
    data = FashionMNISTSubset()
    images, names = next(iter(data.predict_dataloader()))
    assert images.dtype == torch.uint8
    normalized, same = data.on_after_batch_transfer((images, names), 0)
    torch.testing.assert_close(normalized, (images / 255 - data.mean[0]) / data.std[0])
    assert same is names
    assert data.normalize(normalized) is normalized


def test_what_was_normalized_in_inference_mode_first_can_be_trained_on():
    data = FashionMNISTSubset()
    images = data.samples("train").images[:4]
    with torch.inference_mode():
        data.normalize(images)
    weight = torch.ones(4, 1, 32, 32, requires_grad=True)
    (weight * data.normalize(images)).sum().backward()
    torch.testing.assert_close(weight.grad, data.normalize(images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_are_normalized_on_the_gpu():
    data = FashionMNISTSubset()
    images = data.samples("train").images[:64]
    there = data.normalize(images.cuda())
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), data.normalize(images))


def test_a_run_is_the_same_again_with_the_same_seed_and_only_then():
    first, again, other = (next(iter(FashionMNISTSubset(seed=seed).train_dataloader())) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_several_processes_share_the_training_images_and_pad_the_evaluation(monkeypatch):
    orders = []
    for rank in range(3):
        data = FashionMNISTSubset(batch_size=100)
        monkeypatch.setattr(data, "_processes", lambda rank=rank: (3, rank))
        orders.append(list(data.train_dataloader().sampler))
        labels = torch.cat([labels for _, labels in data.val_dataloader()])
        assert len(labels) == 334
        assert (labels == -100).sum() == (0 if rank == 0 else 1)
    assert sorted(index for order in orders for index in order) == list(range(6000))


def test_images_are_transformed_one_by_one_where_a_crop_and_a_flip_are_not_enough():
    assert isinstance(FashionMNISTSubset().train_dataloader().dataset.batches, TensorBatches)
    rand_augment = FashionMNISTSubset(auto_augment="rand-m9-mstd0.5", batch_size=4)
    assert isinstance(rand_augment.train_dataloader().dataset.batches, TransformedBatches)
    images, _ = next(iter(rand_augment.train_dataloader()))
    assert images.shape == (4, 1, 32, 32)
    assert isinstance(rand_augment.val_dataloader().dataset, TensorBatches)


def test_a_resized_data_set_has_the_size_asked_for():
    data = FashionMNISTSubset(image_size=48, channels=3, batch_size=4)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))[0].shape == (4, *data.input_size) == (4, 3, 48, 48)


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="unknown split 'valid'; use train, val, test"):
        FashionMNISTSubset().samples("valid")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"image_size": 0}, "image_size=0"),
        ({"val_size": 0}, "val_size=0"),
        ({"val_size": 1.0}, "val_size=1.0"),
        ({"val_size": -0.5}, "val_size=-0.5"),
        ({"val_size": float("nan")}, "val_size=nan"),
        ({"mean": (0.5,)}, "mean=.* has 1 values, where images have 3 channels"),
        ({"std": (0.5, 0.5)}, "std=.* has 2 values"),
        ({"std": (0.5, 0.0, 0.5)}, r"std=\(0.5, 0.0, 0.5\) must be above 0"),
    ],
)
def test_an_argument_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder("nowhere", **options)


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match="batch_size=7000 is more than the 6000 training images"):
        FashionMNISTSubset(batch_size=7000).train_dataloader()
    assert len(FashionMNISTSubset(batch_size=7000, drop_last=False).train_dataloader()) == 1


DISTRIBUTED = """
import os, lightning.pytorch as pl, torch
from design_lightning.data import FashionMNISTSubset


class Counter(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10), torch.nn.BatchNorm1d(10))

    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.layer(batch[0])
        self.log("images", (batch[1] >= 0).sum().float(), reduce_fx="sum", sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, _):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def say(line):
    os.write(1, f"{line}\\n".encode())  # in one piece: two processes share the pipe


if __name__ == "__main__":
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, num_sanity_val_steps=0, **off)
    model, data = Counter(), FashionMNISTSubset(batch_size=50, val_size=151)
    trainer.fit(model, data)
    say(f"validated {int(trainer.callback_metrics['images'])}")
    trainer.test(model, data, verbose=False)
    say(f"tested {int(trainer.callback_metrics['images'])}")
    names = [name for batch in trainer.predict(model, data) for name in batch]
    say(f"predicted {len(names)} {len(set(names))}")
"""


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path):
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert "validated 151\n" in result.stdout, result.stderr
    assert "tested 1000\n" in result.stdout
    assert "predicted 75 75\n" in result.stdout
    assert "predicted 76 76\n" in result.stdout
