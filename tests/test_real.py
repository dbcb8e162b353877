"""The bundled SmolLM2: the oracle's numbers, and what `make demo` leaves."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import entropylens
from entropylens import Analysis
from entropylens.plots import FIGURES
from entropylens.sources import hf

pytestmark = pytest.mark.real

ORACLE = json.loads((Path(__file__).parent / "data" / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def oracle_run(bundled_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("oracle") / "responses.jsonl"
    path.write_text("\n".join(map(json.dumps, ORACLE["responses"])))
    return entropylens.analyze(bundled_model, path, reading="both", progress=False)


def test_every_number_is_the_oracles(oracle_run):
    assert oracle_run.num_tokens == ORACLE["n_tokens"]
    assert oracle_run.policy_entropy == pytest.approx(ORACLE["policy_entropy"], abs=1e-4)
    assert oracle_run.policy_nll == pytest.approx(ORACLE["policy_nll"], abs=1e-4)
    expected = pd.DataFrame(ORACLE["layers"])
    for name in expected.columns:
        bounds = {"atol": 2e-4, "rtol": 0}
        if name.startswith("rms"):
            bounds = {"rtol": 1e-4}
        elif name.startswith("cos"):
            bounds = {"atol": 1e-5, "rtol": 0}
        np.testing.assert_allclose(oracle_run.layers[name], expected[name], err_msg=name, **bounds)


def test_every_response_is_the_oracles(oracle_run):
    seen = oracle_run.responses.pivot(index="response_id", columns="layer", values="delta_ffn")
    np.testing.assert_allclose(seen, np.array(ORACLE["delta_ffn_per_response"]), atol=2e-4)


def test_the_rule_has_nothing_to_say_and_says_so(oracle_run):
    found = oracle_run.recommendation
    assert found.layer is None
    assert found.paper_rule_layer is None
    assert found.applies == "no"
    assert oracle_run.stages.convergence == (1, 30)
    assert "30 of 30 layers clearly negative" in found.reason
    assert "norm effect" in found.reason
    assert "Too few prompts: 8" in found.reason


def test_the_control_reproduces_the_profile(oracle_run):
    frame = oracle_run.layers
    assert np.corrcoef(frame["delta_ffn"], frame["control_delta_ffn"])[0, 1] > 0.98
    assert (np.sign(frame["delta_ffn"]) == np.sign(frame["control_delta_ffn"])).all()


def test_the_bundled_tokenizer_is_mended(bundled_model):
    subject = hf.load(bundled_model)
    tokenizer = subject.tokenizer
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    ids = tokenizer.encode("12345 + 6.")
    assert len(ids) >= 8  # a token a digit
    assert tokenizer.decode(ids) == "12345 + 6."
    assert max(subject.verification.stream_errors) < 1e-6


def test_the_demo_says_what_it_found(demo_run):
    directory, printed = demo_run
    analysis = Analysis.load(directory)
    assert analysis.model == "SmolLM2-135M-Instruct"
    assert analysis.num_responses == analysis.num_prompts == 24
    text = " ".join(printed.split())
    assert "Train first (raw reading): no layer" in text
    assert "SmolLM2-135M-Instruct: 24 responses" in text
    assert f"{analysis.num_tokens} tokens" in text
    assert printed.count("convergence") == 30
    assert (directory / "report.html").stat().st_size > 100_000
    assert len(list((directory / "figures").iterdir())) == 2 * len(FIGURES)


def test_a_real_model_is_evaluated(bundled_model, entropylens, tmp_path):
    """20 problems of reasoning-gym in a file of one's own; SmolLM2 boxes next to nothing."""
    import reasoning_gym

    made = reasoning_gym.create_dataset("gsm_symbolic", size=20, seed=1)
    path = tmp_path / "gsm_symbolic.jsonl"
    path.write_text(
        "\n".join(json.dumps({"question": it["question"], "answer": it["answer"]}) for it in made)
    )
    done = entropylens(
        "evaluate", bundled_model, "--benchmark", path, "-n", 4, "--max-new-tokens", 24,
        "--engine", "hf", "-o", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "20 problems" in done.stdout
    scores = pd.read_csv(tmp_path / "run" / "scores.csv")
    assert scores["metric"].tolist() == ["avg@k", *["pass@k"] * 3, *["maj@k"] * 3]
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    answers = list(map(json.loads, lines))
    assert len(answers) == 80
    # Each problem's answers are its own, and they are English.
    assert len({tuple(it["response_ids"]) for it in answers}) > 70
    assert sum(" the " in it["text"] for it in answers) > 20
    truncated = sum(it["truncated"] for it in answers) / 80
    assert scores["truncated"].iloc[0] == pytest.approx(truncated)
