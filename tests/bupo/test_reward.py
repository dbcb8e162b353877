import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bupo import reward
from bupo.reward import compute_lenient_score, compute_score

from entropylens.errors import SettingError

RIGHT = {"score": 1.0, "acc": 1.0, "answered": 1.0}
WRONG = {"score": 0.0, "acc": 0.0, "answered": 1.0}
SILENT = {"score": 0.0, "acc": 0.0, "answered": 0.0}
ENTRY = json.dumps({"question": "18 and 12?", "answer": "6", "metadata": {}})


@pytest.mark.parametrize(
    ("response", "truth", "options", "expected"),
    [
        (r"\boxed{6}", "6", {}, RIGHT),
        (r"\boxed{6}", 6, {}, RIGHT),
        (r"\boxed{12/2}", "6", {}, RIGHT),
        (r"\boxed{12/2}", "6", {"mode": "strict"}, WRONG),
        (r"\boxed{7}", "6", {"time_limit": 30}, WRONG),
        ("6", "6", {}, SILENT),
        (r"\boxed{6}", "6", {"reward_router_address": None}, RIGHT),
    ],
)
def test_mathematics(
    response: str, truth: object, options: dict[str, Any], expected: dict[str, float]
) -> None:
    found = compute_score(
        data_source="qwen_math500",
        solution_str=response,
        ground_truth=truth,
        extra_info={"index": 3, "num_turns": 2},
        **options,
    )
    assert found == expected
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{6}", RIGHT),
        ("It is\n6\n", RIGHT),
        ("It is 6", WRONG),
        (r"6 or \boxed{3}", WRONG),
        ("", SILENT),
    ],
)
def test_reasoning_gym(response: str, expected: dict[str, float]) -> None:
    for info in ({"task": "gcd", "entry": ENTRY}, {"entry": ENTRY}):
        assert compute_score("reasoning_gym/gcd", response, "7", info) == expected


@pytest.mark.parametrize("info", [None, {}, {"task": "gcd"}, {"entry": {"answer": "6"}}])
def test_a_task_without_its_entry(info: dict[str, Any] | None) -> None:
    with pytest.raises(SettingError, match="holds no reasoning-gym entry"):
        compute_score("reasoning_gym/gcd", "6", "6", info)


def test_an_unknown_mode() -> None:
    with pytest.raises(SettingError, match="no grading mode"):
        compute_score("math", r"\boxed{6}", "6", mode="exact")


def test_threads_share_one_grader() -> None:
    reward._grader.cache_clear()

    def score(number: int) -> dict[str, float]:
        return compute_score("math", f"\\boxed{{{number} + 1}}", str(number + 1 + number % 2))

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(score, range(18)))
    assert found == [RIGHT, WRONG] * 9
    assert reward._grader.cache_info().currsize == 1


def test_verl_finds_and_calls_it() -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    chosen = {"path": "pkg://bupo.reward", "name": "compute_score"}
    for mode, expected in (("math", RIGHT), ("strict", WRONG)):
        kwargs = {"reward_kwargs": {"mode": mode}}
        config = OmegaConf.create({"reward": {"custom_reward_function": chosen | kwargs}})
        function = get_custom_reward_fn(config)
        assert function is not None
        found = function(
            data_source="math", solution_str=r"\boxed{12/2}", ground_truth="6", extra_info={}
        )
        assert found == expected


def test_lenient_credit_for_mentioning_the_answer():
    def score(text):
        return compute_lenient_score("sums", text, "7")

    assert score("\\boxed{7}") == {"score": 1.0, "acc": 1.0, "answered": 1.0}
    assert score("It is 7 or 8.")["score"] == 0.5
    assert score("It is 7 or 8.")["acc"] == 0.0
    assert score("It is 77 or -7.")["score"] == 0.0


def test_a_gold_that_cannot_be_judged_earns_nothing_and_is_told(caplog) -> None:
    for _ in range(2):
        told = compute_score("some", r"\boxed{7}", r"\$ \$")
        assert told == {"score": 0.0, "acc": 0.0, "answered": 0.0}
    assert [record.message.split(":")[0] for record in caplog.records] == ["a row without reward"]
