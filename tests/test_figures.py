"""The scripts of figures/, their table, and the paper's models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model

import entropylens
from entropylens.plots import PICTURES
from entropylens.plots.style import display_name
from entropylens.plots.tables import TABLES
from entropylens.templates import TEMPLATES

FIGURES = Path(__file__).parents[1] / "figures"
ROW = re.compile(
    r"^\| (?P<numbers>[^|]+) \| \[(?P<script>\w+\.py)\]\((?P<link>\w+\.py)\) "
    r"\| `entropylens plot DIR\.\.\. --figure (?P<figure>\w+)` \|",
    re.MULTILINE,
)
ROWS = [match.groupdict() for match in ROW.finditer((FIGURES / "README.md").read_text())]
MODELS = yaml.safe_load((FIGURES / "paper_models.yaml").read_text())


def run(script, *arguments):
    command = [sys.executable, FIGURES / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("analyzed")
    lines = [{"prompt_ids": [i, 5], "response_ids": [7, i, 9]} for i in range(2, 8)]
    entropylens.analyze(tiny_model("llama"), lines, progress=False).save(directory)
    return directory


def test_every_figure_of_the_package_has_its_row():
    told = {tuple(row["numbers"].split(", ")) for row in ROWS}
    assert told == {picture.numbers for picture in PICTURES} | {(name,) for name in TABLES}


@pytest.mark.parametrize("row", ROWS, ids=[row["script"] for row in ROWS])
def test_a_row_names_its_script_and_the_command_that_it_equals(row):
    assert row["link"] == row["script"]
    assert row["figure"] in row["numbers"].split(", ")
    assert f'main("{row["figure"]}")' in (FIGURES / row["script"]).read_text()


def test_no_script_is_left_out():
    scripts = {path.name for path in FIGURES.glob("[!_]*.py")}
    assert scripts == {row["script"] for row in ROWS}


def test_a_script_draws_what_the_command_draws(analyzed, entropylens, tmp_path):
    done = run("figure3.py", analyzed, "-o", tmp_path / "script", "--columns", 1)
    assert done.returncode == 0, done.stderr
    written = [tmp_path / "script" / f"figure3_change.{kind}" for kind in ("png", "pdf")]
    assert done.stdout.split() == list(map(str, written))
    command = tmp_path / "command"
    entropylens("plot", analyzed, "--figure", 3, "-o", command, "--columns", 1)
    assert written[0].read_bytes() == (command / "figure3_change.png").read_bytes()


def test_a_script_says_what_to_run_where_its_input_is_missing(analyzed, tmp_path):
    done = run("figure4.py", analyzed, "-o", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: figure 4 is drawn from runs, and none is named: make one: "
        "entropylens train --config NAME -o DIR\n"
    )
    done = run("table1.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: '{tmp_path}' holds no finished result: name directories that analyze, train or "
        "evaluate wrote\n"
    )


def test_help_says_what_the_figure_shows():
    told = " ".join(run("figure8.py", "--help").stdout.split())
    assert "Figure 8: residual cosine similarity" in told
    assert "--figure" not in told


def test_models_are_called_what_the_paper_calls_them():
    assert len(MODELS["models"]) == 12
    for model in MODELS["models"]:
        assert display_name(model["hub_id"]) == model["name"]
        assert model["template"] in TEMPLATES
        assert model["type"] in ("Mix", "Base", "Instruct")
        assert model["layers"] in range(28, 41)
        assert set(model) <= {"name", "hub_id", "type", "layers", "template", "max_new_tokens"}
