"""How many images fit into memory, estimated from what waits for the backward pass: for a run that was out of it."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

COPIES = 4
"""Of the parameters: themselves, their gradients, and two averages of the optimizer."""
HEADROOM = 1.5
"""What a step takes at its peak, by what waits for the backward pass: 1.1 to 1.3 for ResNet-18 (benchmarks/results)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, on a CPU or another device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def kept_per_image(network: nn.Module, image_size: Sequence[int]) -> float:
    """Bytes an image that wait for the backward pass, by the difference between a forward of four images and of two.

    Args:
        network: in the mode it is in; its state may move, as in any forward.
        image_size: (C, H, W).
    """
    two, four = (_kept(network, (count, *image_size)) for count in (2, 4))  # batch norm wants two of them
    return (four - two) / 2


def _kept(network: nn.Module, shape: Sequence[int]) -> int:
    parameter = next(network.parameters())
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        images = torch.zeros(*shape, device=parameter.device, dtype=parameter.dtype)
        output = network(images)  # alive, so that no storage is used twice
    del output
    return sum(sizes.values())


def images_that_fit(network: nn.Module, image_size: Sequence[int], capacity: int) -> int:
    """About how many images a step may have; 0 where not even one fits.

    Args:
        network: whose forward is run on two and four images.
        image_size: (C, H, W).
        capacity: bytes of the device.
    """
    parameters = COPIES * sum(p.numel() * p.element_size() for p in network.parameters())
    count = int((capacity - parameters) / (HEADROOM * kept_per_image(network, image_size)))
    return max(count - count % 8 if count > 8 else count, 0)


def capacity_of(device: torch.device) -> int:
    """The bytes of a device's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
