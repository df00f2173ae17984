"""The site builds without a warning, and no link or picture of it is broken or fetched from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from blocks import ROOT


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and "href" in given and given.get("rel") not in ("canonical",):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_link_and_picture_is_there(site: Path) -> None:
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    assert len(pages) >= 18
    broken, outside = [], set()
    for path, page in pages.items():
        if path.name == "404.html":  # of a server, with links from its root
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                outside.add(link)
                if not parts.netloc or " " in link:
                    broken.append((path.name, link))
                continue
            if parts.scheme in ("mailto", "data"):
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target = target / "index.html"
            is_there = target.is_file() and (
                not parts.fragment or target.suffix != ".html" or unquote(parts.fragment) in pages[target].ids
            )
            if not is_there:
                broken.append((path.name, link))
    assert not broken
    assert len(outside) > 20


def test_reading_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [src for src in _Page(path).loaded if re.match(r"(https?:)?//", src)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:", style.read_text(encoding="utf-8"))


def test_every_recipe_is_on_its_page(site: Path) -> None:
    from design_lightning.commands.recipes import recipes

    text = (site / "recipes.html").read_text(encoding="utf-8")
    assert len(recipes()) > 20
    for name in recipes():
        assert f"<code>{name}</code>" in text


def test_every_page_has_its_own_tables(site: Path) -> None:
    cells = {
        page: re.findall(r"<th(?: [^>]*)?>([^<]*)", (site / f"{page}.html").read_text("utf-8"))
        for page in ("recipes", "scale")
    }
    assert cells["recipes"] == [
        "recipe",
        "network and data",
        "source",
        "published",
        "measured",
        "overlay",
        "what it changes",
    ]
    assert cells["scale"][:4] == ["recipe", "epochs", "of float", "1"]
    assert "published" not in cells["scale"]


def test_the_table_of_speeds_is_that_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    table = hooks.inference_table()
    assert table in (ROOT / "docs" / "export.md").read_text("utf-8"), f"docs/export.md should hold\n{table}"


def test_public_names_are_in_the_reference(site: Path) -> None:
    import design_lightning as dl
    from design_lightning import callbacks

    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    modules = {"binary", "data", "export", "kernels", "models", "surgery", "training"}
    for name in [*set(dl.__all__) - modules, *callbacks.__all__]:
        assert re.search(rf'id="[\w.]+\.{name}"', reference), name
