"""`design-train shard` as a user calls it, and a training on what it made."""

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from design_lightning.cli import main


def made(image_tree: Path, out: Path) -> Path:
    main(["shard", "--root", str(image_tree), "--out", str(out), "--images", "5", "--workers", "1"])
    return out


def test_it_says_what_it_made_and_a_check_finds_damage(image_tree, tmp_path, capsys) -> None:
    out = made(image_tree, tmp_path / "shards")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("train: 4 shards, ")
    assert printed[1].startswith("val: 2 shards, ")
    assert printed[2] == f"2 classes; index: {out}/index.json"
    assert printed[3] == f"next: design-train fit --config ... --data WebDataset --data.root {out}"
    main(["shard", "--check", str(out), "--workers", "1"])
    assert capsys.readouterr().out == f"every file of {out} is as it was made\n"
    (out / "train-000002.tar").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        main(["shard", "--check", str(out), "--workers", "1"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"design-train: error: 1 files of {out} are missing or damaged: train-000002.tar\n"
    )


def test_tars_of_others_are_indexed_by_braces(image_tree, tmp_path, capsys) -> None:
    shards = made(image_tree, tmp_path / "shards")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    trains = [f"train={shards}/train-{{000000..000002}}.tar", f"train={shards}/train-000003.tar"]
    args = ["--tars", *trains, f"val={shards}/val-{{000000,000001}}.tar"]
    main(
        [
            "shard",
            *args,
            "--out",
            str(tmp_path / "index"),
            "--class_names",
            str(tmp_path / "names.txt"),
            "--workers",
            "1",
        ]
    )
    assert "train: 4 shards" in capsys.readouterr().out
    from design_lightning.data import WebDataset

    data = WebDataset(str(tmp_path / "index"))
    assert data.class_names == ("cat", "dog")
    assert (len(data.samples("train")), len(data.samples("val"))) == (16, 6)


@pytest.mark.parametrize(
    ("args", "error", "code"),
    [
        ([], "one of the arguments --root --tars --check is required", 2),
        (["--root", "nowhere"], "--out is missing", 2),
        (["--root", "nowhere", "--out", "x"], "no folder 'nowhere' with images", 1),
        (["--tars", "x.tar", "--out", "x"], "--tars x.tar: expected train=", 1),
        (["--tars", "train=", "--out", "x"], "--tars train=: expected train=", 1),
        (["--tars", "train=gone.tar", "--out", "x", "--workers", "1"], "gone.tar", 1),
        (["--check", "nowhere"], "no index.json in 'nowhere'", 1),
        (["--root", ".", "--out", "x", "--images", "0"], "images=0 must be at least 1", 1),
        (["--root", ".", "--out", "x", "--imagse", "0"], "unknown option '--imagse': did you mean '--images'?", 2),
    ],
)
def test_what_is_wrong_is_said_in_one_line(args, error, code, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["shard", *args])
    assert ended.value.code == code
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert error in printed[0]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("broken", "args", "error"),
    [
        (
            "image",
            ["--root", "images", "--out", "x"],
            "No such file or directory: 'images/train/cat/gone.png'",
        ),
        ("out", ["--root", "images", "--out", "file"], "Not a directory: 'file/"),
        ("tar", ["--tars", "train=cut.tar", "--out", "x"], "{folder}/cut.tar is no whole, uncompressed tar file"),
        (
            "names",
            ["--tars", "train=cut.tar", "--out", "x", "--class_names", "gone.txt"],
            "No such file or directory: 'gone.txt'",
        ),
    ],
    ids=("image", "out", "tar", "names"),
)
def test_files_that_cannot_be_read_or_written_are_named_in_one_line(
    workers, broken, args, error, image_tree, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if broken == "image":
        (image_tree / "train" / "cat" / "gone.png").symlink_to("nowhere")
    if broken == "tar":
        Path("cut.tar").write_bytes(b"0" * 700)
    with pytest.raises(SystemExit) as ended:
        main(["shard", *args, "--workers", workers])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert error.format(folder=tmp_path) in line


@pytest.mark.own_process
def test_a_full_disk_names_the_shard_and_the_rest_is_made_later(image_tree, tmp_path, capsys) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(SystemExit):
            made(image_tree, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = f"design-train: error: [Errno 27] File too large: '{tmp_path}/x/train-000000.tar'\n"
    assert capsys.readouterr().err == error
    assert [path.name for path in (tmp_path / "x").iterdir()] == [".unfinished"]
    made(image_tree, tmp_path / "x")
    assert "train: 4 shards" in capsys.readouterr().out


def test_a_killed_process_is_said_in_a_line() -> None:
    from design_lightning.data.shards.making import _results

    with pytest.raises(OSError, match=r"^a process was killed, as a system does where memory runs out; run the same"):
        list(_results([partial(os._exit, 9)], 2, lambda done, of: None))


@pytest.mark.slow
def test_killed_while_it_writes_it_goes_on(image_tree, tmp_path) -> None:
    out = tmp_path / "shards"
    code = (
        "import os, sys; from design_lightning.data.shards import making\n"
        "write = making._write_file\n"
        "def killed(place, contents):\n"
        "    if '000002' in place.name: os.kill(os.getpid(), 9)\n"
        "    write(place, contents)\n"
        "making._write_file = killed\n"
        "from design_lightning.cli import main; main(sys.argv[1:])"
    )
    args = ["shard", "--root", str(image_tree), "--out", str(out), "--images", "5", "--workers", "1"]
    assert subprocess.run([sys.executable, "-c", code, *args]).returncode == -9
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sorted(times) == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    made(image_tree, out)
    assert [n for n, t in times.items() if (out / n).stat().st_mtime_ns != t] == ["train-000002.tar"], "it had no table"
    main(["shard", "--check", str(out), "--workers", "1"])


def test_a_stopped_epoch_over_shards_goes_on_with_its_next_batch(image_tree, tmp_path) -> None:
    import torch

    out = made(image_tree, tmp_path / "shards")

    def fit(name: str, *extra: str) -> None:
        options = {
            "--model": "DesignClassifier",
            "--model.backbone": "test_resnet",
            "--data": "WebDataset",
            "--data.root": str(out),
            "--data.image_size": "32",
            "--data.batch_size": "4",
            "--data.num_workers": "0",
            "--trainer.accelerator": "cpu",
            "--trainer.enable_progress_bar": "false",
            "--trainer.logger": "false",
            "--trainer.default_root_dir": str(tmp_path / name),
            "--trainer.max_steps": "6",
            "--trainer.callbacks+": "ModelCheckpoint",
            "--trainer.callbacks.every_n_train_steps": "2",
            "--trainer.callbacks.save_top_k": "-1",
        }
        main(["fit", *(word for option in options.items() for word in option), *extra])

    def saved(name: str, step: int) -> Path:
        return next((tmp_path / name).rglob(f"*step={step}.ckpt"))

    fit("whole")
    fit("rest", "--ckpt_path", str(saved("whole", 2)))
    whole, rest = (torch.load(saved(name, 6), weights_only=False)["state_dict"] for name in ("whole", "rest"))
    weights = [name for name, value in whole.items() if isinstance(value, torch.Tensor)]
    assert [name for name in weights if not torch.equal(whole[name], rest[name])] == []
    assert len(weights) > 30
