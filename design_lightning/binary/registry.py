"""`register`: a name in configurations for an estimator, an activation, a weight binarizer or a kernel of one's own."""

from typing import Any

from design_lightning.binary.activations import ACTIVATIONS, BinaryActivation
from design_lightning.binary.estimators import ESTIMATORS, Estimator
from design_lightning.binary.weights import WEIGHT_BINARIZERS, WeightBinarizer
from design_lightning.kernels.kernel import REGISTERED, ThresholdKernel

REGISTRIES: dict[str, tuple[type, dict[str, Any]]] = {
    "kernel": (ThresholdKernel, REGISTERED),
    "estimator": (Estimator, ESTIMATORS),
    "activation": (BinaryActivation, ACTIVATIONS),
    "weight": (WeightBinarizer, WEIGHT_BINARIZERS),
}
"""From a field of `BinaryConfig` to what it names, and the names there are."""


def register(
    name: str, value: ThresholdKernel | type[Estimator] | type[BinaryActivation] | type[WeightBinarizer]
) -> None:
    """Gives a kernel or a class a name, by which a `BinaryConfig` finds it: `kernel: name`, `estimator: name`, and so on.

    A plugin calls it when it is imported. A checkpoint holds a kernel itself, and of a class the name: it needs the plugin.

    Args:
        name: letters, digits and `_`.
        value: a `ThresholdKernel`, or a subclass of `Estimator`, `BinaryActivation` or `WeightBinarizer`.

    Raises:
        ValueError: if the name is no such name, or is taken.
        TypeError: if the value is of another kind.

    >>> register("my_checkers", ThresholdKernel([[0.3, 0.9], [0.9, 0.3]]))
    >>> ThresholdKernel.named("my_checkers").shape
    (1, 2, 2)
    """
    if not name.replace("_", "").isalnum() or name == "none":
        raise ValueError(f"{name!r} is no name to register: use letters, digits and _")
    for field, (kind, known) in REGISTRIES.items():
        if isinstance(value, kind) or (isinstance(value, type) and issubclass(value, kind)):
            taken = ThresholdKernel.find(name) if kind is ThresholdKernel else known.get(name)
            if taken is not None and not _is_same(taken, value):
                raise ValueError(f"{field} {name!r} is taken, by {taken!r}: register yours under another name")
            known[name] = value
            return
    raise TypeError(
        f"{name!r}: {value!r} is neither a ThresholdKernel nor a subclass of Estimator, BinaryActivation or WeightBinarizer"
    )


def _is_same(known: Any, value: Any) -> bool:
    """Whether it is what has the name already, perhaps of a module that was imported anew."""
    if isinstance(known, type):
        return (known.__module__, known.__qualname__) == (value.__module__, value.__qualname__)
    return bool(known == value)
