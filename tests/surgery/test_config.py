"""`BinaryConfig`: a value that checks itself, prints as YAML and comes back from it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import design_lightning as dl


def test_yaml_and_dict_round_trips() -> None:
    config = dl.BinaryConfig(
        kernel="3x3_symmetric_v1", weight="recu", skip=["first"], overrides={"layer4.*": {"weight": "sign"}, "fc": None}
    )
    assert dl.BinaryConfig.from_yaml(config.to_yaml()) == config
    assert dl.BinaryConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["format_version"] == 1


def test_is_immutable_and_default_is_the_paper_kernel() -> None:
    config = dl.BinaryConfig()
    assert config.threshold_kernel() == dl.ThresholdKernel.named("2x2_v1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kernel = "2x2_v2"  # type: ignore[misc]


def test_kernel_file_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    dl.ThresholdKernel([[0.25, 0.5]], name="mine").to_json(path)
    config = dl.BinaryConfig(kernel=str(path))
    path.unlink()
    assert dl.BinaryConfig.from_dict(config.to_dict()).threshold_kernel().levels == (((0.25, 0.5),),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "desing"}, "unknown activation 'desing': did you mean 'design'"),
        ({"kernel": "2x2_v3"}, "unknown kernel '2x2_v3': did you mean '2x2_v"),
        ({"kernel": None}, "needs a kernel"),
        ({"estimator": "aprox_sign"}, "did you mean 'approx_sign'"),
        ({"weight": "xnr"}, "did you mean 'xnor'"),
        ({"padding_value": 2}, "unknown padding_value 2: use one of 0, 1, -1, replicate"),
        ({"companion": "relu"}, "unknown companion 'relu'"),
        ({"policy": "strict"}, "unknown policy 'strict'"),
        ({"stage": "all"}, "unknown stage 'all'"),
        ({"skip": ["frist"]}, "unknown skip rule 'frist': did you mean 'first'"),
        (
            {"overrides": {"fc": {"wieght": "sign"}}},
            "override 'fc' sets 'wieght', which is no field of a layer: did you mean 'weight'",
        ),
        ({"overrides": {"fc": {"weight": "sing"}}}, "override 'fc': unknown weight binarizer 'sing'"),
        ({"weight_args": {"tau": 0.9}}, "weight_args has 'tau', which 'xnor' does not take; it takes none"),
        (
            {"estimator_args": {"clip": 3}},
            "estimator_args has 'clip', which 'approx_sign' does not take; it takes none",
        ),
        ({"scale": "a"}, "scale must be a number, not 'a'"),
        ({"skip": "first"}, "skip must be a list of rules"),
        ({"activation": "sign", "learn_kernel": True}, "learn_kernel goes with activation 'design', not with 'sign'"),
        ({"overrides": {"re:conv(": None}}, "override 're:conv\\(' is no regular expression"),
        ({"overrides": None}, "overrides must be a mapping, not None"),
        ({"overrides": ["fc"]}, r"overrides must be a mapping, not \['fc'\]"),
        ({"overrides": {1: None}}, "a pattern of overrides must be a text, not 1; put it in quotation marks"),
        ({"overrides": {"fc": "float"}}, "override 'fc' must be a mapping of fields, or null, not 'float'"),
        ({"estimator_args": None}, "estimator_args must be a mapping, not None"),
        ({"weight_args": [1]}, r"weight_args must be a mapping, not \[1\]"),
        ({"overrides": {"fc": {"weight_args": None}}}, "override 'fc': weight_args must be a mapping"),
        ({"policy": ["paper"]}, r"policy must be a name, not \['paper'\]"),
        ({"activation": ["sign"]}, r"activation must be a name, not \['sign'\]"),
        ({"weight": None}, "weight must be a name, not None"),
        ({"scale_by_gamma": "no"}, "scale_by_gamma must be true or false, not 'no'"),
        ({"overrides": {"fc": {1: 2}}}, "override 'fc' sets 1, which is no field"),
        ({"skip": 3}, "skip must be a list of rules, such as .first, last., not 3"),
        ({"skip": [["first"]]}, r"unknown skip rule \['first'\]"),
        ({"kernel": "missing.json"}, "'missing.json' does not exist"),
    ],
)
def test_errors_name_the_value_and_the_nearest(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dl.BinaryConfig(**fields)


def test_unknown_field_and_newer_format() -> None:
    with pytest.raises(ValueError, match="unknown field 'kernal' of BinaryConfig: did you mean 'kernel'"):
        dl.BinaryConfig.from_dict({"kernal": "2x2_v1"})
    with pytest.raises(ValueError, match="format version 2"):
        dl.BinaryConfig.from_dict({"format_version": 2})


def test_kernel_object_becomes_plain_numbers() -> None:
    config = dl.BinaryConfig(kernel=dl.ThresholdKernel([[0.25, 0.5]], name="mine"))  # type: ignore[arg-type]
    assert dl.BinaryConfig.from_yaml(config.to_yaml()) == config
    assert config.threshold_kernel().name == "mine"


def test_kernel_file_of_an_override_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    dl.ThresholdKernel([[0.25, 0.5]], name="mine").to_json(path)
    config = dl.BinaryConfig(overrides={"layer4.*": {"kernel": str(path)}, "fc": None})
    path.unlink()
    override = dl.BinaryConfig.from_dict(config.to_dict()).overrides["layer4.*"]
    assert override is not None
    assert config.overridden(override).threshold_kernel().levels == (((0.25, 0.5),),)
