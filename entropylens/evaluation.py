"""evaluate(): from a model and benchmarks to scores one can trust; resumable in a directory."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from entropylens.benchmarks import default_samples
from entropylens.completions import Completion, Journal
from entropylens.dataset_files import task_names
from entropylens.doctor import usable_cores
from entropylens.engines import open_engine
from entropylens.engines.engine import Engine
from entropylens.errors import (
    DatasetError,
    EvaluationFilesError,
    OutputDirectoryError,
    SettingError,
)
from entropylens.files import write_text
from entropylens.generation import fill
from entropylens.grading import Grade, Grader, task_gold
from entropylens.problems import Problem, Problems, Source, load_problems
from entropylens.prompts import Prompt, encode_problems, used_template
from entropylens.rundir import RunDirectory, fingerprint, open_run
from entropylens.sampling import Sampling
from entropylens.scores import Evaluation, GradedBenchmark, ks_of
from entropylens.versions import versions

__all__ = ["GRADINGS", "answer_benchmarks", "evaluate", "load_benchmarks"]

logger = logging.getLogger(__name__)

#: How answers are judged; a reasoning-gym problem always by its task's scorer.
GRADINGS = ("math", "strict")
#: As the authors' script; Table 5 has 7168 for Qwen and 3072 for Llama.
MAX_NEW_TOKENS = 8192

#: Answers handed to the judges at a time.
_CHUNK = 256
_SOURCES = "benchmarks.json"


def evaluate(
    model: Any,
    benchmarks: Sequence[str],
    *,
    num_samples: int | None = None,
    ks: Sequence[int] = (),
    num_problems: int | None = None,
    source: Source | None = None,
    sampling: Sampling | None = None,
    own_sampling: bool = False,
    template: str | None = None,
    thinking: bool | None = None,
    grading: str = "math",
    output: str | Path,
    force: bool = False,
    progress: bool = True,
    **engine: Any,
) -> Evaluation:
    """Let a model answer benchmarks, and grade it.

    The same call resumes what was interrupted; more samples or further benchmarks in the same
    directory keep what is there.

    Args:
        model: as for `engines.open_engine`.
        benchmarks: names of `benchmarks.NAMED`, files, Hub ids, or `reasoning_gym:TASK`.
        num_samples: n, answers a problem; by default 32 for AIME and 16 for others.
        ks: of Pass@K and Maj@K; by default every power of two up to n.
        num_problems: the first ones of each; by default all.
        source: columns, split and revision of the benchmarks, where they are not the usual ones.
        sampling: how answers are drawn; by default the paper's settings, 8192 tokens at most.
        own_sampling: take from the model's generation_config what it sets.
        template, thinking: see `prompts.load_prompts`.
        grading: math | strict (string equality after normalisation, as the paper's code).
        output: the directory for completions.jsonl, grades.parquet, problems.csv, scores.csv and
            evaluation.json.
        force: replace another run there.
        progress: show progress bars.
        engine: engine, dtype, device, revision, trust_remote_code, tensor_parallel and
            data_parallel, see `engines.open_engine`.

    Raises:
        EntropyLensError: its subclasses tell what is wrong and what to do.
    """
    if grading not in GRADINGS:
        raise SettingError(f"no grading {grading!r}", f"choose one of {', '.join(GRADINGS)}")
    directory, wanted = Path(output), ks_of(ks)
    asked = load_benchmarks(
        benchmarks, directory, source=source, num_problems=num_problems, force=force
    )
    for one in asked:
        n = _samples(one, num_samples)
        if wanted and wanted[-1] > n:
            raise SettingError(
                f"--k {wanted[-1]} is more than the n = {n} answers to each problem of {one.name}",
                f"draw at least {wanted[-1]} answers with -n, or lower --k",
            )
    with ExitStack() as stack:
        modes = dict.fromkeys(_mode(it, grading) for one in asked for it in one.items)
        judges = {mode: stack.enter_context(_judge(mode)) for mode in modes}
        for one in asked:
            _check_golds(one, judges, grading)
        graded = tuple(_graded(one, num_samples, judges, grading) for one in asked)
        earlier = None if force else _earlier(directory)
        if earlier is not None:
            earlier.beside(graded, wanted)  # refused before hours of answering
        opened = stack.enter_context(closing(open_engine(model, **engine)))
        run, journals = answer_benchmarks(
            opened, asked, directory, num_samples=num_samples, sampling=sampling,
            own_sampling=own_sampling, template=template, thinking=thinking, force=force,
            progress=progress,
        )  # fmt: skip
        grades = [
            _grades(one, journal, judges, grading, progress)
            for one, journal in zip(asked, journals, strict=True)
        ]
    evaluation = Evaluation(
        model=opened.name,
        fingerprint=opened.fingerprint,
        sampling=journals[0].settings
        | {"template": used_template(template, opened.tokenizer), "thinking": thinking},
        benchmarks=graded,
        grades=pd.concat(grades, ignore_index=True),
        ks=wanted,
        versions=versions(*_engine_packages(opened)),
    )
    if earlier is not None:
        evaluation = evaluation.with_others(earlier)
    evaluation.save(run.path)
    return evaluation


def load_benchmarks(
    names: Sequence[str],
    directory: Path,
    *,
    source: Source | None = None,
    num_problems: int | None = None,
    need_answers: bool = True,
    force: bool = False,
) -> list[Problems]:
    """The problems of benchmarks, of the Hub revision that a run in the directory began with.

    Args:
        names: see `evaluate`.
        directory: of the run.
        source: see `evaluate`.
        num_problems: the first ones of each; as many a reasoning-gym task makes.
        need_answers: refuse problems without a gold answer.
        force: of another revision than the run that it replaces.

    Raises:
        SettingError: none, or one of them twice.
        DatasetError: no such benchmark, or a problem that cannot be used.
    """
    if not names:
        raise SettingError("no benchmark is named", "pass --benchmark NAME")
    if num_problems is not None and num_problems < 1:
        raise SettingError(f"--num-problems is {num_problems}", "give at least 1")
    source = source or Source()
    recorded = {} if force else _recorded(directory)
    found = []
    for name, title in zip(names, task_names(names), strict=True):
        own = replace(source, revision=source.revision or recorded.get(name))
        problems = load_problems(
            name, purpose="test", source=own, need_answers=need_answers, size=num_problems or 0
        ).head(num_problems)
        if Path(name).expanduser().is_file():
            problems = replace(problems, name=title)
        if need_answers:
            for problem in problems.items:
                if problem.answer is None and problem.entry is None:
                    raise DatasetError(
                        f"dataset {problems.source!r}, row {problem.index + 1}: it has no gold "
                        "answer",
                        "mend the row, or leave it out",
                    )
        found.append(problems)
    titles = [one.name for one in found]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise SettingError(f"benchmark {twice[0]!r} is named twice", "name each once")
    return found


def answer_benchmarks(
    engine: Engine,
    benchmarks: Sequence[Problems],
    directory: Path,
    *,
    num_samples: int | None = None,
    sampling: Sampling | None = None,
    own_sampling: bool = False,
    template: str | None = None,
    thinking: bool | None = None,
    force: bool = False,
    progress: bool = True,
) -> tuple[RunDirectory, list[Journal]]:
    """Answer what is missing in a directory's completions.jsonl; arguments as for `evaluate`.

    Raises:
        OutputDirectoryError: it holds another run, or cannot be written.
        EntropyLensError: as `encode_problems` and the engine.
    """
    sampling = sampling or Sampling(max_new_tokens=MAX_NEW_TOKENS)
    if own_sampling:
        sampling = replace(sampling, **engine.suggested)
    prompts: list[tuple[Prompt, ...]] = [
        encode_problems(one, engine.tokenizer, engine.limits, template=template, thinking=thinking)
        for one in benchmarks
    ]
    settings = {
        "model": engine.fingerprint,
        **dict(engine.settings),
        **sampling.of_a_sample,
        "template": template,
        "thinking": thinking,
    }
    run = open_run(directory, settings, force=force)
    logger.info("writing to %s", run.path)
    sources = _recorded(directory) | {one.name: one.revision for one in benchmarks if one.revision}
    write_text(run.path / _SOURCES, json.dumps(sources, indent=2) + "\n")
    journals = []
    for one, asked in zip(benchmarks, prompts, strict=True):
        count = _samples(one, num_samples)
        own = replace(sampling, num_samples=count)
        journals.append(Journal(run.completions, engine, asked, own))
        logger.info("%s: %d problems, %d answers each", one.name, len(asked), count)
        fill(journals[-1], progress=progress)
    return run, journals


def _recorded(directory: Path) -> dict[str, str | None]:
    """The Hub revisions that a run here began with."""
    file = directory / _SOURCES
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputDirectoryError(
            f"{str(file)!r} is damaged ({error})", "start the run anew with --force"
        ) from error


def _graded(
    problems: Problems, num_samples: int | None, judges: Mapping[str, Grader], grading: str
) -> GradedBenchmark:
    modes = dict.fromkeys(_mode(it, grading) for it in problems.items)
    return GradedBenchmark(
        name=problems.name,
        source=problems.source,
        revision=problems.revision,
        num_problems=len(problems.items),
        num_samples=_samples(problems, num_samples),
        digest=fingerprint({"problems": [(it.key, it.answer) for it in problems.items]}),
        grader=", ".join(judges[mode].name for mode in modes),
    )


def _samples(problems: Problems, num_samples: int | None) -> int:
    return default_samples(problems.name) if num_samples is None else num_samples


def _earlier(directory: Path) -> Evaluation | None:
    """What an earlier call left in the directory; one that is torn is made anew."""
    if not (directory / "evaluation.json").is_file():
        return None
    try:
        return Evaluation.load(directory)
    except EvaluationFilesError as error:
        logger.warning("%s", error)
        return None


def _engine_packages(engine: Engine) -> list[str]:
    """The distribution that vLLM came in: it has several names."""
    if engine.settings["engine"] != "vllm":
        return []
    return importlib.metadata.packages_distributions().get("vllm", [])[:1]


def _mode(problem: Problem, grading: str) -> str:
    return grading if problem.entry is None else "reasoning_gym"


def _judge(mode: str) -> Grader:
    return Grader(mode, workers=usable_cores())


def _gold(problem: Problem) -> str:
    if problem.task is not None and problem.entry is not None:
        return task_gold(problem.task, problem.entry)
    return problem.answer or ""


def _check_golds(problems: Problems, judges: Mapping[str, Grader], grading: str) -> None:
    """Refuse a benchmark where some problem could never be answered right.

    Raises:
        DatasetError: it names the first one.
    """
    for mode, judge in judges.items():
        those = [problem for problem in problems.items if _mode(problem, grading) == mode]
        wrong = judge.unusable([_gold(problem) for problem in those])
        for place, why in sorted(wrong.items())[:1]:
            strict = ", or compare as text with --grading strict" if mode == "math" else ""
            raise DatasetError(
                f"dataset {problems.source!r}, row {those[place].index + 1}: the gold answer "
                f"{those[place].answer!r} cannot be used ({why})"
                + (f", nor {len(wrong) - 1} others" if len(wrong) > 1 else ""),
                f"mend the rows, or leave them out{strict}",
            )


def _grades(
    problems: Problems,
    journal: Journal,
    judges: Mapping[str, Grader],
    grading: str,
    progress: bool,
) -> pd.DataFrame:
    """Judge all finished answers to a benchmark: the rows of Evaluation.grades."""
    rows: list[dict[str, Any]] = []
    total = len(problems.items) * journal.sampling.num_samples
    golds = [_gold(problem) for problem in problems.items]
    completions = journal.completions()
    with tqdm(total=total, desc="grading", unit="answer", disable=not progress) as bar:
        while chunk := list(islice(completions, _CHUNK)):
            for mode, judge in judges.items():
                those = [one for one in chunk if _mode(problems.items[one.job[0]], grading) == mode]
                pairs = [(one.text or "", golds[one.job[0]]) for one in those]
                for one, grade in zip(those, judge.grade_all(pairs), strict=True):
                    rows.append(_row(problems, one, grade))
            bar.update(len(chunk))
    return pd.DataFrame(rows).sort_values(["problem", "sample"], ignore_index=True)


def _row(problems: Problems, one: Completion, grade: Grade) -> dict[str, Any]:
    return {
        "benchmark": problems.name,
        "problem": problems.items[one.job[0]].index,
        "sample": one.job[1],
        "answer": grade.answer,
        "verdict": grade.verdict,
        "num_tokens": len(one.response_ids),
        "truncated": one.truncated,
    }
