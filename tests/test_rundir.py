import contextlib
import errno
import json
from pathlib import Path

import pandas as pd
import pytest

from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.files import write_text, write_whole
from entropylens.rundir import distinct_names, new_directory, open_run


def ids(run):
    return [index for rows in run.finished()[0] for index in rows["response_id"]]


def rows(*ids):
    return pd.DataFrame({"response_id": ids, "layer": 1})


def test_the_same_settings_resume_and_others_are_refused(tmp_path):
    path = tmp_path / "deep" / "run"
    run = open_run(path, {"seed": 0})
    assert run.finished() == ([], [])
    run.add(rows(3, 4))
    again = open_run(path, {"seed": 0})
    assert ids(again) == [3, 4]
    with pytest.raises(OutputDirectoryError, match="a run with other settings"):
        open_run(path, {"seed": 1})
    assert open_run(path, {"seed": 1}, force=True).finished() == ([], [])


def test_force_never_touches_foreign_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(OutputDirectoryError, match="something else"):
        open_run(tmp_path, {})
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_text("drawn by hand")
    run = open_run(tmp_path, {}, force=True)
    run.add(rows(1))
    (tmp_path / "figures" / "figure2_flow.png").write_text("drawn by a run")
    open_run(tmp_path, {"other": 1}, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["mine.png"]


def test_force_starts_anew_with_the_same_settings_too(tmp_path):
    open_run(tmp_path / "run", {}).add(rows(1))
    assert open_run(tmp_path / "run", {}, force=True).finished() == ([], [])


def test_what_a_killed_write_left_aside_counts_for_nothing(tmp_path):
    run = open_run(tmp_path / "run", {})
    run.add(rows(1))
    part = next((tmp_path / "run" / "parts").iterdir())
    part.rename(part.with_name(f".{part.stem}.77.parquet"))
    assert run.finished() == ([], [])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".run.77.json").write_text("{")
    assert open_run(tmp_path / "new", {}).finished() == ([], [])


def test_a_broken_part_is_measured_again(tmp_path):
    run = open_run(tmp_path / "run", {})
    run.add(rows(1))
    run.add(rows(2))
    part = next((tmp_path / "run" / "parts").glob("*2.parquet"))
    part.write_bytes(part.read_bytes()[:40])
    assert ids(run) == [1]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputDirectoryError, match="is a file"):
        open_run(tmp_path / "file", {})
    with pytest.raises(OutputDirectoryError, match="cannot write"):
        open_run(tmp_path / "file" / "run", {})


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "layers.csv"
    write_text(path, "old")

    def full(aside: Path):
        aside.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputDirectoryError, match="No space left on device"):
        write_whole(path, full)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["layers.csv"]


def test_directories_are_new_each_time(tmp_path):
    assert new_directory("org/Model", tmp_path).name == "Model-1"
    (tmp_path / "Model-1").mkdir()
    assert new_directory("org/Model", tmp_path).name == "Model-2"
    assert new_directory("x/model.gguf", tmp_path).name == "model-1"


def test_settings_stand_in_the_directory(tmp_path):
    open_run(tmp_path / "run", {"seed": 5})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"] == {"seed": 5}


def test_a_torn_part_of_single_tokens_is_measured_again(tmp_path):
    run = open_run(tmp_path / "run", {})
    run.add(rows(1), rows(1))
    run.add(rows(2), rows(2))
    (run.path / "parts" / "tokens-00000002.parquet").write_bytes(b"torn")
    whole, single = run.finished()
    assert [frame["response_id"].tolist() for frame in whole] == [[1]]
    assert [frame["response_id"].tolist() for frame in single] == [[1]]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-Math-7B"], ("Qwen2.5-7B", "Qwen2.5-Math-7B")),
        (["mymodel", "other/mymodel"], None),
        (["a/step_1/actor", "b/step_1/actor"], ("a-step_1-actor", "b-step_1-actor")),
        (["/x/m", "../m", "m2"], None),
        (["one"], ("one",)),
        (["/x/m/", "/y/m"], ("x-m", "y-m")),
    ],
)
def test_names_are_distinct_and_stay_inside(paths, names):
    found = None
    with contextlib.suppress(SettingError):
        found = distinct_names(paths)
    if names is not None:
        assert found == names
    if found is not None:
        assert len(set(found)) == len(paths)
        assert all(name and "/" not in name and not name.startswith(".") for name in found)


def test_nothing_is_named_twice():
    for paths in (["a", "a"], ["/"], ["m", "./m"]):
        with pytest.raises(SettingError):
            distinct_names(paths)
