import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from grading_cases import CASES, KNOWN_LIMITS
from hypothesis import given, settings
from hypothesis import strategies as st

from entropylens import grading_process
from entropylens.errors import EntropyLensError, SettingError
from entropylens.grading import Grade, Grader, task_gold

TOWER = r"9^{9^{9^{9}}}"  # one product of integers that no Python code can interrupt
ENDLESS = rf"\gcd({TOWER}, 3)"  # computed as soon as it is read, even if equal to the other
NESTED = r"\frac{1}{" * 60 + "2" + "}" * 60  # exponential in the parser
EQUAL = r"\boxed{\frac{10}{20}}"  # right only by mathematics, so that a worker is asked
DATA = Path(__file__).parents[1] / "../shared/data"  # the evaluation and training sets, if here


def box(answer: str) -> str:
    return f"so it is \\boxed{{{answer}}}."


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process ends in time; an unreaped one has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def wait_until_busy(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has begun a task that takes long."""
    worker = psutil.Process(process.pid)
    before = worker.cpu_times().user
    while worker.cpu_times().user < before + 0.3:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(time_limit=60) as grader:
        yield grader


@pytest.fixture(scope="module")
def hasty() -> Iterator[Grader]:
    with Grader(time_limit=1.0) as grader:
        yield grader


@pytest.fixture(scope="module")
def judges() -> Iterator[Grader]:
    with Grader(time_limit=60, workers=2) as grader:
        yield grader


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The worker processes in the order of their start."""
    processes: list[subprocess.Popen[bytes]] = []
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen

    def start(*command: object, **options: object) -> subprocess.Popen[bytes]:
        processes.append(popen(*command, **options))
        return processes[-1]

    monkeypatch.setattr(grading_process.subprocess, "Popen", start)
    return processes


def case_id(value: str) -> str:
    return value[:40]


@pytest.mark.parametrize(("response", "gold", "verdict"), CASES + KNOWN_LIMITS, ids=case_id)
def test_verdicts(grader: Grader, response: str, gold: str, verdict: str) -> None:
    grade = grader.grade(response, gold)
    assert grade.verdict == verdict
    assert grade.correct == (verdict == "correct")
    assert (grade.answer is None) == (verdict == "no answer")


def test_what_reads_like_the_gold_asks_no_worker(started: list[subprocess.Popen[bytes]]) -> None:
    with Grader() as grader:
        assert grader.grade(r"\boxed{\dfrac12}", "1/2") == Grade(r"\dfrac12", "correct")
    assert started == []


def test_strict_mode_never_asks(started: list[subprocess.Popen[bytes]]) -> None:
    with Grader("strict") as grader:
        assert grader.grade(EQUAL, "0.5").verdict == "wrong"
        assert grader.grade(box("1/2"), "0.5").verdict == "correct"
        assert grader.grade("none", "0.5").verdict == "no answer"
    assert started == []


@pytest.mark.parametrize("answer", [TOWER, NESTED])
def test_a_hang_is_ended_and_the_next_answer_judged(
    answer: str, started: list[subprocess.Popen[bytes]]
) -> None:
    with Grader(time_limit=4.0) as grader:
        assert grader.grade(EQUAL, "0.5").correct
        begun = time.monotonic()
        assert grader.grade(box(answer), "5") == Grade(answer, "timeout")
        assert 4.0 <= time.monotonic() - begun < 15.0
        assert gone(started[0].pid, 0.1)
        assert grader.grade(EQUAL, "0.5").correct
        assert len(started) == 2
    assert gone(started[1].pid, 0.1)


def test_a_worker_that_stands_still_is_ended(started: list[subprocess.Popen[bytes]]) -> None:
    with Grader(time_limit=2.0) as grader:
        assert grader.grade(EQUAL, "0.5").correct
        started[0].send_signal(signal.SIGSTOP)
        assert grader.grade(box("9" * 300_000), "5").verdict == "timeout"  # more than a pipe holds


def test_a_killed_worker_counts_as_crashed(started: list[subprocess.Popen[bytes]]) -> None:
    with Grader(time_limit=60.0) as grader, ThreadPoolExecutor(1) as threads:
        assert grader.grade(EQUAL, "0.5").correct
        grade = threads.submit(grader.grade, box(TOWER), "5")
        wait_until_busy(started[0])
        os.kill(started[0].pid, signal.SIGKILL)
        assert grade.result(30) == Grade(TOWER, "crashed")
        assert grader.grade(EQUAL, "0.5").correct
        started[1].kill()  # an idle one is replaced without a loss
        assert gone(started[1].pid)
        assert grader.grade(EQUAL, "0.5").correct
        assert len(started) == 3


def test_closing_ends_what_is_judged(started: list[subprocess.Popen[bytes]]) -> None:
    grader = Grader(time_limit=60.0)
    with ThreadPoolExecutor(1) as threads:
        assert grader.grade(EQUAL, "0.5").correct
        grade = threads.submit(grader.grade, box(TOWER), "5")
        wait_until_busy(started[0])
        grader.close()
        assert grade.result(30).verdict == "crashed"
    assert gone(started[0].pid, 0.1)
    assert len(started) == 1
    grader.close()


def test_many_threads_share_the_workers(started: list[subprocess.Popen[bytes]]) -> None:
    tasks = [(f"\\boxed{{{n} + 1}}", str(n + 1 + n % 2)) for n in range(40)]
    with Grader(time_limit=60.0, workers=2) as grader:
        barrier = threading.Barrier(8)

        def grade(part: int) -> list[bool]:
            barrier.wait()
            return [grader.grade(*task).correct for task in tasks[part::8]]

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(grade, range(8)))
    assert found == [[n % 2 == 0 for n in range(part, 40, 8)] for part in range(8)]
    assert len(started) == 2


def test_grades_come_in_order_and_one_hang_stops_no_other() -> None:
    pairs = [(box(f"{n}+{n}"), str(2 * n)) for n in range(1, 12)]
    pairs[3] = (box(TOWER), "5")
    with Grader(time_limit=5.0, workers=2) as grader:
        grades = grader.grade_all(pairs)
    verdicts = ["correct"] * 11
    verdicts[3] = "timeout"
    assert [grade.verdict for grade in grades] == verdicts
    assert [grade.answer for grade in grades[:2]] == ["1+1", "2+2"]


def grade_in_child(grader: Grader, code: int) -> None:
    assert multiprocessing.current_process().daemon
    right = grader.grade(EQUAL, "0.5").correct and Grader().grade(EQUAL, "0.5").correct
    sys.exit(code if right else 1)  # runs what ends with the interpreter, unlike os._exit


def test_a_forked_daemonic_process_starts_its_own(started: list[subprocess.Popen[bytes]]) -> None:
    with Grader(time_limit=60.0) as grader:
        assert grader.grade(EQUAL, "0.5").correct
        context = multiprocessing.get_context("fork")
        child = context.Process(target=grade_in_child, args=(grader, 7), daemon=True)
        child.start()
        child.join(120)
        assert child.exitcode == 7
        assert started[0].poll() is None
        assert grader.grade(EQUAL, "0.5").correct
        assert len(started) == 1


@pytest.mark.parametrize("answer", ["5", TOWER])
def test_workers_end_when_their_parent_is_killed(answer: str) -> None:
    program = f"""
import os, subprocess, threading, time
from entropylens import grading_process
from entropylens.grading import Grader
started = []
class Recorded(subprocess.Popen):
    def __init__(self, *command, **options):
        super().__init__(*command, **options)
        started.append(self)
grading_process.subprocess.Popen = Recorded
grader = Grader(time_limit=1.0)
assert grader.grade({EQUAL!r}, "0.5").correct
threading.Thread(target=grader.grade, args=(r"\\boxed{{{answer}}}", "7"), daemon=True).start()
time.sleep(0.5)
print(started[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert gone(int(done.stdout))


@settings(max_examples=50, deadline=None)
@given(
    answer=st.text(max_size=20) | st.text("\\frac{}0123456789+-*/^_()=<>., xpi", max_size=20),
    gold=st.text(max_size=10) | st.sampled_from(["5", r"\frac{1}{2}", r"x \in [1,2]"]),
)
def test_any_text_is_graded(hasty: Grader, answer: str, gold: str) -> None:
    for response in (answer, f"\\boxed{{{answer}}}"):
        try:
            assert hasty.grade(response, gold).verdict != "crashed"
        except SettingError:
            assert hasty.unusable([gold])


@pytest.mark.parametrize("answer", ["\ud800", "\x00", "\n", "9" * 5000, "(" * 2000])
def test_odd_answers_are_wrong(hasty: Grader, answer: str) -> None:
    assert not hasty.grade(f"\\boxed{{{answer}}}", "5").correct


@pytest.mark.parametrize(
    "options",
    [{"mode": "exact"}, {"time_limit": 0.0}, {"time_limit": float("nan")}, {"workers": 0}],
)
def test_settings_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Grader(**options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no SymPy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader() as grader, pytest.raises(SettingError, match="pip install math-verify"):
        grader.grade(EQUAL, "0.5")


def test_workers_that_do_not_start_are_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader() as grader:
        for python, says in [("false", "ended at once"), ("/nowhere", "No such file")]:
            monkeypatch.setattr(sys, "executable", python)
            with pytest.raises(EntropyLensError, match=says):
                grader.grade(EQUAL, "0.5")


@pytest.mark.parametrize("gold", ["", " \n", "}", r"\$", r"\text{}", "$" * 100])
def test_a_gold_in_which_nothing_is_found_is_an_error(grader: Grader, gold: str) -> None:
    with pytest.raises(SettingError) as raised:
        grader.grade(box("5"), gold)
    found = re.fullmatch(
        r"the gold answer '(.*)' cannot be used in mode math \(Math-Verify finds nothing in it\): "
        r"mend the gold answer, or grade with mode strict",
        str(raised.value),
    )
    assert found
    assert len(found[1]) <= 60
    assert grader.grade(EQUAL, "0.5").correct


def test_golds_that_math_cannot_use(started: list[subprocess.Popen[bytes]]) -> None:
    golds = ["5", "", r"\text{}", " \n", ENDLESS, r"\text{Evelyn}", "x = 3", "'"]
    with Grader(time_limit=5.0, workers=2) as grader:
        assert grader.unusable([]) == {}
        assert grader.unusable(golds) == {
            1: "it is blank",
            2: "Math-Verify finds nothing in it",
            3: "it is blank",
            4: "judging it takes longer than the time limit",
            7: "Math-Verify finds nothing in it",
        }
        assert len(started) >= 2


def test_a_gold_that_crashes_the_judge_is_unusable(started: list[subprocess.Popen[bytes]]) -> None:
    with Grader(time_limit=60.0) as grader, ThreadPoolExecutor(1) as threads:
        assert grader.unusable(["5"]) == {}
        faults = threads.submit(grader.unusable, ["5", ENDLESS, "6"])
        wait_until_busy(started[0])
        started[0].kill()
        assert faults.result(30) == {1: "judging it ends the judge"}


def test_golds_that_strict_cannot_use(started: list[subprocess.Popen[bytes]]) -> None:
    golds = ["5", "", "\n ", r"\$", TOWER, "'"]
    blank, nothing = "it is blank", "normalization leaves nothing of it"
    assert Grader("strict").unusable(golds) == {1: blank, 2: blank, 3: nothing}
    assert started == []


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets at {DATA}")
@pytest.mark.parametrize(
    ("name", "every"),
    [
        *(("math500", 1), ("amc2023", 1), ("aime_2024", 1), ("aime_2025", 1)),
        ("deepmath-5k", 10),  # thinned: its 5000 rows take many times as long as all others
    ],
)
def test_golds_of_the_data_sets_answer_themselves(judges: Grader, name: str, every: int) -> None:
    rows = pd.read_parquet(DATA / f"{name}.parquet")["reward_model"][::every]
    golds = [row["ground_truth"] for row in rows]
    assert golds
    assert {golds[place]: fault for place, fault in judges.unusable(golds).items()} == {}


COUNTDOWN = task_gold(
    "countdown",
    '{"question": "?", "answer": "94*4 - 61 - 6", '
    '"metadata": {"numbers": [94, 4, 61, 6], "target": 309}}',
)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Grader]:
    with Grader("reasoning_gym", time_limit=60.0) as grader:
        yield grader


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("94*4 - 61 - 6", "94*4 - 61 - 6", "correct"),
        ("I try:\n\n 94*4-6-61 \n", "94*4-6-61", "correct"),
        (r"\boxed{4*94-61-6} it is", "4*94-61-6", "correct"),
        (r"94*4 - 61 - 6 or \boxed{1}", "1", "wrong"),
        ("309", "309", "wrong"),
        ("by adding", "by adding", "wrong"),
        (" \n", None, "no answer"),
    ],
)
def test_a_task_is_scored_by_reasoning_gym(
    scorer: Grader, response: str, answer: str | None, verdict: str
) -> None:
    assert scorer.grade(response, COUNTDOWN) == Grade(answer, verdict)


def test_partial_credit_is_wrong(scorer: Grader) -> None:
    gold = task_gold("gcd", '{"question": "?", "answer": "56", "metadata": {}}')
    assert scorer.grade("56", gold).correct
    assert not scorer.grade("the answer is 56", gold).correct


@pytest.mark.parametrize(
    "gold",
    ["5", "{}", task_gold("no_such_task", "{}"), task_gold("countdown", "{"), '{"task": "gcd"}'],
)
def test_a_gold_that_is_no_task_is_an_error(scorer: Grader, gold: str) -> None:
    with pytest.raises(SettingError, match=r"cannot be used in mode reasoning_gym .*task_gold"):
        scorer.grade("5", gold)
    assert scorer.grade("94*4 - 61 - 6", COUNTDOWN).correct


def entry(answer: object) -> str:
    """An entry of the task gcd, which is right at 6."""
    return json.dumps({"question": "18 and 12?", "answer": answer, "metadata": {}})


def test_golds_that_a_task_cannot_use(scorer: Grader) -> None:
    golds = [
        COUNTDOWN,
        "",
        "5",
        task_gold("no_such_task", entry("6")),
        task_gold("gcd", entry("6")),
        task_gold("gcd", "{}"),
        # Many answers are right in some tasks: their entries name none.
        task_gold("graph_color", entry(None)),
        COUNTDOWN.replace("61 - 6", "61 - 7"),
    ]
    faults = scorer.unusable(golds)
    assert list(faults) == [1, 2, 3, 5, 7]
    assert faults[1] == "it is blank"
    assert "no_such_task" in faults[3]
    assert faults[5] == "KeyError: 'answer'"
    assert faults[7] == "it does not answer itself"


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w').write('x')",
        "__import__('os').system('touch {path}')",
        "__import__('subprocess').run(['touch', {path!r}])",
        "__import__('os').open({path!r}, 64 | 1)",
        "__import__('pathlib').Path({path!r}).mkdir()",
        "__import__('os').rmdir({kept!r})",
        "__import__('shutil').rmtree({kept!r})",
    ],
)
def test_an_answer_that_is_code_touches_nothing(
    scorer: Grader, attempt: str, tmp_path: Path
) -> None:
    kept, path = tmp_path / "kept", tmp_path / "touched"
    kept.mkdir()
    assert not scorer.grade(attempt.format(path=str(path), kept=str(kept)), COUNTDOWN).correct
    assert list(tmp_path.iterdir()) == [kept]


def test_a_scorer_that_hangs_is_ended() -> None:
    with Grader("reasoning_gym", time_limit=1.0) as grader:
        assert grader.grade("9**9**9**9", COUNTDOWN).verdict == "timeout"


@pytest.mark.parametrize("rest", ["", " + __import__('time').sleep(1)"])
def test_an_answer_cannot_reply_for_its_judge(rest: str) -> None:
    forged = """__import__('os').write(3, b'{"correct": true}\\n')""" + rest
    with Grader("reasoning_gym") as grader:
        assert grader.grade(forged, COUNTDOWN).verdict == "crashed"
        # Nor for those that come after it.
        assert grader.grade("94*4 - 61 - 6", COUNTDOWN).correct
        assert not grader.grade("94*4 - 61 - 7", COUNTDOWN).correct
