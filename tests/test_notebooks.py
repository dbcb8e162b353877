"""The notebooks run as they stand, and their committed outputs are what comes out."""

import base64
import importlib.util
import io
import itertools
import math
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from PIL import Image

pytestmark = pytest.mark.real

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

#: Most of it is a float's noise from one CPU to the next; printed digits are rounded, too.
RELATIVE, ABSOLUTE = 2e-3, 2e-3

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_PATH = re.compile(r"/(?:home|root|tmp|work|Users|private|var|usr|opt)/[\w.-]+|\b[A-Z]:\\\\")
#: Calls whose result is a picture.
_PLOTS = re.compile(r"^(?:\w+\.)*plots?\.\w+\(|\.plot\.\w+\(", re.MULTILINE)


def notebook_runner():
    """notebooks/execute.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: `stream`, and the richest form of each result."""
    return [next(iter(sorted(it.get("data", {}))), it.output_type) for it in cell.outputs]


def text_of(cell):
    """Its streams and the plain text of its results, in order."""
    parts = [it.get("text") or it.get("data", {}).get("text/plain", "") for it in cell.outputs]
    return "\n".join(part for part in parts if not part.startswith("<Figure"))


def numbers(text):
    """Each number, and what its last decimal is worth: a rounding may tip over."""
    found = _NUMBER.findall(text)
    return [(float(it), 10.0 ** -len(it.partition(".")[2]) if "." in it else 0.0) for it in found]


def everything(cell):
    """All that a cell shows, as text."""
    data = [value for it in cell.outputs for kind, value in it.get("data", {}).items()
            if kind.startswith("text")]  # fmt: skip
    return "\n".join([*data, *(it.get("text", "") for it in cell.outputs)])


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def pair(request, tmp_path_factory, bundled_model):
    """A notebook as committed, and the same run anew from its source in a copy of the folder."""
    committed = nbformat.read(request.param, as_version=4)
    folder = tmp_path_factory.mktemp("run") / "notebooks"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    fresh = nbformat.read(folder / request.param.name, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    notebook_runner().run(fresh, folder)
    return committed, fresh


def test_it_runs_and_shows_what_it_showed(pair):
    for before, now in zip(*map(code_cells, pair), strict=True):
        assert before.source == now.source
        assert kinds(before) == kinds(now), before.source
        assert before.execution_count == now.execution_count


def test_its_numbers_are_the_committed_ones(pair):
    compared = 0
    for before, now in zip(*map(code_cells, pair), strict=True):
        old, new = numbers(text_of(before)), numbers(text_of(now))
        assert len(old) == len(new), f"{before.source}\n\n{text_of(before)}\n\n{text_of(now)}"
        for (one, digit), (other, _) in zip(old, new, strict=True):
            near = max(ABSOLUTE, 1.01 * digit)
            assert math.isclose(one, other, rel_tol=RELATIVE, abs_tol=near), (
                f"{one} was committed, {other} came out of\n{before.source}"
            )
        compared += len(old)
    assert compared >= 10


def test_nothing_of_the_machine_is_in_it(pair):
    for notebook in pair:
        assert notebook.metadata.keys() == {"kernelspec", "language_info"}
        for cell in notebook.cells:
            assert not cell.metadata
            assert not _PATH.search(cell.source), cell.source
            if cell.cell_type == "code":
                assert not _PATH.search(everything(cell)), _PATH.search(everything(cell))


def test_where_it_plots_there_is_a_picture(pair):
    committed, _ = pair
    drawn = [cell for cell in code_cells(committed) if _PLOTS.search(cell.source)]
    for cell in drawn:
        shown = [it.get("data", {}) for it in cell.outputs]
        pictures = [data["image/png"] for data in shown if "image/png" in data]
        assert pictures, cell.source
        for picture in pictures:
            image = Image.open(io.BytesIO(base64.b64decode(picture)))
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors(1 << 16)) > 5  # no empty page


def test_there_are_six_of_modest_size_with_stable_ids():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, 7)]
    for path in NOTEBOOKS:
        assert path.stat().st_size < 600_000
        ids = [cell.id for cell in nbformat.read(path, as_version=4).cells]
        assert ids == [f"{path.name[:2]}-{number:02d}" for number in range(1, len(ids) + 1)]


def test_the_records_beside_them_are_small_and_of_no_machine():
    files = [path for path in (FOLDER / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path, line in itertools.chain.from_iterable(
        ((path, line) for line in path.read_text(encoding="utf-8").splitlines()) for path in files
    ):
        assert not _PATH.search(line), f"{path}: {line[:200]}"
