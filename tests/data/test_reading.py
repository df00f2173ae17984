"""Damaged images are left out, counted once and named; the batches stay as large, and too many end the run."""

import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from design_lightning.callbacks import DamagedImagesReport
from design_lightning.data import IGNORE_LABEL, ImageFolder

TREE = {"train": {"cat": 6, "dog": 6}, "val": {"cat": 3, "dog": 4}}
LEFT_OUT = r"cannot read the image .*{}: .*; it is left out"


def folder(root: Path, **options) -> ImageFolder:
    return ImageFolder(
        str(root), **{"batch_size": 4, "num_workers": 0, "image_size": 24, "max_damaged": 0.5, **options}
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def huge_png(path: Path) -> None:
    """60,000 x 60,000 pixels, says its header; nothing follows."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))


def huge_jpeg(path: Path) -> None:
    """A whole JPEG whose header says 65,000 x 65,000 pixels, which a decoder would make room for."""
    content = bytearray(path.read_bytes())
    size = content.index(b"\xff\xc0") + 5
    content[size : size + 4] = struct.pack(">HH", 65_000, 65_000)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_bytes(b"<html>404 Not Found</html>"),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "header": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "huge_png": huge_png,
    "huge_jpeg": huge_jpeg,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_in_training_the_next_image_stands_in(make_tree, damage):
    root = make_tree(TREE)
    plain = {"scale": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
    data = folder(root, batch_size=12, **plain)
    data.setup("fit")
    DAMAGES[damage](root / "train" / "cat" / "1.jpg")
    with pytest.warns(UserWarning, match=LEFT_OUT.format(r"cat/1\.jpg")):
        ((images, labels),) = data.train_dataloader()
    assert images.shape == (12, 3, 24, 24)
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6
    # Without augmentation cat/2.jpg is there twice.
    assert len(images.unique(dim=0)) == 11
    assert data.readers["train"].names() == [str(root / "train" / "cat" / "1.jpg")]


def test_the_last_image_is_replaced_by_the_first_with_its_label(make_tree):
    root = make_tree(TREE)
    for name in ("4.jpg", "5.jpg"):
        truncate(root / "train" / "dog" / name)
    data = folder(root, batch_size=12)
    with pytest.warns(UserWarning, match="it is left out"):
        ((_, labels),) = data.train_dataloader()
    assert sorted(labels.tolist()) == [0] * 8 + [1] * 4


@pytest.mark.own_process
@pytest.mark.slow
def test_batches_do_not_depend_on_workers_nor_on_a_resume(make_tree):
    root = make_tree(TREE)
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/0.jpg"):
        truncate(root / "train" / name)
    here, there, resumed = (folder(root, num_workers=workers) for workers in (0, 2, 1))
    resumed.load_state_dict({"batches": 1, "images": 12, "processes": 1, "batch_size": 4})
    with pytest.warns(UserWarning, match="it is left out"):
        whole, spread, rest = (list(data.train_dataloader()) for data in (here, there, resumed))
    assert len(whole) == len(spread) == 3
    for (images, labels), (others, other_labels) in zip(whole + whole[1:], spread + rest, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.own_process
def test_an_image_is_named_once_by_the_process_that_trains(make_tree, recwarn):
    root = make_tree(TREE)
    for name in ("cat/1.jpg", "dog/0.jpg"):
        truncate(root / "train" / name)
    data = folder(root, num_workers=2)
    loader = data.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        list(loader)
    list(data.train_dataloader())
    named = [str(each.message) for each in recwarn if "it is left out" in str(each.message)]
    assert len(named) == 2
    assert data.readers["train"].count == 2


def test_in_evaluation_an_image_counts_nowhere(make_tree):
    root = make_tree(TREE)
    truncate(root / "val" / "cat" / "1.jpg")
    whole = folder(make_tree(TREE, name="whole"))
    with pytest.warns(UserWarning, match=LEFT_OUT.format(r"cat/1\.jpg")):
        images, labels = (torch.cat(parts) for parts in zip(*folder(root).val_dataloader(), strict=True))
    expected = torch.cat([images for images, _ in whole.val_dataloader()])
    assert labels.tolist() == [0, IGNORE_LABEL, 0, 1, 1, 1, 1]
    assert (images[1] == 0).all()
    assert torch.equal(images[[0, 2, 3, 4, 5, 6]], expected[[0, 2, 3, 4, 5, 6]])


def test_an_image_that_is_far_too_long_is_left_out(make_tree):
    root = make_tree(TREE)
    Image.fromarray(np.zeros((2, 500, 3), dtype=np.uint8)).save(root / "val" / "cat" / "1.jpg")
    with pytest.warns(UserWarning, match=r"cannot use the image .*cat/1\.jpg: it has 500x2 pixels"):
        labels = torch.cat([labels for _, labels in folder(root).val_dataloader()])
    assert labels.tolist() == [0, IGNORE_LABEL, 0, 1, 1, 1, 1]


def test_a_damaged_image_is_not_predicted(make_tree):
    root = make_tree(TREE)
    for name in ("cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "dog/0.jpg", "dog/2.jpg"):
        truncate(root / "val" / name)
    with pytest.warns(UserWarning, match="it is left out"):
        first, second = folder(root, predict_root=str(root / "val")).predict_dataloader()
    assert first[0].shape == (0, 3, 24, 24)
    assert first[1] == []
    assert second[0].shape == (2, 3, 24, 24)
    assert [Path(name).name for name in second[1]] == ["1.jpg", "3.jpg"]


@pytest.mark.parametrize("max_damaged", [0, 0.08, 0.17])
def test_one_more_than_the_stated_share_ends_the_run(make_tree, max_damaged):
    root, allowed = make_tree(TREE), int(max_damaged * 12)
    for index in range(allowed):
        truncate(root / "train" / "cat" / f"{index}.jpg")
    assert len(list(folder(root, max_damaged=max_damaged).train_dataloader())) == 3
    truncate(root / "train" / "cat" / "5.jpg")
    message = rf"{allowed + 1} of 12 training images cannot be read, where max_damaged={max_damaged} is allowed: cannot read .*cat/"
    with pytest.raises(ValueError, match=message):
        list(folder(root, max_damaged=max_damaged).train_dataloader())


@pytest.mark.own_process
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.slow
def test_a_disk_that_went_away_is_said_with_the_first_batch(make_tree, num_workers):
    root = make_tree(TREE)
    data = folder(root, num_workers=num_workers)
    data.setup("fit")
    shutil.rmtree(root)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        with pytest.raises(
            ValueError, match=r"images cannot be read.*No such file or directory.*; look whether the disk is"
        ):
            list(loader)


def test_a_split_of_damaged_images_alone_ends_the_run_at_any_share(make_tree):
    root = make_tree(TREE)
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"")
    data = folder(root, max_damaged=1.0)
    for loader, split, count in ((data.train_dataloader(), "training", 12), (data.val_dataloader(), "validation", 7)):
        message = rf"^{count} of {count} {split} images cannot be read: cannot read .* take them away$"
        with pytest.raises(ValueError, match=message):
            list(loader)


@pytest.mark.parametrize("max_damaged", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(max_damaged):
    with pytest.raises(ValueError, match=rf"max_damaged={max_damaged} is a share of the images"):
        ImageFolder("somewhere", max_damaged=max_damaged)


class Counter(LightningModule):
    """Counts what is evaluated."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.counted = 0

    def training_step(self, batch, _):
        assert (batch[1] >= 0).all()
        return self.layer(batch[0].mean().reshape(1, 1)).square().sum()

    def validation_step(self, batch, _):
        self.counted += int((batch[1] >= 0).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_end_of_a_run_says_which_images_were_damaged(make_tree, tmp_path, capsys):
    root = make_tree({"train": {"cat": 15, "dog": 15}, "val": {"cat": 3, "dog": 4}})
    for index in range(11):
        truncate(root / "train" / "cat" / f"{index}.jpg")
    truncate(root / "val" / "dog" / "3.jpg")
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
    trainer, model = Trainer(callbacks=[DamagedImagesReport()], **options, **off), Counter()
    with pytest.warns(UserWarning, match="it is left out"):
        trainer.fit(model, folder(root))
    assert model.counted == 2 * 6
    training, validation = capsys.readouterr().out.splitlines()[-2:]
    path = tmp_path / "damaged_train.txt"
    assert training.startswith("11 of 30 training images are damaged and were left out: ")
    assert training.endswith(f"(all of them in {path})")
    assert sorted(path.read_text().split()) == sorted(str(root / "train" / "cat" / f"{i}.jpg") for i in range(11))
    assert validation == f"1 of 7 validation images is damaged and was left out: {root / 'val' / 'dog' / '3.jpg'}"


TWO_PROCESSES = """
import os, sys, warnings
import torch
from lightning.pytorch import Trainer
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from test_reading import Counter, folder
from design_lightning.callbacks import DamagedImagesReport

if __name__ == "__main__":
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 1, "num_sanity_val_steps": 0}
    trainer, model = Trainer(callbacks=[DamagedImagesReport()], **options, **off), Counter()
    try:
        trainer.fit(model, folder(sys.argv[2], batch_size=1, max_damaged=float(sys.argv[3])))
    except ValueError as error:
        os.write(1, f"{trainer.global_rank} of 2: {error}\\n".encode())  # in one piece: two processes share the pipe
        sys.exit(3)
    os.write(1, f"{trainer.global_rank} of 2 validated {model.counted}\\n".encode())
"""


@pytest.mark.slow
@pytest.mark.parametrize("max_damaged", [0.25, 0.3])
def test_damaged_images_of_two_processes_count_together(make_tree, tmp_path, max_damaged):
    root, script = make_tree(TREE), tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    truncate(root / "val" / "cat" / "0.jpg")
    data = folder(root, batch_size=1)
    data.setup("fit")
    for name in ("cat/0.jpg", "cat/5.jpg", "dog/1.jpg", "dog/4.jpg")[: 3 if max_damaged == 0.25 else 4]:
        truncate(root / "train" / name)
    command = [sys.executable, script, str(Path(__file__).parent), str(root), str(max_damaged)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if max_damaged == 0.25:
        assert "3 of 12 training images are damaged" in result.stdout, result.stderr
        counted = [int(line.split()[-1]) for line in result.stdout.splitlines() if "validated" in line]
        assert sum(counted) == 6
        assert result.returncode == 0
    else:
        assert "of 2: 4 of 12 training images cannot be read, where max_damaged=0.3" in result.stdout, result.stderr
        assert result.returncode != 0
