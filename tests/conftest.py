"""Shared fixtures: shape checks on the numeric modules, tiny models, the bundled model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

# As in a training run's processes: veRL settles on a platform when it is first asked.
os.environ |= {"VERL_USE_EXTERNAL_MODULES": "bupo.plugin", "VERL_USE_EXTERNAL_PLUGINS": "none"}

# The GPU kernel runs on Triton's interpreter, which is settled when triton is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Shapes and dtypes are checked on every call of the modules that take tensors.
install_import_hook(
    [
        "entropylens.policy",
        "entropylens.capture",
        "entropylens.batching",
        "entropylens.readings",
        "entropylens.control",
        "entropylens.kernels.fused",
        "entropylens.kernels.fused_reading",
        "entropylens.verification",
        "bupo.alignment",
        "bupo.drift",
        "bupo.layer_probe",
    ],
    "beartype.beartype",
)

import torch  # noqa: E402
from tiny import FAMILIES, tiny_model, tiny_tokenizer  # noqa: E402

torch.set_num_threads(1)  # tiny products: more threads only wait for each other


@pytest.fixture(params=FAMILIES)
def any_model(request):
    """A tiny random model of each family, in float64."""
    return tiny_model(request.param, torch.float64)


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A tiny model with a tokenizer, saved as a user would have it."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def responses():
    """Responses of mixed lengths, two of them to one prompt."""
    from entropylens.responses import Response

    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return tuple(torch.randint(0, 90, (count,), generator=generator).tolist())

    shared = ids(5)
    lengths = [(3, 9), (12, 4), (1, 1), (7, 16)]
    several = [Response(ids(prompt), ids(response)) for prompt, response in lengths]
    return [*several, Response(shared, ids(6)), Response(shared, ids(11))]


@pytest.fixture(scope="session")
def bundled_model():
    """The directory of the bundled SmolLM2, fetched where the cache has none."""
    from entropylens.demo import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, bundled_model):
    """The directory that `make demo` writes, and what it prints."""
    directory = tmp_path_factory.mktemp("demo") / "run"
    command = ["make", "demo", f"DEMO={directory}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return directory, done.stdout


@pytest.fixture(scope="session")
def entropylens():
    """Run the command line in a process of its own."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "entropylens.cli", *map(str, arguments)]
        options.setdefault("cwd", ROOT)
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run
