"""`ThresholdKernel` as a value: immutable, comparable, derived from others, and stored as JSON."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from design_lightning.kernels import PUBLISHED, PUBLISHED_LEVELS, ThresholdKernel

LEVELS = tuple(PUBLISHED_LEVELS.values())
FROM_THE_SIX = [name for name in PUBLISHED if name != "2x2x4_baseline"]
finite = st.floats(-100, 100)


@st.composite
def arrays(draw: st.DrawFn, values: st.SearchStrategy[float] = finite) -> list:
    depth, rows, columns = draw(st.tuples(*[st.integers(1, 4)] * 3))
    return [[[draw(values) for _ in range(columns)] for _ in range(rows)] for _ in range(depth)]


class TestValue:
    def test_it_cannot_be_changed(self) -> None:
        kernel = ThresholdKernel.named("2x2_v1")
        with pytest.raises(dataclasses.FrozenInstanceError):
            kernel.levels = ()  # type: ignore[misc]
        with pytest.raises(TypeError):
            kernel.levels[0][0][0] = 1.0  # type: ignore[index]

    def test_its_tensor_is_a_copy(self) -> None:
        kernel = ThresholdKernel.named("2x2_v1")
        kernel.tensor().zero_()
        assert kernel.tensor().min() > 0

    def test_it_does_not_follow_the_tensor_it_was_made_from(self) -> None:
        levels = torch.ones(1, 2, 2, dtype=torch.float64)
        kernel = ThresholdKernel(levels)
        levels.zero_()
        assert kernel.levels == (((1.0, 1.0), (1.0, 1.0)),)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_equal_values_are_equal_and_hash_alike(self, name: str) -> None:
        one, other = ThresholdKernel.named(name), ThresholdKernel(PUBLISHED[name], name=name)
        assert one == other  # where a kernel comes from does not matter
        assert hash(one) == hash(other)
        assert len({one, other}) == 1
        assert len({ThresholdKernel.named(n) for n in PUBLISHED}) == len(PUBLISHED)
        assert one != ThresholdKernel(torch.tensor(PUBLISHED[name]) + 1, name=name)

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
    def test_copies_are_equal(self, copied: Any) -> None:
        kernel = ThresholdKernel.named("2x2x4_baseline")
        assert copied(kernel) == kernel
        assert copied(kernel).provenance == kernel.provenance

    @pytest.mark.parametrize(
        "levels",
        [
            [[1, 2], [3, 4]],
            ((1.0, 2.0), (3.0, 4.0)),
            np.array([[1, 2], [3, 4]]),
            torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]),
        ],
        ids=["list", "tuple", "array", "tensor"],
    )
    def test_levels_come_in_many_forms(self, levels: Any) -> None:
        assert ThresholdKernel(levels).levels == (((1.0, 2.0), (3.0, 4.0)),)

    def test_it_is_made_of_whatever_a_configuration_holds(self, tmp_path: Path) -> None:
        kernel = ThresholdKernel.named("3x3_symmetric_v2")
        kernel.to_json(tmp_path / "k.json")
        assert ThresholdKernel.of(kernel) is kernel
        assert ThresholdKernel.of("3x3_symmetric_v2") == kernel
        assert ThresholdKernel.of(tmp_path / "k.json") == kernel
        assert ThresholdKernel.of(str(tmp_path / "k.json")) == kernel
        assert ThresholdKernel.of(kernel.levels).levels == kernel.levels
        assert ThresholdKernel.of(kernel.tensor()).tensor().equal(kernel.tensor())

    def test_mean(self) -> None:
        assert ThresholdKernel([[0.5, 1.5], [2.0, 4.0]]).mean() == 2.0

    @pytest.mark.parametrize(
        "levels",
        [
            [[1.0, 2.0], [3.0]],
            [],
            [[]],
            [[[]]],
            [1.0, 2.0],
            2.0,
            [[[[1.0]]]],
            [["a"]],
            None,
            [[None]],
            [[float("nan")]],
            [[float("inf")]],
            [[1e300]],
        ],
        ids=str,
    )
    def test_what_is_no_array_of_finite_numbers_is_refused(self, levels: Any) -> None:
        with pytest.raises(ValueError, match=r"a kernel's levels .*not"):
            ThresholdKernel(levels)

    def test_a_wrong_name_is_answered_by_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"unknown kernel '2x2_v3'.*did you mean.*'2x2_v1'"):
            ThresholdKernel.named("2x2_v3")
        with pytest.raises(ValueError, match=r"unknown kernel 'sobel'.*2x2_v1.*JSON file"):
            ThresholdKernel.of("sobel")


class TestDerived:
    @pytest.mark.parametrize("name", FROM_THE_SIX)
    def test_the_complement_is_an_involution(self, name: str) -> None:
        kernel = ThresholdKernel.named(name)
        assert kernel.complement().levels != kernel.levels
        assert kernel.complement().complement().levels == kernel.levels

    @pytest.mark.parametrize("name", FROM_THE_SIX)
    def test_six_shifts_are_the_identity(self, name: str) -> None:
        kernel = shifted = ThresholdKernel.named(name)
        for steps in range(1, 7):
            shifted = shifted.shift()
            assert shifted.levels == kernel.shift(steps).levels
            assert (shifted.levels == kernel.levels) == (steps == 6)
            assert shifted.shift(-steps).levels == kernel.levels

    def test_the_pairs_of_the_complement(self) -> None:
        zero, one, three, five, seven, nine = LEVELS
        kernel = ThresholdKernel([list(LEVELS)])
        assert kernel.complement().levels == (((nine, seven, five, three, one, zero),),)
        assert kernel.shift().levels == (((one, three, five, seven, nine, zero),),)

    @given(arrays(st.sampled_from(LEVELS)), st.integers(-20, 20))
    @settings(max_examples=30, deadline=None)
    def test_complement_turns_a_shift_round(self, levels: list, steps: int) -> None:
        kernel = ThresholdKernel(levels)
        assert kernel.shift(steps).complement().levels == kernel.complement().shift(-steps).levels

    def test_another_alphabet_may_be_given(self) -> None:
        kernel = ThresholdKernel([[1.0, 2.0, 5.0]])
        assert kernel.complement([5.0, 1.0, 2.0]).levels == (((5.0, 2.0, 1.0),),)
        assert kernel.shift(alphabet=(1.0, 2.0, 5.0)).levels == (((2.0, 5.0, 1.0),),)

    @pytest.mark.parametrize("derive", [ThresholdKernel.complement, ThresholdKernel.shift])
    def test_a_level_outside_of_the_alphabet_is_named(self, derive: Any) -> None:
        with pytest.raises(ValueError, match=r"2x2x4_baseline.*1\.35667966.*published levels.*alphabet"):
            derive(ThresholdKernel.named("2x2x4_baseline"))
        with pytest.raises(ValueError, match=r"level 3\.0.*the given alphabet"):
            derive(ThresholdKernel([[1.0, 3.0]]), alphabet=[1.0, 2.0])


class TestJSON:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_a_kernel_comes_back_from_its_file_bit_for_bit(self, name: str, tmp_path: Path) -> None:
        kernel = ThresholdKernel.named(name)
        text = kernel.to_json(tmp_path / "kernel.json")
        for source in (tmp_path / "kernel.json", str(tmp_path / "kernel.json"), text, "\n " + text):
            stored = ThresholdKernel.from_json(source)
            assert stored == kernel
            assert stored.provenance == kernel.provenance

    @given(arrays(), st.text(), st.text())
    @settings(max_examples=30, deadline=None)
    def test_any_kernel_comes_back_from_its_text(self, levels: list, name: str, provenance: str) -> None:
        kernel = ThresholdKernel(levels, name=name, provenance=provenance)
        assert ThresholdKernel.from_json(kernel.to_json()) == kernel
        assert ThresholdKernel.from_json(kernel.to_json()).provenance == provenance

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*does not exist"):
            ThresholdKernel.of(tmp_path / "nowhere.json")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{not json", "is not JSON"),
            ("", "is not JSON"),
            ("[1, 2]", "is not a threshold kernel"),
            ('{"levels": [[1.0]]}', "is not a threshold kernel"),
            ('{"format": "design-lightning/threshold-kernel", "version": 1}', "is not a threshold kernel"),
            ('{"format": "someone-elses/kernel", "version": 1, "levels": [[1.0]]}', "is not a threshold kernel"),
        ],
    )
    def test_a_foreign_file_is_named(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "foreign.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"foreign\.json.*{message}"):
            ThresholdKernel.from_json(path)

    def test_a_binary_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "bits.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"bits\.json.*is not JSON"):
            ThresholdKernel.from_json(tmp_path / "bits.json")

    @pytest.mark.parametrize("version", [2, None, "1.0"])
    def test_another_version_is_refused(self, version: Any) -> None:
        stored = json.loads(ThresholdKernel.named("2x2_v1").to_json()) | {"version": version}
        with pytest.raises(ValueError, match=f"format version {version}.*reads 1.*update"):
            ThresholdKernel.from_json(json.dumps(stored))

    @pytest.mark.parametrize("levels", [[[1.0, 2.0], [3.0]], [], None, [[float("nan")]]], ids=str)
    def test_bad_levels_are_refused(self, levels: Any) -> None:
        stored = json.loads(ThresholdKernel.named("2x2_v1").to_json()) | {"levels": levels}
        with pytest.raises(ValueError, match="a kernel's levels"):
            ThresholdKernel.from_json(json.dumps(stored))
