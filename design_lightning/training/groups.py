"""Parameter groups: latent weights, weights with decay, and everything that decay would harm.

Decay on a norm's scale, a bias, a learned threshold or a weight binarizer's scale pulls it towards a value that means
something else than "small". Decay on latent weights brings them near zero, where signs flip often: recipes set it apart.
"""

from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from design_lightning.binary import BinaryActivation, BinaryLayer, WeightBinarizer

GROUPS = ("latent", "decay", "no_decay")
LATENT = GROUPS[0]


def parameter_groups(model: nn.Module, latent_weight_decay: float | None = None) -> list[dict[str, Any]]:
    """The trainable parameters of a model in three groups for an optimizer, always these three and in this order.

        latent    the latent weights of binary layers
        decay     the other matrices and filters
        no_decay  norms, biases, learned thresholds and scales, and what timm's `no_weight_decay` names

    Every parameter is in one group. The number of groups does not depend on the model or its stage (a group may be empty),
    so that an optimizer's state fits from stage to stage.

    Args:
        model: any module.
        latent_weight_decay: of the group `latent`; the optimizer's own where None.

    Returns:
        Dicts with `name` and `params`, and `weight_decay` where it is not the optimizer's.
    """
    named_by_timm: Any = getattr(model, "no_weight_decay", set)
    exempt = set(named_by_timm())
    group_of = _own_groups(model)
    groups: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = any(fnmatch(name, pattern) for pattern in exempt)
            default = "decay" if _is_matrix(parameter) and not is_exempt else "no_decay"
            groups[group_of.get(id(parameter), default)].append(parameter)
    result: list[dict[str, Any]] = [{"name": name, "params": parameters} for name, parameters in groups.items()]
    if latent_weight_decay is not None:
        result[0]["weight_decay"] = latent_weight_decay
    result[2]["weight_decay"] = 0.0
    return result


def _own_groups(model: nn.Module) -> dict[int, str]:
    """The parameters whose group follows from the module that they belong to."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, BinaryActivation | WeightBinarizer):
            found |= {id(parameter): "no_decay" for parameter in module.parameters()}
        if isinstance(module, BinaryLayer):
            found[id(module.weight)] = "latent"
    return found


def _is_matrix(parameter: Tensor) -> bool:
    """Whether it varies along more than one axis: a gain [O, 1, 1, 1] or [1, 1, C] is a scale."""
    return parameter.numel() > max(parameter.shape, default=1)
