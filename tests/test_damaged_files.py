"""Two hundred damaged files, each drawn from a seed: images, shards, configurations, checkpoints.

What is damaged is left out and counted, or ends a command with one line that names it: no traceback, no hang. Damage that changes
nothing that is read, or gives another valid file, may pass.
"""

import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import design_lightning as dl
from design_lightning.cli import main
from design_lightning.data import ImageFolder, WebDataset
from design_lightning.data.shards.making import damaged_files, make_shards
from design_lightning.data.shards.store import ShardStore

pytestmark = pytest.mark.slow
SECONDS = 120
"""What takes longer hangs; the slowest takes 10 on a busy machine."""
CONFIG = """\
seed_everything: 0
trainer:
  max_epochs: 4
  log_every_n_steps: 1
  enable_progress_bar: false
  logger: {class_path: CSVLogger, init_args: {save_dir: runs}}
  callbacks:
    - class_path: TwoStageTraining
    - class_path: LatentWeightClipping
      init_args: {bound: 0.05}
    - class_path: ModelCheckpoint
      init_args: {monitor: val/top1, mode: max}
model:
  class_path: DesignClassifier
  init_args:
    backbone: test_resnet
    binary: {kernel: 2x2_v1, weight: learned, scale: 1.0, estimator: approx_sign}
    optimizer: {class_path: Adam, init_args: {lr: 1.0e-2}}
    scheduler: CosineDecay
data:
  class_path: FashionMNISTSubset
  init_args:
    batch_size: 8
    num_workers: 0
    image_size: 28
    padding: 2
"""
VALUES = (
    "null",
    "[]",
    "{}",
    "-1",
    "0",
    "1e999",
    ".nan",
    "abc",
    "true",
    "'",
    "*x",
    "!!python/object:os.system",
    "2x2",
    "\t",
)


def damaged(contents: bytes, draw: random.Random) -> bytes:
    """A file after a copy that stopped, a bad disk, or a slip."""
    kind = draw.choice(["cut", "cut", "flip", "flip", "zeros", "noise", "twice", "empty", "text"])
    place = draw.randrange(len(contents))
    if kind == "cut":
        return contents[:place]
    if kind == "flip":
        changed = bytearray(contents)
        for _ in range(draw.choice([1, 1, 4, 64])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    length = draw.randrange(1, 4096)
    return {
        "zeros": contents[:place] + bytes(min(length, len(contents) - place)) + contents[place + length :],
        "noise": contents[:place] + draw.randbytes(min(length, len(contents) - place)) + contents[place + length :],
        "twice": contents[:place] + contents,
        "empty": b"",
        "text": b"<html>404 Not Found</html>\n",
    }[kind]


def mistyped(text: str, draw: random.Random) -> bytes:
    """A configuration after a slip of the hand."""
    lines = text.split("\n")
    place = draw.randrange(len(lines) - 1)
    kind = draw.choice(["value", "value", "value", "key", "key", "indent", "gone", "twice", "character", "byte", "cut"])
    key, colon, value = lines[place].partition(": ")
    if kind == "value" and colon:
        lines[place] = f"{key}: {draw.choice(VALUES)}"
    elif kind == "key":
        spot = draw.randrange(len(key))
        lines[place] = key[:spot] + draw.choice("xyz_-") + key[spot + 1 :] + colon + value
    elif kind == "indent":
        lines[place] = draw.choice(["", " ", "      ", "\t"]) + lines[place].lstrip()
    elif kind == "gone":
        del lines[place]
    elif kind == "twice":
        lines.insert(place, lines[place])
    contents = bytearray("\n".join(lines).encode())
    if kind in ("character", "byte"):
        contents[draw.randrange(len(contents))] = (
            draw.randrange(32, 127) if kind == "character" else draw.randrange(256)
        )
    return bytes(contents[: draw.randrange(len(contents))] if kind == "cut" else contents)


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"hangs: more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], object]) -> BaseException | None:
    """What a call of the library raises; a failure of this test if that is no message for its user."""
    with no_hang(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except (ValueError, OSError) as raised:
            error = raised
        else:
            return None
    assert str(error), repr(error)
    assert "Traceback" not in str(error)
    return error


def command(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error line of a command, which is its only one; empty where it works."""
    capsys.readouterr()
    with no_hang(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main(args)
        except SystemExit as ended:
            code = ended.code
        else:
            return ""
    printed = capsys.readouterr().err
    assert code in (1, 2), printed
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("design-train: error: ")]
    assert len(errors) == 1, printed
    assert len(errors[0]) < 600, errors[0]
    return errors[0]


@pytest.mark.parametrize("seed", range(50))
def test_images(seed: int, image_tree: Path) -> None:
    draw = random.Random(seed)
    path = draw.choice(sorted(image_tree.rglob("*.jpg")))
    path.write_bytes(damaged(path.read_bytes(), draw))
    split = path.relative_to(image_tree).parts[0]
    data = ImageFolder(str(image_tree), batch_size=4, num_workers=0, image_size=32, max_damaged=0.5)

    def read() -> None:
        batches = list(data.train_dataloader() if split == "train" else data.val_dataloader())
        labels = torch.cat([labels for _, labels in batches])
        assert len(labels) == (16 if split == "train" else 6)
        left_out = data.readers[split].names()
        assert left_out in ([], [str(path)])
        assert int((labels < 0).sum()) == (len(left_out) if split == "val" else 0)

    assert outcome(read) is None


@pytest.mark.parametrize("seed", range(50))
def test_shards(seed: int, image_tree: Path, tmp_path: Path) -> None:
    draw = random.Random(seed)
    out = tmp_path / "shards"
    make_shards(image_tree, out, images=4)
    path = draw.choice([*sorted(out.iterdir()), out / "index.json", out / "train.npz"])
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, draw))
    is_changed = path.read_bytes() != whole
    data = WebDataset(str(out), batch_size=4, num_workers=0, image_size=32, max_damaged=0.5)

    def read() -> None:
        for batches in (data.train_dataloader(), data.val_dataloader()):
            for _ in batches:
                pass

    error = outcome(read)
    assert error is None or "\n" not in str(error)
    if path.name != "index.json":
        named = [name for reader in data.readers.values() for name in reader.names()]
        assert error is None or path.name in str(error)
        assert all(name.startswith(path.name) for name in named)
        assert damaged_files(ShardStore(str(out))) == [path.name] * is_changed


@pytest.mark.parametrize("seed", range(50))
def test_configurations(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(mistyped(CONFIG, random.Random(seed)))
    command(capsys, "fit", "--config", str(path), "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A checkpoint of Lightning, and a network in three formats."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "config.yaml").write_text(CONFIG)
    root = ["--trainer.default_root_dir", str(folder), "--trainer.logger", "false"]
    fit = ["fit", "--config", str(folder / "config.yaml"), *root, "--trainer.accelerator", "cpu"]
    main([*fit, "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1"])
    classifier = dl.DesignClassifier.load_from_checkpoint(next(folder.rglob("*.ckpt")))
    dl.set_stage_(classifier.backbone, "both")
    dl.export_model(classifier.backbone, folder / "model", ["packed", "onnx"], images=torch.randn(2, 1, 28, 28))
    dl.save(classifier.backbone, folder / "latent.safetensors")
    files = {"model.ckpt": next(folder.rglob("*.ckpt")), "packed.safetensors": next(folder.glob("model*.safetensors"))}
    files |= {"model.onnx": folder / "model.onnx", "latent.safetensors": folder / "latent.safetensors"}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("seed", range(50))
def test_checkpoints(
    seed: int,
    saved: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)
    name = draw.choice(sorted(saved))
    path = tmp_path / name
    path.write_bytes(damaged(saved[name], draw))
    if name == "model.ckpt":
        (tmp_path / "config.yaml").write_text(CONFIG)
        error = command(
            capsys, "validate", "--config", "config.yaml", "--ckpt_path", str(path), "--trainer.limit_val_batches", "1"
        )
        assert name in error or not error
    elif name == "latent.safetensors":
        error = outcome(lambda: dl.load(path))
        assert error is None or name in str(error)
    else:
        error = command(
            capsys, "test", "--ckpt_path", str(path), "--data", "FashionMNISTSubset", "--data.image_size", "28",
            "--trainer.limit_test_batches", "1",
        )  # fmt: skip
        assert name in error or not error
