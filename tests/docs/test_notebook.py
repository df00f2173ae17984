"""The notebook of examples/ runs from its first cell to its last, and what is committed of it is what such a run shows."""

import ast
import base64
import builtins
import io
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from blocks import ROOT
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from run_notebook import NOTEBOOK, execute

import design_lightning as dl
from design_lightning.export import Agreement, Exported, Exports

GREATEST_BYTES = 300_000
PATH = re.compile(r"""(?<![\w.)\]/:<])(/[A-Za-z_~][\w.~-]*/|~/|[A-Za-z]:\\)""")
"""The beginning of an absolute path, and not that of a fraction, of an address or of a closing tag."""


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    """All text of a cell's outputs."""
    parts = [output["text"] for output in cell.outputs if output["output_type"] == "stream"]
    return "".join(parts + [output["data"].get("text/plain", "") for output in cell.outputs if "data" in output])


def pictures(notebook: NotebookNode) -> Iterator[Image.Image]:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                yield Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))


def words(cell: NotebookNode) -> list[str]:
    """What a cell printed, without numbers."""
    return re.findall(r"[A-Za-z_]{3,}", printed(cell))


def kinds(cell: NotebookNode) -> list[list[str]]:
    """The kind of each output: a stream's name, or its types."""
    return [[output["name"]] if "name" in output else sorted(output["data"]) for output in cell.outputs]


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_committed_notebook_was_run_from_top_to_bottom(committed: NotebookNode) -> None:
    cells = code_cells(committed)
    assert len(cells) >= 8
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        ast.parse(cell.source)
        assert cell.outputs, f"shows nothing:\n{cell.source}"
        for output in cell.outputs:
            assert output["output_type"] != "error", cell.source
            assert output.get("name") != "stderr", output


def test_committed_notebook_is_small_and_shows_pictures(committed: NotebookNode) -> None:
    assert NOTEBOOK.stat().st_size < GREATEST_BYTES
    drawn = list(pictures(committed))
    assert len(drawn) >= 6
    for picture in drawn:
        picture.load()
        assert picture.width <= 1200
        assert len(picture.convert("L").getcolors(256) or []) > 4  # something is drawn


def test_committed_notebook_holds_no_path_of_a_machine(committed: NotebookNode) -> None:
    texts = [cell.source for cell in committed.cells] + [printed(cell) for cell in code_cells(committed)]
    assert [found.group() for text in texts for found in PATH.finditer(text)] == []
    assert set(committed.metadata) == {"kernelspec", "language_info"}
    assert committed.metadata.kernelspec.name == "python3"
    assert all(cell.metadata == {} for cell in committed.cells)


@pytest.mark.parametrize("text", ["in /home/me/x.py", "'/tmp/a'", "C:\\Users", "~/runs", "(/opt/x/y)"])
def test_an_absolute_path_is_noticed(text: str) -> None:
    assert PATH.search(text)


def test_links_of_the_notebook_lead_somewhere(committed: NotebookNode) -> None:
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) >= 5
    for link in links:
        assert (NOTEBOOK.parent / link).is_file(), link


def test_readers_find_the_notebook_and_no_package_holds_it() -> None:
    place = NOTEBOOK.relative_to(ROOT).as_posix()
    assert f"({place})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert place in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in setuptools["packages"]:
        parent, _, name = package.rpartition(".")
        folder = setuptools["package-dir"].get(package, f"{parent.replace('.', '/')}/{name}".lstrip("/"))
        assert (ROOT / folder).is_dir()
        assert not list((ROOT / folder).glob("*.ipynb"))


def test_a_cell_that_raises_ends_the_run_and_the_kernel(tmp_path: Path) -> None:
    sources = ("import os, sys\nprint(os.getpid(), sys.executable, os.getcwd())", "raise KeyError('gone')", "2")
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    with pytest.raises(CellExecutionError, match="gone"):
        execute(notebook, tmp_path)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, None]
    process, *rest = printed(notebook.cells[0]).split()
    assert rest == [sys.executable, str(tmp_path)]
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_a_cell_that_takes_too_long_ends_the_run(tmp_path: Path) -> None:
    endless = new_notebook(cells=[new_code_cell("while True:\n    pass")])
    with pytest.raises(CellTimeoutError):
        execute(endless, tmp_path, cell_timeout=1)


class ZMQInteractiveShell:
    """By this name of what `get_ipython()` gives rich knows a notebook, in which a console prints nothing but HTML."""


def test_reports_are_text_in_a_notebook_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(8, 8, 3) for _ in range(3)), torch.nn.Flatten(), torch.nn.Linear(32, 2)
    )
    report = dl.binarize_(model, example_input=(1, 8, 8, 8))
    assert "2 of 4 layers are binary" in str(report)
    agreement = Agreement(2, 0, 0.0, None, 1.0, layers=2, ties=0, differing=0)
    files = Exports((Exported("packed", tmp_path / "a.safetensors", 10**6, agreement, 0.0, None),), "2 images")
    assert "compared with PyTorch on 2 images" in str(files)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_notebook_runs_and_shows_what_it_says(
    committed: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None

    execute(notebook, tmp_path)

    for now, before in zip(code_cells(notebook), code_cells(committed), strict=True):
        assert now.execution_count == before.execution_count
        assert kinds(now) == kinds(before), now.source
        assert words(now) == words(before), "python benchmarks/run_notebook.py writes the outputs anew"

    text = "".join(printed(cell) for cell in code_cells(notebook))
    assert "16 of 21 layers are binary" in text
    top1 = [float(found) for found in re.findall(r"([\d.]+)% of the test images are right", text)]
    assert len(top1) == 4
    assert top1[-1] > 55  # of ten classes; 68 to 77 in short runs
    same = re.search(r"OpenVINO: the same class as PyTorch for ([\d.]+)%", text)
    assert same
    assert float(same[1]) >= 99

    files = {path.name: path.stat().st_size for path in (tmp_path / "shipped").iterdir()}
    assert set(files) == {"first.packed.safetensors", "first.onnx", "first.xml", "first.bin"}
    assert files["first.packed.safetensors"] < 4 * 701_178 / 8  # bytes; that of its float32 parameters
    packed = dl.load(tmp_path / "shipped/first.packed.safetensors")
    shipped = dl.open_exported(tmp_path / "shipped/first.xml")
    data = dl.data.FashionMNISTSubset(batch_size=200, image_size=28)
    pixels, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        expected = packed.eval()(data.normalize(pixels))
    found = shipped(data.normalize(pixels))
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) >= 0.99
    assert float((found.argmax(1) == labels).float().mean()) > 0.5
