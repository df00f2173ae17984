"""`search_kernels` on known answers: what wins, what is excluded, what does not depend on chance."""

import dataclasses
import io
import json
import resource
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from design_lightning.kernels import PUBLISHED, PUBLISHED_LEVELS, ThresholdKernel
from design_lightning.kernels.search import SCORES, ImageTensor, SearchConfig, search_kernels

LEVELS = tuple(PUBLISHED_LEVELS.values())


def number_of(config: SearchConfig, codes: tuple[int, ...]) -> int:
    base = config.candidates.levels
    return sum(code * base**i for i, code in enumerate(reversed(codes)))


@pytest.fixture(scope="module")
def clothes_ranked(clothes: torch.Tensor) -> Any:
    return search_kernels(clothes, SearchConfig(levels="published"))


class TestDeadKernels:
    """SPEC's first fact: raw total variation is highest for kernels with entries that never switch."""

    def test_they_win_where_none_is_excluded(self, clothes: torch.Tensor) -> None:
        found = search_kernels(clothes, SearchConfig(min_share=0))
        assert found.kept == found.candidates == 1296
        assert found.best.pattern in ("9 0; 0 9", "0 9; 9 0")
        assert found.best.scores["tv"] > 0.99

    @pytest.mark.parametrize("ties", ["on", "off"])
    def test_they_do_not_win_where_they_are(self, clothes: torch.Tensor, ties: str) -> None:
        found = search_kernels(clothes, SearchConfig(ties=ties))
        shares = torch.tensor(found.shares)
        for candidate in found.top:
            codes = found.config.alphabet.codes_of(candidate.kernel)
            assert codes is not None
            at = shares[torch.arange(4), torch.tensor(codes[0])]
            assert ((at >= 0.01) & (at <= 0.99)).all()
        assert "9" not in found.best.pattern

    def test_an_excluded_published_kernel_says_which_entry_it_is(self, clothes: torch.Tensor) -> None:
        v1, v2 = search_kernels(clothes, SearchConfig()).published
        assert v1.excluded == "level 0 at row 2, column 1 is on in 100.00% of its pixels"
        assert not v2.excluded

    def test_where_all_are_dead_the_way_out_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"1,296 candidates.*smaller min_share \(0 excludes none\)"):
            search_kernels(torch.ones(4, 8, 8), SearchConfig(filters=1))

    def test_the_weighted_output_prefers_checkerboards(self, clothes: torch.Tensor) -> None:
        best = search_kernels(clothes, SearchConfig(min_share=0)).best_by["weighted_tv"].pattern
        (a, b), (c, d) = (row.split() for row in best.split("; "))
        assert (a, b) == (d, c)
        assert a != b


class TestRanks:
    def test_the_best_is_the_first_by_its_score(self, clothes_ranked: Any) -> None:
        found = clothes_ranked
        for s, (name, score) in enumerate(SCORES.items()):
            kept = found.values[s][found.is_kept]
            extreme = kept.max() if score.highest else kept.min()
            assert found.best_by[name].scores[name] == pytest.approx(extreme.item(), rel=1e-6)
            assert found.best_by[name].ranks[name] == 1
        tv = [candidate.scores["tv"] for candidate in found.top]
        assert tv == sorted(tv, reverse=True)
        assert [c.ranks["tv"] for c in found.top] == sorted(c.ranks["tv"] for c in found.top)

    def test_a_published_kernel_stands_where_its_score_stands(self, clothes_ranked: Any) -> None:
        found = clothes_ranked
        assert [c.kernel.name for c in found.published] == ["2x2_v1", "2x2_v2"]
        for candidate in found.published:
            codes = found.config.alphabet.codes_of(candidate.kernel)[0]
            value = found.values[0, number_of(found.config, codes)]
            assert candidate.scores["tv"] == pytest.approx(value.item(), rel=1e-6)
            assert candidate.ranks["tv"] == 1 + int((found.values[0][found.is_kept] > value).sum())

    def test_a_kernel_stands_in_the_top_once_whatever_its_phase(self, clothes_ranked: Any) -> None:
        patterns = [c.pattern for c in clothes_ranked.top]
        for candidate in clothes_ranked.top:
            codes = clothes_ranked.config.alphabet.codes_of(candidate.kernel)[0]
            turned = clothes_ranked.config.candidates.translations(codes)
            shown = {clothes_ranked.config.alphabet.pattern(t, 2) for t in turned}
            assert len(shown & set(patterns)) == 1

    @pytest.mark.parametrize("levels", ["codes", "published"])
    @pytest.mark.parametrize("size", ["2x2", "1x3", "3x2"])
    @pytest.mark.slow
    def test_the_ranking_does_not_depend_on_the_phase(self, size: str, levels: Any) -> None:
        noise = torch.rand(
            60, 1, 28, 28, generator=torch.Generator().manual_seed(0)
        )  # alike everywhere, unlike clothes
        images = torch.nn.functional.avg_pool2d(noise, 3, stride=1)[:, 0]  # whose maps hold each phase equally often
        config = SearchConfig(size, levels=levels, keep=5, filters=8)
        found = search_kernels(images, config)
        for candidate in found.top:
            for turned in config.candidates.translations(config.alphabet.codes_of(candidate.kernel)[0]):  # type: ignore[index]
                value = found.values[0, number_of(config, turned)].item()
                assert abs(value - candidate.scores["tv"]) < 3 * candidate.errors["tv"]

    @pytest.mark.slow
    def test_the_standard_error_is_the_spread_between_sets_of_images(self, clothes: torch.Tensor) -> None:
        config = SearchConfig(keep=1, filters=4)
        parts = [search_kernels(part, config) for part in clothes.split(20)]
        found = [next(c for c in part.published if c.kernel.name == "2x2_v2") for part in parts]
        spread = torch.tensor([c.scores["tv"] for c in found]).std().item()
        assert sum(c.errors["tv"] for c in found) / len(found) == pytest.approx(spread, rel=0.5)

    def test_one_image_has_no_standard_error(self, clothes: torch.Tensor) -> None:
        found = search_kernels(clothes[:1], SearchConfig(levels="published"))
        assert found.best.errors == {}
        assert found.best.unit_errors["tv"] > 0
        assert " ± " not in found.best.shown("tv")

    def test_one_filter_or_one_image_makes_a_table_too(self, clothes: torch.Tensor) -> None:
        for images, filters in ((clothes, 1), (clothes[:1], 2), (clothes[:1], 1)):
            console = Console(width=80, file=io.StringIO())
            found = search_kernels(images, SearchConfig(levels="published", filters=filters))
            console.print(found.table())
            text = console.file.getvalue()
            assert found.best.pattern in text
            assert ("±: one standard error" in text) == (len(images) > 1)


class TestOtherShapes:
    """The published kernels of other shapes have the scores that a search of their own shape gives them."""

    @pytest.mark.parametrize("levels", ["codes", "published", "exact"])
    @pytest.mark.slow
    def test_they_score_as_in_their_own_search(self, clothes: torch.Tensor, levels: Any) -> None:
        flat, large = (
            search_kernels(clothes, SearchConfig(size, levels=levels, symmetric=size == "3x3", filters=4))
            for size in ("2x2", "3x3")
        )
        for found, there in ((flat.others, large.published), (large.others, flat.published)):
            by_name = {candidate.kernel.name: candidate for candidate in found}
            assert there
            for candidate in there:
                other = by_name[candidate.kernel.name]
                assert other.scores == pytest.approx(candidate.scores, rel=1e-9)
                assert other.errors == pytest.approx(candidate.errors, rel=1e-6)
                assert (other.pattern, other.excluded) == (candidate.pattern, candidate.excluded)
                assert other.ranks == {}

    @pytest.mark.slow
    def test_slices_are_averaged(self, clothes: torch.Tensor) -> None:
        config = SearchConfig(levels="published", filters=4)
        found = search_kernels(clothes, config)
        deep = next(c for c in found.others if c.kernel.name == "2x2x2_complement_v1")
        first, second = (
            found.values[:, number_of(config, codes)].tolist() for codes in config.alphabet.codes_of(deep.kernel) or ()
        )
        mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        assert list(deep.scores.values()) == pytest.approx(mean, rel=1e-5)

    @pytest.mark.slow
    def test_every_published_kernel_is_scored_or_named(self, clothes: torch.Tensor) -> None:
        for levels, unscored in (("codes", {"2x2x4_baseline"}), ("published", set()), ((0.2, 0.9), set())):
            found = search_kernels(clothes, SearchConfig("1x2", levels=levels, filters=2, min_share=0))  # type: ignore[arg-type]
            assert {c.kernel.name for c in found.others} == set(PUBLISHED) - unscored
            assert set(found.unscored) == unscored

    def test_kernels_larger_than_a_map_are_named(self) -> None:
        found = search_kernels(torch.rand(4, 4, 4), SearchConfig(levels="published", filters=2, min_share=0))
        assert {c.kernel.shape[1:] for c in found.others} == {(2, 2)}
        assert set(found.unscored) == {name for name in PUBLISHED if name.startswith("3x3")}


class TestSameNumbers:
    def test_a_seed_gives_the_same_search(self, clothes: torch.Tensor) -> None:
        one, other = (search_kernels(clothes, SearchConfig(filters=4)) for _ in range(2))
        assert one.to_json() == other.to_json()
        assert one.values.equal(other.values)
        assert not one.values.equal(search_kernels(clothes, SearchConfig(filters=4, seed=1)).values)

    @pytest.mark.slow
    def test_batches_and_threads_do_not_matter(self, clothes: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        config = SearchConfig(levels="published", filters=4)
        expected = search_kernels(clothes, config)
        monkeypatch.setattr("design_lightning.kernels.search.maps.PIXELS", 20_000)
        monkeypatch.setattr("design_lightning.kernels.search.ranking.CHUNK", 100)
        assert search_kernels(clothes, config).values.numpy() == pytest.approx(expected.values.numpy(), rel=1e-6)

    @pytest.mark.slow
    def test_threads_are_as_many_afterwards(self, clothes: torch.Tensor) -> None:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            search_kernels(clothes, SearchConfig(filters=1))
            with pytest.raises(ValueError, match="smaller min_share"):
                search_kernels(torch.ones(4, 8, 8), SearchConfig(filters=1))
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    @pytest.mark.slow
    def test_seeds_are_averaged(self, clothes: torch.Tensor) -> None:
        both = search_kernels(clothes, SearchConfig(filters=3, seeds=2, min_share=0))
        alone = [search_kernels(clothes, SearchConfig(filters=3, seed=seed, min_share=0)) for seed in (0, 1)]
        assert len(both.units) == 6
        mean = (alone[0].values + alone[1].values) / 2
        assert both.values.numpy() == pytest.approx(mean.numpy(), rel=1e-5, abs=1e-6)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_a_gpu_gives_the_same_search(self, clothes: torch.Tensor) -> None:
        for levels in ("codes", "published"):
            config = SearchConfig(levels=levels)  # type: ignore[arg-type]
            there = search_kernels(clothes, dataclasses.replace(config, device="cuda"))
            assert there.values.numpy() == pytest.approx(search_kernels(clothes, config).values.numpy(), abs=1e-6)
            assert there.best.pattern == search_kernels(clothes, config).best.pattern


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images() -> None:
    """Nothing of the size of all maps is ever held: 12,000 images have 200 MB of maps, and many times that of indices."""

    class Many:
        def __len__(self) -> int:
            return 12_000

        def batches(self, pixels: int) -> Any:
            image = torch.rand(1, 10, 10, generator=torch.Generator().manual_seed(0))
            size = pixels // 100
            for start in range(0, len(self), size):
                yield start, image.expand(min(size, len(self) - start), 10, 10)

    few = ImageTensor(torch.rand(3000, 10, 10))
    from design_lightning.kernels.search import Alphabet, SimulatedMaps, collect_moments

    alphabet = Alphabet.of("codes")
    collect_moments(SimulatedMaps(few, alphabet, filters=64), 2, 2, alphabet.values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    moments = collect_moments(SimulatedMaps(Many(), alphabet, filters=64), 2, 2, alphabet.values)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert moments.cells.sum() == 12_000 * 64 * 64
    assert grown < 100, f"{grown:.0f} MB"


class TestFamilies:
    @given(st.lists(st.sampled_from(LEVELS), min_size=4, max_size=4), st.integers(-7, 7), st.integers(2, 7))
    @settings(max_examples=30, deadline=None)
    def test_complement_and_shift_commute_with_tiling(self, levels: list[float], steps: int, side: int) -> None:
        kernel = ThresholdKernel([levels[:2], levels[2:]])
        mirror = dict(zip(LEVELS, reversed(LEVELS), strict=True))
        moved = {level: LEVELS[(i + steps) % 6] for i, level in enumerate(LEVELS)}
        tiled = kernel.tile(1, side, side + 1)[0]
        for derived, table in ((kernel.complement(), mirror), (kernel.shift(steps), moved)):
            expected = [[table[level] for level in _exact(row)] for row in tiled.tolist()]
            assert derived.tile(1, side, side + 1)[0].equal(torch.tensor(expected))

    @pytest.mark.parametrize(("family", "depth"), [("complement", 2), ("shift", 4)])
    @pytest.mark.slow
    def test_a_family_follows_from_its_first_slice(self, clothes: torch.Tensor, family: Any, depth: int) -> None:
        found = search_kernels(clothes, SearchConfig(levels="published", family=family, min_share=0.001))
        kernel = found.best.kernel
        assert kernel.shape == (depth, 2, 2)
        first = ThresholdKernel(kernel.levels[:1])
        rest = [first.complement()] if family == "complement" else [first.shift(i) for i in (1, 2, 3)]
        assert kernel.levels == first.levels + sum((other.levels for other in rest), ())
        assert {c.kernel.shape for c in found.published} == {(depth, 2, 2)}

    @pytest.mark.slow
    def test_a_familys_score_is_the_mean_of_its_slices(self, clothes: torch.Tensor) -> None:
        flat = search_kernels(clothes, SearchConfig(levels="published", min_share=0))
        deep = search_kernels(clothes, SearchConfig(levels="published", min_share=0, family="complement"))
        expected = (flat.values + flat.values.flip(1)) / 2  # the complement of number n is 1295 - n
        assert deep.values.numpy() == pytest.approx(expected.numpy(), rel=1e-6, abs=1e-7)

    def test_kernels_of_other_levels_are_scored_where_levels_are_thresholds(self, clothes: torch.Tensor) -> None:
        names = {"2x2x4_shifted_v1", "2x2x4_shifted_v2", "2x2x4_half_profile", "2x2x4_baseline"}
        found = search_kernels(clothes, SearchConfig(levels="published", family="shift", min_share=0))
        assert {c.kernel.name for c in found.published} == names
        found = search_kernels(clothes, SearchConfig(family="shift", min_share=0))
        assert found.unscored == ("2x2x4_baseline",)


def _exact(row: list[float]) -> list[float]:
    """Levels in float64 from a float32 row."""
    return [min(LEVELS, key=lambda level: abs(level - value)) for value in row]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": "2"}, r"size '2': give rows and columns, such as 2x2"),
            ({"size": "0x2"}, r"size '0x2'"),
            ({"size": "4x4"}, r"size 4x4 with 6 levels has 2,821,109,907,456 candidates.*smaller size"),
            ({"size": "2x2", "symmetric": True}, r"size 2x2: only 3x3 has the symmetry"),
            ({"score": "tvv"}, r"unknown score 'tvv': did you mean 'tv'"),
            ({"reference": "gray"}, r"unknown reference 'gray': did you mean 'grey'"),
            ({"family": "shifts"}, r"unknown family 'shifts': did you mean 'shift'"),
            ({"ties": "up"}, r"unknown ties 'up'"),
            ({"levels": "code"}, r"unknown levels 'code': use one of codes, published, exact"),
            ({"levels": (0.5,)}, r"levels \[0.5\]: give at least two"),
            ({"levels": (0.5, 0.2)}, r"levels \[0.5, 0.2\].*increasing order"),
            ({"min_share": 0.5}, r"min_share is 0.5, but must be at least 0 .*below 0.5"),
            ({"min_share": -0.1}, r"min_share is -0.1"),
            ({"filters": 0}, r"filters is 0, but must be at least 1"),
            ({"seeds": 0}, r"seeds is 0"),
            ({"keep": 0}, r"keep is 0"),
            ({"groups": 0}, r"groups is 0"),
            ({"seed": -1}, r"seed is -1, but must be at least 0"),
            ({"seed": 2**32}, r"seed is 4294967296"),
            ({"resamples": -1}, r"resamples is -1"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_wrong_option_is_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SearchConfig(**options)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.rand(8, 8), r"images have shape .* not \[8, 8\]"),
            (torch.rand(2, 4, 8, 8), r"not \[2, 4, 8, 8\]"),
            (torch.rand(0, 8, 8), r"not \[0, 1, 8, 8\]"),
            (torch.rand(2, 8, 8) * 255, r"lie in \[0, 1\], not in .*undo their normalisation"),
            (torch.full((2, 8, 8), float("nan")), r"lie in \[0, 1\]"),
            (torch.ones(2, 8, 8, dtype=torch.int64), r"uint8 or real numbers in \[0, 1\], not torch.int64"),
            (torch.rand(2, 2, 8), r"image 0 has 2x8 pixels, but the filters need 3x3"),
            (torch.rand(2, 3, 8), r"maps of 1x6 pixels are smaller than a kernel of 2x2"),
        ],
        ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
    )
    def test_images_that_do_not_serve_are_named(self, images: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            search_kernels(images)

    def test_constant_images_have_no_standard_deviation(self) -> None:
        with pytest.raises(ValueError, match="every image is constant"):
            search_kernels(torch.ones(4, 8, 8), SearchConfig(levels="published"))


def test_colour_images_are_their_luma() -> None:
    colour = torch.rand(6, 3, 12, 12)
    luma = (colour * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    config = SearchConfig(filters=2, min_share=0, reference="grey")
    assert search_kernels(colour, config).values.equal(search_kernels(luma, config).values)


def test_bytes_are_the_same_images_as_their_shares_of_255(clothes: torch.Tensor) -> None:
    config = SearchConfig(filters=2)
    assert search_kernels(clothes, config).values.equal(search_kernels(clothes / 255, config).values)


def test_levels_of_ones_own() -> None:
    noise = torch.rand(8, 16, 16, generator=torch.Generator().manual_seed(0))
    found = search_kernels(noise, SearchConfig(levels=(0.2, 0.9), filters=4))
    assert found.candidates == 16
    assert set(sum(found.best.kernel.levels[0], ())) <= {0.2, 0.9}
    assert [c.kernel.name for c in found.published] == ["2x2_v1", "2x2_v2"]


def test_json_holds_what_was_found(clothes: torch.Tensor, tmp_path: Any) -> None:
    found = search_kernels(clothes, SearchConfig(levels="published"))
    stored = json.loads(found.to_json(tmp_path / "found.json"))
    assert (tmp_path / "found.json").read_text() == found.to_json() + "\n"
    assert stored["candidates"] == 1296
    assert stored["top"][0]["scores"] == found.best.scores
    assert ThresholdKernel.from_json(json.dumps(stored["top"][0]["kernel"])) == found.best.kernel
    assert set(stored["best_by"]) == set(SCORES)
    assert stored["curve"][0] == [1, pytest.approx(found.best.scores["tv"])]
    assert stored["curve"][-1][0] == found.kept
