"""The search for threshold kernels: from images, or from a model's own pre-activations, to a kernel.

    found = dl.kernels.search.search_kernels("photos", SearchConfig(size="2x2", score="tv"))
    found.best.kernel.to_json("kernel.json")        # `kernel: kernel.json` in any configuration

Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.
"""

from design_lightning.kernels.search.alphabet import Alphabet
from design_lightning.kernels.search.candidates import Candidates
from design_lightning.kernels.search.config import SearchConfig
from design_lightning.kernels.search.figures import check_figure, draw_gallery, draw_result
from design_lightning.kernels.search.images import ImageFolder, ImageTensor, read_grey, read_image
from design_lightning.kernels.search.maps import MapBatch, Maps, SimulatedMaps
from design_lightning.kernels.search.moments import Moments, collect_moments, collect_moments_of_shapes
from design_lightning.kernels.search.preactivations import Preactivations
from design_lightning.kernels.search.ranking import rank_candidates
from design_lightning.kernels.search.result import Candidate, SearchResult
from design_lightning.kernels.search.scores import SCORES, Score, Scorer
from design_lightning.kernels.search.search import search_kernels, search_per_unit

__all__ = [
    "SCORES",
    "Alphabet",
    "Candidate",
    "Candidates",
    "ImageFolder",
    "ImageTensor",
    "MapBatch",
    "Maps",
    "Moments",
    "Preactivations",
    "Score",
    "Scorer",
    "SearchConfig",
    "SearchResult",
    "SimulatedMaps",
    "check_figure",
    "collect_moments",
    "collect_moments_of_shapes",
    "draw_gallery",
    "draw_result",
    "rank_candidates",
    "read_grey",
    "read_image",
    "search_kernels",
    "search_per_unit",
]
