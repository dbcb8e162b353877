"""Every figure looks as it did when somebody last looked at it: the images in golden/."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from matplotlib.testing.compare import compare_images
from specimens import CASES, render

GOLDEN = Path(__file__).parent / "golden"
#: Root mean square over pixels from 0 to 255. The same Matplotlib draws the same pixels; the
#: smallest thing in a figure, a single mark, is worth 0.5, and other hinting of text 10 to 40.
#: That is why another Matplotlib than the one of the constraints is not judged.
TOLERANCE = 0.3


@pytest.fixture(scope="module", autouse=True)
def _pinned_matplotlib():
    constraints = Path(__file__).parents[2] / "constraints" / "cpu.txt"
    (pinned,) = re.findall(r"^matplotlib==(\S+)", constraints.read_text(), re.MULTILINE)
    if version("matplotlib") != pinned:
        pytest.skip(f"golden images are of Matplotlib {pinned}, not {version('matplotlib')}")


@pytest.mark.parametrize("name", CASES)
def test_it_looks_as_before(name, tmp_path):
    produced = tmp_path / f"{name}.png"
    render(name, produced)
    told = compare_images(GOLDEN / f"{name}.png", produced, tol=TOLERANCE)
    assert told is None, f"look at {produced}; is it right, run tests/plots/regenerate.py\n{told}"


def test_golden_images_are_those_of_the_cases_and_small():
    images = list(GOLDEN.glob("*.png"))
    assert {path.stem for path in images} == set(CASES)
    assert max(path.stat().st_size for path in images) < 60_000
