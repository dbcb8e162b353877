"""Run notebooks in place, each in a fresh kernel of this interpreter.

python notebooks/execute.py             # all of them
python notebooks/execute.py 01 05       # those whose names begin so
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent

#: Seconds that a cell may take: a slow machine is no fault of a notebook.
CELL_SECONDS = 600
#: Keeps progress bars out of the outputs, and tqdm's word on what it would need for nicer ones.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}

#: Colours of a stored picture: plots have few, and a third of the size does for them.
COLOURS = 96


def run(notebook: Any, directory: Path) -> None:
    """Execute a notebook's cells in order, and put their outputs in the place of the old ones.

    Args:
        notebook: as nbformat reads it; changed.
        directory: where its kernel works.

    Raises:
        CellExecutionError: a cell raised.
    """
    # No installed kernel: ipykernel's own specification starts the interpreter that runs this.
    kernel = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    NotebookClient(
        notebook, km=kernel, timeout=CELL_SECONDS, record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
    ).execute(env=os.environ | QUIET)  # fmt: skip
    tidy(notebook)


def tidy(notebook: Any) -> None:
    """Remove what differs from machine to machine, and what only repeats something."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in data:
                data["image/png"] = small(data["image/png"])
            # Of an object that shows itself as HTML the repr is noise; a table's is its text.
            if "text/html" in data and 'class="dataframe"' not in data["text/html"]:
                data.pop("text/plain", None)


def small(png: str) -> str:
    """The same picture in COLOURS colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    written = io.BytesIO()
    reduced = image.quantize(COLOURS, dither=Image.Dither.NONE)
    reduced.save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main(names: list[str]) -> None:
    """Run those whose names begin with one of `names`, or all."""
    for path in sorted(HERE.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        notebook = nbformat.read(path, as_version=4)
        began = time.monotonic()
        run(notebook, HERE)
        nbformat.write(notebook, path)
        took, size = time.monotonic() - began, path.stat().st_size / 1000
        sys.stdout.write(f"{path.name}: {took:.0f} s, {size:.0f} KB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
