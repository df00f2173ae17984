"""What `timm_sweep.py` asks of one architecture of timm, and the tests of some: that its binarized form works.

    architecture  a name, the smallest input that it takes, the float network
    checks        what must hold of a surgery, whatever the network
    real          up to `REAL_LIMIT` parameters: all of it with real numbers
    blocks        larger ones: shapes, and then real numbers block by block

The input is of 64 pixels or more: in smaller ones the last maps are one pixel, and there a gate cannot be told from a stream.

Parameters that timm starts at zero (or mostly: identities) get small random values first, as they have after training: a
residual branch behind a zero has no gradient, and the sign of an identity is +1 everywhere.
"""

import gc
import hashlib
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

import design_lightning as dl
from zoo.architecture import Architecture, architectures
from zoo.blocks import check_by_block
from zoo.checks import FloatFailureError
from zoo.real import check_real
from zoo.row import Row

__all__ = ["CODE", "REAL_LIMIT", "Architecture", "Row", "architectures", "check_architecture"]

REAL_LIMIT = 100_000_000


def check_architecture(name: str, config: dl.BinaryConfig | None = None, real_limit: int = REAL_LIMIT) -> Row:
    """Runs everything for one architecture; the row tells what failed, and whether the float network fails alike."""
    row = Row(name, timm=timm.__version__, torch=torch.__version__, code=CODE)
    try:
        architecture = Architecture.of(name)
        row.input = architecture.size
        row.parameters = architecture.count_parameters()
        row.numbers = "real" if row.parameters <= real_limit else "fake, real by block"
        check: Any = check_real if row.parameters <= real_limit else check_by_block
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(architecture, config or dl.BinaryConfig(), row)
        row.status = "pass"
    except FloatFailureError as error:
        row.reason = f"the float network fails alike: {error}"
    except Exception as error:
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    gc.collect()
    return row


SHOWN = ("report.py", "summary.py")
"""Of surgery: what tells a user what was done, and decides nothing."""


def _code() -> str:
    """A short hash over the sources that decide whether a row passes."""
    library = Path(dl.__file__).parent
    folders = [library / "kernels", library / "binary", library / "surgery", Path(__file__).parent]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*.py") if path.name not in SHOWN):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


CODE = _code()
"""Of the library and these checks, as this process has them."""
