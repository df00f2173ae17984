"""Help answers without the libraries that take seconds to import."""

import subprocess
import sys

import pytest

from design_lightning.cli import COMMANDS, main

HEAVY = ("torch", "lightning", "timm", "jsonargparse", "torchmetrics", "matplotlib", "rich")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("args", [["--help"], ["-h"], [], ["--version"]])
def test_top_level_help_imports_nothing_heavy(args: list[str]) -> None:
    out = run(
        f"import sys; from design_lightning.cli import main; main({args!r});"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert out.splitlines()[-1] == "HEAVY []"


def test_importing_the_package_imports_nothing_heavy() -> None:
    out = run(f"import sys, design_lightning as dl; dir(dl); print([m for m in {HEAVY!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_recipes_import_neither_torch_nor_lightning() -> None:
    out = run(
        "import sys; from design_lightning.cli import main; main(['recipes']);"
        "print([m for m in ('torch', 'lightning', 'timm') if m in sys.modules])"
    )
    assert out.splitlines()[-1] == "[]"


def test_help_of_fit_does_without_timm() -> None:
    out = run(
        "import sys; from design_lightning.cli import main\n"
        "try: main(['fit', '--help'])\n"
        "except SystemExit as e: print('EXIT', e.code, [m for m in ('timm', 'design_lightning.surgery') if m in sys.modules])"
    )
    assert out.splitlines()[-1] == "EXIT 0 []"
    assert "--model.help DesignClassifier" in out


def test_help_names_every_command_in_a_line_of_eighty(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, (text, _) in COMMANDS.items():
        assert any(line.split()[:1] == [name] and line.endswith(text) for line in lines)
    assert max(map(len, lines)) <= 80


def test_every_public_name_resolves() -> None:
    import design_lightning as dl

    for name in dl.__all__:
        assert getattr(dl, name) is not None
    assert set(dir(dl)) == set(dl.__all__)
    with pytest.raises(AttributeError, match="'design_lightning' has no attribute 'nothing'"):
        dl.nothing  # noqa: B018
