"""Runs the notebook of examples/ from its first cell to its last, and writes what it showed into it.

    python benchmarks/run_notebook.py     # two minutes on two cores

The kernel is the Python that runs this script, whatever kernels the machine knows, and the working folder is an empty one.
"""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_network.ipynb"
INLINE = "module://matplotlib_inline.backend_inline"
"""Where matplotlib draws: into the notebook, whatever the environment says."""


def execute(notebook: NotebookNode, folder: Path, cell_timeout: int = 900) -> None:
    """Runs all cells and puts their outputs in place of the old ones.

    Args:
        notebook: changed in place.
        folder: the kernel's working folder, where what the notebook writes stays.
        cell_timeout: seconds that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises, with its traceback.
        nbclient.exceptions.CellTimeoutError: if a cell takes longer.
    """
    with tempfile.TemporaryDirectory() as own:  # settings of the user's could run code when the kernel starts
        kernel = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            transport="ipc",
            connection_file=f"{own}/kernel.json",
        )
        command = kernel.kernel_spec.argv[0]
        if command != sys.executable:
            raise RuntimeError(f"the kernel would run {command}, not {sys.executable}")
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=cell_timeout,
            record_timing=False,
            coalesce_streams=True,
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute(cleanup_kc=True, env={**os.environ, "IPYTHONDIR": own, "MPLBACKEND": INLINE})


def shrink_pictures(notebook: NotebookNode) -> None:
    """Writes the pictures with a palette of 256 colours, in half the bytes."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
            file = io.BytesIO()
            picture.convert("RGB").quantize(256).save(file, "PNG", optimize=True)
            output["data"]["image/png"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Runs it and writes it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    shrink_pictures(notebook)
    notebook.metadata = NotebookNode(metadata)  # without the version of the Python that ran it
    nbformat.write(notebook, NOTEBOOK)
    print(f"written: examples/{NOTEBOOK.name}, {NOTEBOOK.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
