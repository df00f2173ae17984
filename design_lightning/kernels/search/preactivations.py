"""A model's own pre-activations as the maps of a search."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from design_lightning.kernels.search.maps import PIXELS, MapBatch

AsMaps = Callable[[str, Tensor], Tensor | None]


class Preactivations:
    """The inputs [B, C, H, W] of some layers of a model, in standard deviations, as maps. A unit is a layer.

    The reference is their ReLU, divided by the highest level. The model goes to eval mode, and is left in it.

    Args:
        model: what is run.
        layers: by name, the modules whose first input is collected; each must be called.
        batches: images as the model takes them [B, C, H, W]; gone through once, after a look at the first batch.
        image_count: how many images there are.
        peak: the highest level.
        least: rows and columns that a map must have; those of the kernel.
        as_maps: from a layer's name and its input to maps [B, C, H, W], or None where the input has no places in an image.
        device: where the model runs.

    Attributes:
        left_out: by name, why layers are no units.

    Raises:
        ValueError: if there is no layer left, or no image.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Iterable[Tensor],
        image_count: int,
        peak: float,
        least: tuple[int, int] = (1, 1),
        as_maps: AsMaps = lambda name, x: x if x.dim() == 4 else None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model, self._layers, self._batches = model.to(device).eval(), layers, batches
        self._peak, self._as_maps, self._device = peak, as_maps, device
        self.image_count = image_count
        self.left_out: dict[str, str] = {}
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("there are no images for the model to look at")
        seen = self._inputs(first)
        for name in layers:
            maps = seen.get(name)
            if maps is None:
                self.left_out[name] = "its input has no places in an image" if name in seen else "it is not called"
            elif maps.shape[-2] < least[0] or maps.shape[-1] < least[1]:
                self.left_out[name] = f"its maps are {maps.shape[-2]}x{maps.shape[-1]}, smaller than the kernel"
        self.units = [name for name in layers if name not in self.left_out]
        if not self.units:
            reasons = (
                "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()) or "it has no binary layer"
            )
            raise ValueError(f"{type(model).__name__} has no layer to design a kernel for: {reasons}")

    def __iter__(self) -> Iterator[MapBatch]:
        first = 0
        for batch in self._batches:
            images = torch.arange(first, first + len(batch))
            seen = self._inputs(batch)
            for unit, name in enumerate(self.units):
                maps = seen.pop(name)
                if maps is None:
                    raise ValueError(
                        f"{name}: its input had places in an image at first, and has none for image {first}"
                    )
                step = max(1, PIXELS // maps[:, 0].numel())
                for values in maps.split(step, 1):
                    reference = values.relu() / self._peak
                    yield MapBatch(values, reference, torch.full((values.shape[1],), unit), images)
            first += len(batch)

    @torch.no_grad()
    def _inputs(self, batch: Tensor) -> dict[str, Tensor | None]:
        """What each layer that is called gets, of its last call."""
        seen: dict[str, Tensor | None] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                seen[name] = self._as_maps(name, inputs[0].detach().float())

            return hook

        handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in self._layers.items()]
        try:
            self._model(batch.to(self._device))
        finally:
            for handle in handles:
                handle.remove()
        return seen
