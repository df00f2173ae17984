"""Every block of code and every command of README.md and docs/ works, or stands in a table with its reason.

Python runs as it stands, a page's blocks one after another, and prints what the page says it prints. Commands that take
seconds run as they stand, on small data of the right kind; those that train are parsed as they stand. The slow tier runs the
searches for kernels, and what needs a trained checkpoint.
"""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from blocks import PAGES, ROOT, Block, Command, blocks_of, commands_of, shows

from design_lightning.binary import ACTIVATIONS, ESTIMATORS, WEIGHT_BINARIZERS
from design_lightning.cli import COMMANDS, main

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
EVERY_COMMAND = [command for page in PAGES for command in commands_of(page)]
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})

SLOW_PAGES = {"README.md", "docs/index.md", "docs/export.md", "docs/designing.md"}
"""Pages whose Python trains, searches for kernels, or exports a network of 224 pixels."""

EXCEPTIONS = {
    "make test": "runs these tests",
    "pip install ./examples/plugin": "installs a package; tests/cli/test_plugins.py does so, into a folder of its own",
    "source .venv/bin/activate": "changes the reader's shell",
    "design-train shard --tars": "reads shards of a host that does not exist; tests/cli/test_shard.py indexes some that do",
    "design-train fit --config resnet18_imagenet --data WebDataset --data.root https://": "reads shards of the same host",
}
"""Commands, by how they begin, that are not run, and why. What begins with none of them is run or parsed."""

PARSED = ("fit", "validate", "test", "predict", "export", "sensitivity")
"""Commands of LightningCLI: `--print_config` parses all arguments, checks every value against its type, and ends."""

SHORTER = {
    "design": ["--limit", "8", "--filters", "1", "--groups", "2"],
    "design 3x3": ["--limit", "8", "--filters", "1", "--groups", "2", "--symmetric"],
    "benchmark training": ["--model", "resnet18", "--batch", "2", "--size", "64", "--rounds", "1", "--threads", "1"],
    "benchmark inference": [
        "--classes",
        "2",
        "--size",
        "32",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--variants",
        "float_pytorch",
    ],
    "shard": ["--workers", "1"],
    "submit": ["--dry-run"],
}
"""What makes a command short, appended to it."""

STANDS_FOR = {
    "--config ...": "--config quickstart",
    "--ckpt_path ...": "--ckpt_path checkpoint.ckpt",
    "/path/to/imagenet": "data/imagenet",
    "CHECKPOINT": "checkpoint.ckpt",
    "--config runs/NAME/version_0/config.yaml": "--config quickstart",
    "--config runs/quickstart/version_0/config.yaml": "--config quickstart",
}
"""What a page leaves to the reader, and what a test takes."""

NEEDS_CHECKPOINT = ("--checkpoint", "--ckpt_path", "--files")


def exception_of(command: Command) -> str | None:
    text = " ".join(command.words)
    return next((start for start in EXCEPTIONS if text.startswith(start)), None)


def kind_of(words: list[str]) -> str:
    """The key of `SHORTER`."""
    if words[1] == "benchmark":
        return " ".join(words[1:3])
    return "design 3x3" if "3x3" in words else words[1]


def needs_checkpoint(command: Command) -> bool:
    return command.words[0] == "design-train" and any(word in NEEDS_CHECKPOINT for word in command.words)


def is_parsed(command: Command) -> bool:
    return command.words[0] == "design-train" and command.words[1] in PARSED


COMMANDS_RUN = [command for command in EVERY_COMMAND if exception_of(command) is None]


def of_train(words: list[str], parse_only: bool = True) -> list[str]:
    """The arguments of `design-train` for a test."""
    text = shlex.join(words)
    for said, meant in STANDS_FOR.items():
        text = text.replace(said, meant)
    args = shlex.split(text)[1:]
    if args[0] in PARSED and parse_only:
        return [*args, "--print_config"]
    return [*args, *SHORTER.get(kind_of(["design-train", *args]), [])]


def run_design_train(args: list[str]) -> str:
    """What a command prints; fails where it ends with an error."""
    out, code = io.StringIO(), None
    with contextlib.redirect_stdout(out):
        try:
            main(args)
        except SystemExit as end:
            code = end.code
    if code:
        pytest.fail(f"design-train {' '.join(args)} ended with {code}")
    return out.getvalue()


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW_PAGES else []) for page in PYTHON]
)
@pytest.mark.filterwarnings("ignore")
def test_python_of_a_page_runs_and_prints_what_it_says(page: str, world: Path) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    registries = [(registry, dict(registry)) for registry in (ACTIVATIONS, ESTIMATORS, WEIGHT_BINARIZERS)]
    try:
        for block in (block for block in BLOCKS if block.page == page and block.language == "python"):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, f"{page}: {block.first_line}", "exec"), namespace)
            assert shows(block.output, out.getvalue()), f"{page} says\n{block.output}\nbut it printed\n{out.getvalue()}"
    finally:
        for registry, before in registries:
            registry.clear()
            registry.update(before)


def marks(command: Command) -> list[pytest.MarkDecorator]:
    long = (["design-train", "design"], ["design-train", "benchmark"])
    return [pytest.mark.slow] if command.words[:2] in long else []


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=str(c), marks=marks(c)) for c in COMMANDS_RUN if is_parsed(c) or not needs_checkpoint(c)],
)
def test_command_is_understood(command: Command, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command.words
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "design-train":
        args = of_train(words)
        monkeypatch.setattr(sys, "argv", ["design-train", *args])
        if args[:2] == ["shard", "--check"]:
            run_design_train(["shard", "--root", "data/imagenet", "--out", args[2], "--workers", "1"])
        out = run_design_train(args)
        assert out.strip()
    else:
        pytest.fail(f"{command}: a command that the test does not know; run it here, or give a reason in EXCEPTIONS")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS_RUN if needs_checkpoint(c)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_command_that_needs_a_checkpoint_runs(
    command: Command, world: Path, trained: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    args = of_train(command.words, parse_only=False)
    if any(word.startswith("shipped/") for word in args):
        run_design_train(
            [
                "export",
                "--config",
                "quickstart",
                "--ckpt_path",
                "checkpoint.ckpt",
                "--format",
                "onnx",
                "openvino",
                "--out",
                "shipped",
            ]
        )
    monkeypatch.setattr(sys, "argv", ["design-train", *args])
    assert run_design_train(args).strip()


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in ("yaml", "toml", "json")], ids=lambda b: f"{b.page}: {b.first_line}"
)
def test_configuration_is_one(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "json":
        assert json.loads(block.text)
        return
    if block.language == "toml":
        assert tomllib.loads(block.text)["project"]["entry-points"]["design_lightning.plugins"]
        return
    import design_lightning as dl

    dl.ThresholdKernel([[0.2, 0.6], [0.4, 0.8]]).to_json("my_kernel.json")
    (world / "mine.py").write_text(
        "from lightning.pytorch import Callback\n\nclass SayWhereWeAre(Callback):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(world)
    (world / "block.yaml").write_text(block.text, encoding="utf-8")
    whole = {"model", "data"} <= yaml.safe_load(block.text).keys()
    args = ["fit", *([] if whole else ["--config", "quickstart"]), "--config", "block.yaml", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["design-train", *args])
    printed = run_design_train(args)
    for path in re.findall(r"class_path: (\S+)", block.text):
        assert path.rpartition(".")[2].rstrip(",}") in printed


def test_every_block_is_of_a_language_that_is_tested() -> None:
    counted: dict[str, int] = {}
    for block in BLOCKS:
        counted[block.language] = counted.get(block.language, 0) + 1
    assert set(counted) <= {"python", "console", "yaml", "toml", "json", "text"}, counted
    assert counted["python"] >= 15
    assert counted["console"] >= 8


def test_exceptions_are_few_and_none_is_stale(record_property: Callable[[str, object], None]) -> None:
    used = {exception_of(command) for command in EVERY_COMMAND} - {None}
    assert used == set(EXCEPTIONS), f"not in the pages any more: {set(EXCEPTIONS) - used}"
    left_out = len(EVERY_COMMAND) - len(COMMANDS_RUN)
    record_property("commands", len(EVERY_COMMAND))
    record_property("commands left out", left_out)
    print(f"{len(EVERY_COMMAND)} commands, {left_out} left out for {len(EXCEPTIONS)} reasons; {len(BLOCKS)} blocks")
    assert left_out <= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_the_text_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        words = code.split()
        if words[0] == "design-train" and len(words) > 1:
            assert words[1].startswith("-") or words[1] in COMMANDS, code
        if words[0] == "python" and len(words) > 1:
            assert (ROOT / words[1]).is_file(), code
        if words[0] == "make" and len(words) == 2:
            assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), code
