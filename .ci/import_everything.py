"""Imports every module of the installed package and opens what it ships as data.

Run by `.ci/check_wheel` outside the checkout; the argument is the folder that the package must come from.
"""

import importlib
import importlib.resources
import pkgutil
import sys
from pathlib import Path

import design_lightning

site = Path(sys.argv[1]).resolve()
home = Path(design_lightning.__file__).resolve()
assert home.is_relative_to(site), f"imported from {home}, not from the wheel in {site}"
names = [module.name for module in pkgutil.walk_packages(design_lightning.__path__, "design_lightning.")]
for name in names:
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).resolve().is_relative_to(site), f"{name} comes from {module.__file__}"
for needed in ("design_lightning.callbacks", "design_lightning.configs", "design_lightning.surgery"):
    assert needed in names, f"the wheel lacks {needed}"
configs = importlib.resources.files("design_lightning.configs")
assert configs.joinpath("quickstart.yaml").is_file(), "the wheel lacks configs/quickstart.yaml"
script = importlib.resources.files("design_lightning.scripts") / "slurm" / "train.sbatch"
assert script.is_file(), "the wheel lacks scripts/slurm/train.sbatch"
data = importlib.resources.files("design_lightning.data") / "fashion_mnist_subset"
assert data.joinpath("LICENSE").is_file(), "the wheel lacks the data set's licence"
print(f"the wheel holds {len(names)} modules, all of which import")
