"""Knowledge distillation: a student that learns from the outputs of a frozen network.

loss = (1 - weight) * label loss + weight * T^2 * KL(teacher || student) + attention * attention transfer
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from design_lightning.training.feature_maps import FeatureMaps, common_stages
from design_lightning.training.teacher import Normalisation, Precision, Teacher, check_name, is_file, load_network


@dataclass(frozen=True)
class Distillation:
    """What a student learns from a teacher, and from which.

    With the defaults the divergence from the teacher's probabilities takes the place of the cross entropy: the distributional
    loss of ReActNet (Liu et al., ECCV 2020, arXiv:2003.03488), whose gradient is that of the cross entropy with soft labels.
    A weight below 1 sets it beside the label loss (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015,
    arXiv:1503.02531).

    The teacher is in eval mode, has no gradients, and is part of neither the checkpoint nor the module. It gets the images that
    the student gets, mixed ones too.

    Args:
        teacher: a name of timm, or the path of a `.ckpt` of `design-train fit` or a `.safetensors` of `dl.save`.
        pretrained: whether a network of timm has timm's weights; says nothing about a file.
        weight: of the divergence, 0 to 1; the label loss has the rest.
        temperature: T, which divides the logits of both.
        attention: the weight of attention transfer; 0 leaves it out.
        attention_layers: names of modules of both networks. By default the ends of all stages that have the same reduction in
            timm's `feature_info` of both.
        precision: in which the teacher runs: `float32`, or `bfloat16` or `float16` by autocast.
        teacher_args: what else `timm.create_model` takes for the teacher, such as `{checkpoint_path: teacher.pth}`.
        mean: by which the teacher's input is normalised, a value a channel, if it learned with other values than the student's
            data has. By default those of timm's `pretrained_cfg`, if it is pretrained, or of the `.ckpt`; else the data's.
        std: the same.

    Raises:
        ValueError: if a value is out of range, nothing would be learned from the teacher, or it is unknown (names the nearest).
    """

    teacher: str
    pretrained: bool = True
    weight: float = 1.0
    temperature: float = 1.0
    attention: float = 0.0
    attention_layers: list[str] | None = None
    precision: Precision = "float32"
    teacher_args: dict[str, Any] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; it is the teacher's share of the loss, from 0 to 1")
        if self.attention < 0:
            raise ValueError(f"attention is {self.attention}; it is the weight of a loss, 0 or more")
        if self.weight == 0 and self.attention == 0:
            raise ValueError(
                "weight and attention are 0, so the teacher would teach nothing; give one of them, or no teacher"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it divides logits, so it must be above 0")
        if self.attention_layers is not None and not (self.attention and self.attention_layers):
            raise ValueError(
                f"attention_layers is {self.attention_layers} and attention {self.attention}; give layers and a weight above 0, "
                "or neither"
            )
        if self.precision not in get_args(Precision):
            raise ValueError(f"unknown precision {self.precision!r}: use one of {', '.join(get_args(Precision))}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean is {self.mean} and std {self.std}; give both, or neither")
        if is_file(self.teacher) and self.teacher_args:
            raise ValueError(f"teacher {self.teacher!r} is a file, which holds its arguments; leave teacher_args out")
        check_name(self.teacher)


class Distiller:
    """Runs a student beside its teacher, and compares them.

    Args:
        config: which teacher, and what is learned from it.
        student: the network; hooks at its stages go with attention transfer.
        num_classes: of the student.
        input_size: (C, H, W) of its images, where it is known.
        normalisation: mean and std of its images, where they are known.
        channels_last: the memory format of the teacher.

    Raises:
        ValueError: if the two do not fit.
    """

    def __init__(
        self,
        config: Distillation,
        student: nn.Module,
        num_classes: int,
        input_size: Sequence[int] | None = None,
        normalisation: Normalisation | None = None,
        channels_last: bool = False,
    ) -> None:
        self.config = config
        arguments = dict(config.teacher_args or {})
        network, own = load_network(config.teacher, config.pretrained, arguments, input_size[0] if input_size else None)
        if config.mean is not None and config.std is not None:
            own = (config.mean, config.std)
        classes = getattr(network, "num_classes", num_classes)
        if classes != num_classes:
            raise ValueError(
                f"teacher {config.teacher!r} tells {classes} classes apart, the student {num_classes}; train a teacher on the "
                "student's data, and give the path of its checkpoint"
            )
        own = self._renormalises(normalisation, own)
        self.teacher = Teacher(network, config.precision, normalisation, own, channels_last)
        self.stages = self._find_stages(student, network)
        self._student_maps = FeatureMaps(student, [name for name, _ in self.stages])
        self._teacher_maps = FeatureMaps(network, [name for _, name in self.stages])
        rank_zero_info(self._describe(normalisation, own))

    def _renormalises(self, given: Normalisation | None, own: Normalisation | None) -> Normalisation | None:
        """The teacher's mean and std, if they are not the data's."""
        if own is None or (given is not None and all(list(a) == list(b) for a, b in zip(given, own, strict=True))):
            return None
        if given is None:
            message = (
                f"the teacher {self.config.teacher!r} learned with the mean {list(own[0])} and std {list(own[1])}, but those of "
                "the data are unknown"
            )
            if self.config.mean is not None:
                raise ValueError(f"{message}; give the model its mean and std")
            rank_zero_warn(f"{message}: it gets the images as they are")
            return None
        lengths = {len(values) for values in (*given, *own)}
        if len(lengths) > 1:
            raise ValueError(
                f"the teacher {self.config.teacher!r} learned with the mean {list(own[0])} and std {list(own[1])}, but the data "
                f"has {len(given[0])} channels; give the distillation a mean and std with a value for each"
            )
        return own

    def _find_stages(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        if not self.config.attention:
            return []
        if self.config.attention_layers is not None:
            return [(name, name) for name in self.config.attention_layers]
        stages = common_stages(student, teacher)
        if not stages:
            raise ValueError(
                f"timm's feature_info knows no stages of the same reduction in {type(student).__name__} and the teacher "
                f"{self.config.teacher!r}; name layers of both as attention_layers"
            )
        return stages

    def _describe(self, given: Normalisation | None, own: Normalisation | None) -> str:
        count = sum(parameter.numel() for parameter in self.teacher.network.parameters())
        lines = [f"distillation from {self.config.teacher}: {count:,} parameters, {self.config.precision}"]
        lines.append(f"loss = {self._formula()}")
        if own is not None and given is not None:
            lines.append(f"its images are renormalised from mean {list(given[0])} and std {list(given[1])} to {own}")
        if self.stages:
            pairs = (mine if mine == its else f"{mine} after {its}" for mine, its in self.stages)
            lines.append(f"attention transfer at {', '.join(pairs)}")
        return "; ".join(lines)

    def _formula(self) -> str:
        config = self.config
        parts = [f"{config.weight:g} * divergence (temperature {config.temperature:g})"] if config.weight else []
        parts += [f"{1 - config.weight:g} * label loss"] if config.weight < 1 else []
        parts += [f"{config.attention:g} * attention"] if self.stages else []
        return " + ".join(parts)

    def __call__(self, student: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits [B, K], and the terms `distillation` and `attention`, 0-dim and without their weights.

        Raises:
            ValueError: if logits or maps of the two do not fit.
        """
        with self._student_maps.recording() as maps, self._teacher_maps.recording() as teacher_maps:
            logits, teacher_logits = student(images), self.teacher(images)
            if logits.shape != teacher_logits.shape:
                raise ValueError(
                    f"teacher {self.config.teacher!r} gives outputs {list(teacher_logits.shape)}, the student "
                    f"{list(logits.shape)}; both must be logits of the same classes"
                )
            terms = {}
            if self.config.weight:
                terms["distillation"] = divergence(logits, teacher_logits, self.config.temperature)
            if self.stages:
                distances = [
                    _attention_at(name, maps.get(name), teacher_maps.get(other)) for name, other in self.stages
                ]
                terms["attention"] = torch.stack(distances).sum()
        return logits, terms

    def weigh(self, terms: dict[str, Tensor], label_loss: Callable[[], Tensor]) -> Tensor:
        """The loss, 0-dim, of the terms and the label loss, which is asked for where it has a weight."""
        config = self.config
        parts = [config.weight * terms["distillation"]] if config.weight else []
        parts += [(1 - config.weight) * label_loss()] if config.weight < 1 else []
        parts += [config.attention * terms["attention"]] if self.stages else []
        return torch.stack(parts).sum()

    def remove(self) -> None:
        """Takes the hooks off the student."""
        self._student_maps.remove()


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * sum over classes of p * log(p / q), 0-dim, a mean over images, in float32.

    p are the teacher's probabilities softmax(logits / T), q the student's. The factor keeps the size of the gradient.

    Args:
        logits: [B, K].
        teacher_logits: [B, K].
        temperature: T.
    """
    student = F.log_softmax(logits.float() / temperature, 1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def attention_distance(features: Tensor, teacher_features: Tensor) -> Tensor:
    """The L2 distance of two attention maps, 0-dim, a mean over images, in float32.

    The map of features [B, C, H, W] is the mean over channels of their squares, divided by its L2 norm over H and W.
    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928; for binary networks Martinez et
    al., "Training Binary Neural Networks with Real-to-Binary Convolutions", ICLR 2020, arXiv:2003.11535.
    """

    def attention_map(x: Tensor) -> Tensor:
        return F.normalize(x.float().square().mean(1).flatten(1), dim=1)

    difference = attention_map(features) - attention_map(teacher_features)
    return torch.linalg.vector_norm(difference, dim=1).mean()


def _attention_at(layer: str, features: Tensor | None, teacher_features: Tensor | None) -> Tensor:
    if features is None or teacher_features is None:
        whose = "student" if features is None else "teacher"
        raise ValueError(f"attention transfer at {layer!r}: the {whose} did not run it; name other attention_layers")
    shape, other = list(features.shape), list(teacher_features.shape)
    if len(shape) != 4 or len(other) != 4 or shape[2:] != other[2:]:
        raise ValueError(
            f"attention transfer at {layer!r}: the student's features are {shape}, the teacher's {other}; they must be "
            "[B, C, H, W] of the same H and W, so name other attention_layers"
        )
    if torch.is_grad_enabled() and not features.requires_grad:
        raise ValueError(
            f"attention transfer at {layer!r}: no gradient reaches the student there (frozen layers, or re-entrant gradient "
            "checkpointing); name other attention_layers"
        )
    return attention_distance(features, teacher_features)
