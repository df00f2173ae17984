"""Pictures: what they show, and that they are written."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from design_lightning.binary import DeSign, Sign
from design_lightning.kernels import PUBLISHED, ThresholdKernel
from design_lightning.kernels.search import SearchConfig, check_figure, draw_gallery, search_kernels
from design_lightning.kernels.search.figures import standardised, through


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bits_are_those_of_the_activation(name: str) -> None:
    z = standardised(torch.rand(12, 10))
    kernel = ThresholdKernel.named(name)
    channels = z.expand(1, kernel.shape[0], 12, 10)
    assert through(kernel, z).equal(((DeSign(kernel)(channels)[0] + 1) / 2).mean(0))
    assert through(None, z).equal((Sign()(z[None, None])[0, 0] + 1) / 2)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_gallery_is_written(tmp_path: Path, suffix: str) -> None:
    kernels = {"2x2_v1": ThresholdKernel.named("2x2_v1"), "$odd$": ThresholdKernel([[0.5]])}
    draw_gallery(torch.rand(20, 30), kernels, tmp_path / f"gallery.{suffix}", "costs $1 or $2")
    assert (tmp_path / f"gallery.{suffix}").stat().st_size > 3000


@pytest.mark.parametrize(
    "config",
    [
        SearchConfig(filters=2),
        pytest.param(SearchConfig(filters=2, min_share=0, score="mse"), marks=pytest.mark.slow),
        SearchConfig(filters=2, family="shift", levels="published", min_share=0.001),
        SearchConfig("1x2", filters=2, levels=(0.3, 0.8)),
        pytest.param(SearchConfig("3x3", symmetric=True, filters=2, ties="off"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_result_is_drawn(tmp_path: Path, blobs: torch.Tensor, config: SearchConfig) -> None:
    found = search_kernels(blobs, config)
    found.draw(tmp_path / "found.png", blobs[0])
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size[0] == 1950


def test_a_figure_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"figure 'out.gif': use a name that ends in .png"):
        check_figure("out.gif")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere'"):
        check_figure(tmp_path / "nowhere" / "out.png")


def test_a_blank_image_is_drawn(tmp_path: Path) -> None:
    draw_gallery(torch.full((8, 8), 0.5), {}, tmp_path / "blank.png")
    assert (tmp_path / "blank.png").exists()
