"""What a bare machine lacks is named with the line that installs it."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "constraints" / "needs.sh"


def needs(python):
    return subprocess.run(["sh", SCRIPT, str(python)], capture_output=True, text=True)


def fake_python(path, version, venv):
    """A python that answers the script's questions as such an installation would."""
    path.write_text(
        '#!/bin/sh\ncase "$2" in\n'
        f"*ensurepip*) exit {0 if venv else 1};;\n"
        f"*print*) echo {version};;\n"
        f"*) test {version} = 3.11 -o {version} = 3.12;;\nesac\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "venv", "says"),
    [("3.13", True, "python3.11 python3.11-venv"), ("3.12", False, "python3.12-venv")],
)
def test_what_is_missing_is_named(tmp_path, version, venv, says):
    done = needs(fake_python(tmp_path / "python", version, venv))
    assert done.returncode == 2
    assert f"apt install {says}" in done.stderr


def test_without_any_python():
    assert "apt install python3.11" in needs("").stderr


def test_a_complete_python_passes(tmp_path):
    assert needs(fake_python(tmp_path / "python", "3.11", True)).returncode == 0
