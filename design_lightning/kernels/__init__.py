"""Threshold kernels: the value, the published ones, the quantizer that their levels come from, the search for new ones."""

from design_lightning.kernels import search
from design_lightning.kernels.kernel import ThresholdKernel
from design_lightning.kernels.published import PUBLISHED, PUBLISHED_LEVELS
from design_lightning.kernels.quantizer import lloyd_max_half_normal
from design_lightning.kernels.tiling import Alignment, tile

__all__ = ["PUBLISHED", "PUBLISHED_LEVELS", "Alignment", "ThresholdKernel", "lloyd_max_half_normal", "search", "tile"]
