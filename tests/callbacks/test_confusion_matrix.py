import csv
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.callbacks import ConfusionMatrixReport

KNOWN = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 5]])
KNOWN_NAMES = ("cat", "dog", "boat")

Report = Callable[..., str]


@pytest.fixture
def report(
    plain: Callable[[nn.Module], Any],
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Report:
    """Tests somebody's module that has this matrix, and returns what the terminal shows at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(matrix: Tensor, names: Sequence[str] | None = None, callback: ConfusionMatrixReport | None = None) -> str:
        module = plain(nn.Flatten())
        module.test_confusion = matrix
        if names is not None:
            module.class_names = tuple(names)
        data = DataLoader(TensorDataset(torch.zeros(2, 3), torch.zeros(2)))
        trainer(callback or ConfusionMatrixReport(str(tmp_path))).test(module, data, verbose=False)
        return capsys.readouterr().out

    return run


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def confusion(classes: int, images: int = 50) -> Tensor:
    """Class i is recognised in a share of its images that falls with i; the rest is taken for its neighbour."""
    right = torch.linspace(images, images // 2, classes).long()
    matrix = torch.diag(right)
    matrix[torch.arange(classes), (torch.arange(classes) + 1) % classes] += images - right
    return matrix


def table(text: str, title: str) -> list[list[str]]:
    """The words of each row of a table, without its head."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    head = next(i for i, line in enumerate(lines) if i > start and line.split()[0] in ("class", "0"))
    rows = (line.split() for line in lines[head + 1 :])
    return list(itertools.takewhile(lambda words: words[0] not in ("rows:", "written:"), rows))


def test_known_matrix_gives_known_accuracies_and_mistakes(report: Report) -> None:
    text = report(KNOWN, KNOWN_NAMES)
    assert table(text, "accuracy by class") == [
        ["boat", "5", "100.0%"],
        ["cat", "10", "80.0%", "dog", "(2)"],
        ["dog", "4", "75.0%", "cat", "(1)"],
    ]
    assert table(text, "rows: the class") == [
        ["0", "cat", "8", "2", "·"],
        ["1", "dog", "1", "3", "·"],
        ["2", "boat", "·", "·", "5"],
    ]


def test_csv_files_hold_the_matrix_and_the_accuracies(report: Report, tmp_path: Path) -> None:
    report(KNOWN, KNOWN_NAMES)
    assert read(tmp_path / "confusion.csv") == [
        ["class", *KNOWN_NAMES],
        ["cat", "8", "2", "0"],
        ["dog", "1", "3", "0"],
        ["boat", "0", "0", "5"],
    ]
    assert read(tmp_path / "per_class.csv") == [
        ["class", "images", "accuracy"],
        ["cat", "10", "0.800000"],
        ["dog", "4", "0.750000"],
        ["boat", "5", "1.000000"],
    ]


@pytest.mark.parametrize("classes", [2, 10, 20, 100, 1000])
@pytest.mark.slow
def test_picture_and_terminal_keep_a_sane_size(classes: int, report: Report, tmp_path: Path) -> None:
    text = report(confusion(classes), [f"n{i:08d}" for i in range(classes)])
    assert max(len(line) for line in text.splitlines() if not line.startswith("written:")) <= 80
    assert len(text.splitlines()) < 60
    assert len(read(tmp_path / "confusion.csv")) == len(read(tmp_path / "per_class.csv")) == classes + 1
    with Image.open(tmp_path / "confusion.png") as picture:
        picture.load()
        assert all(400 <= side <= 2500 for side in picture.size)
        assert 0.8 <= picture.width / picture.height <= 1.4
        colors = picture.convert("RGB").getcolors(picture.width * picture.height)
        assert colors is not None
        assert len(colors) > 100, "the picture is empty"


@pytest.mark.parametrize("classes", [10, 100])
def test_nothing_of_the_picture_is_cut_off(classes: int, report: Report, tmp_path: Path) -> None:
    report(confusion(classes), [f"a class with a long name {i}" for i in range(classes)])
    with Image.open(tmp_path / "confusion.png") as picture:
        grey = torch.tensor(list(picture.convert("L").tobytes())).view(picture.height, picture.width)
    for border in (grey[0], grey[-1], grey[:, 0], grey[:, -1]):
        assert int(border.min()) == 255, "something touches the border"


def test_ten_classes_are_shown_as_a_matrix_at_eighty_columns(report: Report) -> None:
    matrix = confusion(10, images=1000)
    rows = table(report(matrix, [f"class{i}" for i in range(10)]), "rows: the class")
    assert [[int(cell.replace("·", "0")) for cell in row[2:]] for row in rows] == matrix.tolist()


def test_a_matrix_too_wide_for_the_terminal_is_left_to_the_files(report: Report) -> None:
    matrix = torch.full((20, 20), 1000)
    assert "rows: the class" not in report(matrix, [f"class{i}" for i in range(20)])


@pytest.mark.slow
def test_many_classes_show_the_ten_best_and_the_ten_worst(report: Report) -> None:
    text = report(confusion(100, images=1000), [f"class{i}" for i in range(100)])
    assert [row[0] for row in table(text, "accuracy by class")] == [f"class{i}" for i in [*range(10), *range(90, 100)]]
    assert "100" in text


def test_a_class_without_images_has_no_accuracy_and_comes_last(report: Report, tmp_path: Path) -> None:
    matrix = KNOWN.clone()
    matrix[0] = 0
    text = report(matrix, KNOWN_NAMES)
    assert table(text, "accuracy by class")[-1] == ["cat", "0", "-"]
    assert read(tmp_path / "per_class.csv")[1] == ["cat", "0", "nan"]


@pytest.mark.parametrize("tested", [15, 60])
def test_classes_without_images_are_not_among_the_ten_worst(tested: int, report: Report) -> None:
    matrix = confusion(100, images=1000)
    matrix[tested:] = 0
    rows = table(report(matrix, [f"class{i}" for i in range(100)]), "accuracy by class")
    assert rows[-1][0] == f"class{tested - 1}"
    assert len(rows) == min(tested, 20)


def test_names_that_look_like_markup_or_mathematics_are_shown_as_they_are(report: Report, tmp_path: Path) -> None:
    text = report(KNOWN, ("[red]", "[/dog]", "$x$_$"))
    assert {row[0] for row in table(text, "accuracy by class")} == {"[red]", "[/dog]", "$x$_$"}
    assert (tmp_path / "confusion.png").is_file()


def test_without_class_names_there_are_numbers(report: Report, tmp_path: Path) -> None:
    report(KNOWN)
    assert read(tmp_path / "confusion.csv")[0] == ["class", "0", "1", "2"]


def test_files_go_to_the_folder_of_the_run_by_default(report: Report, tmp_path: Path) -> None:
    report(KNOWN, KNOWN_NAMES, ConfusionMatrixReport())
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.csv", "confusion.png", "per_class.csv"}


def test_a_module_without_a_matrix_is_left_alone(
    plain: Callable[[nn.Module], LightningModule], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    data = DataLoader(TensorDataset(torch.zeros(2, 3), torch.zeros(2)))
    trainer(ConfusionMatrixReport()).test(plain(nn.Flatten()), data, verbose=False)
    assert not list(tmp_path.iterdir())


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None], tmp_path: Path) -> None:
    run_with_yaml("test", "ConfusionMatrixReport", "--trainer.limit_test_batches", "2", folder="reports")
    rows = read(tmp_path / "reports" / "confusion.csv")[1:]
    assert sum(int(cell) for row in rows for cell in row[1:]) == 16
