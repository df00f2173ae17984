"""`PerGroupOptimizer`: one optimizer for the latent weights and another for the rest, as one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer

from design_lightning.training.groups import LATENT


class PerGroupOptimizer(Optimizer):
    """One optimizer over the groups of `parameter_groups`: `latent` steps the latent weights, `rest` everything else.

    QuickNet trains latent weights with Adam and the rest with SGD; `Bop` needs another optimizer beside it. To schedulers,
    precision plugins and checkpoints this is one optimizer: its `param_groups` are those of both, the same dicts in the order
    given, each with the settings of the optimizer that steps it, and its state is that of both.

        optimizer:
          class_path: PerGroupOptimizer
          init_args:
            latent: {class_path: Adam, init_args: {lr: 0.01}}
            rest: {class_path: SGD, init_args: {lr: 0.1}}

    Args:
        groups: as `parameter_groups` gives them; the group named `latent` is the first optimizer's.
        latent: from parameter groups to an optimizer.
        rest: from parameter groups to an optimizer.

    Raises:
        ValueError: if there is no group `latent`, or no other.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], latent: OptimizerCallable, rest: OptimizerCallable) -> None:
        groups = list(groups)
        names = [group.get("name") if isinstance(group, dict) else None for group in groups]
        if names.count(LATENT) != 1 or len(groups) < 2:
            raise ValueError(
                f"PerGroupOptimizer takes the groups of parameter_groups(model), one of them named {LATENT!r}, not "
                f"{len(groups)} with the names {names[:4]}"
            )
        self.latent = latent([group for group in groups if group["name"] == LATENT])
        self.rest = rest([group for group in groups if group["name"] != LATENT])
        super().__init__(groups, {})
        self.state.update(self.latent.state)
        self.state.update(self.rest.state)
        self._share()

    def _share(self) -> None:
        """Gives both optimizers their part of the groups, and the one state."""
        for optimizer, is_latent in ((self.latent, True), (self.rest, False)):
            groups = [group for group in self.param_groups if (group["name"] == LATENT) == is_latent]
            optimizer.__setstate__({"state": self.state, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "latent": self.latent, "rest": self.rest}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the groups of the constructor; a later one has no place.

        Raises:
            ValueError: for a group that neither optimizer has.
        """
        if not any(param_group is group for group in (*self.latent.param_groups, *self.rest.param_groups)):
            raise ValueError(
                f"PerGroupOptimizer has its groups from the start; group {param_group.get('name')!r} cannot be added later"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of both optimizers. `closure`, if given, runs once and computes the gradients; returns its result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.latent.step()
        self.rest.step()
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`.

        Raises:
            ValueError: if the groups are not those of this optimizer.
        """
        super().load_state_dict(state_dict)
        self._share()
