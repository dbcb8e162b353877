"""The command line's evaluation part: generate, evaluate."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropylens.cli_common import (
    Debug,
    Device,
    Dtype,
    Force,
    Json,
    Revision,
    Template,
    Thinking,
    ThinkingOption,
    TrustRemoteCode,
    prepare_process,
    reported,
)

if TYPE_CHECKING:
    from entropylens.sampling import Sampling
    from entropylens.scores import Evaluation

__all__ = ["evaluate", "generate", "tell_table1"]


class EngineName(StrEnum):
    """What answers."""

    auto = "auto"
    hf = "hf"
    vllm = "vllm"


class Grading(StrEnum):
    """How answers are judged."""

    math = "math"
    strict = "strict"


Benchmark = Annotated[
    list[str] | None,
    typer.Option(
        "--benchmark",
        help="math500 | amc23 | aime24 | aime25 | gsm8k | a file | a Hub id | "
        "reasoning_gym:TASK; may be repeated.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("-n", "--samples", help="Answers a problem; default 32 for AIME, else 16."),
]
NumProblems = Annotated[
    int | None, typer.Option(help="The first problems of each; a task's number of problems.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens an answer at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default 1.")]
TopP = Annotated[float | None, typer.Option(help="Default 1: off.")]
TopK = Annotated[int | None, typer.Option(help="Default 0: off.")]
Penalty = Annotated[float | None, typer.Option(help="Default 1: off.")]
OwnSampling = Annotated[
    bool,
    typer.Option("--model-sampling", help="Take what the model's generation_config sets."),
]
ProblemColumn = Annotated[str | None, typer.Option(help="Where it has another name.")]
AnswerColumn = Annotated[str | None, typer.Option(help="Where it has another name.")]
Split = Annotated[str | None, typer.Option(help="Of a Hub dataset; default test.")]
DatasetRevision = Annotated[
    str | None, typer.Option(help="Of the Hub datasets; a run keeps the commit it began with.")
]
EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="auto takes vLLM where it is installed.")
]
TensorParallel = Annotated[int, typer.Option(help="GPUs that hold the model together (vLLM).")]
DataParallel = Annotated[int, typer.Option(help="Copies that share the problems (Ray).")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Default: runs/<model>-<n>.")]


def generate(
    model: Annotated[
        str, typer.Argument(help="Hub id, directory, GGUF file, veRL checkpoint, or `bundled`.")
    ],
    benchmark: Benchmark = None,
    samples: Samples = None,
    num_problems: NumProblems = None,
    max_new_tokens: MaxNewTokens = 8192,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    model_sampling: OwnSampling = False,
    template: Template = None,
    thinking: ThinkingOption = None,
    problem_column: ProblemColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    dataset_revision: DatasetRevision = None,
    output: Output = None,
    engine: EngineOption = EngineName.auto,
    tensor_parallel: TensorParallel = 1,
    data_parallel: DataParallel = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Let a model answer problems; `analyze --responses` and `evaluate` go on from the file."""
    with reported(debug):
        from entropylens.engines import open_engine
        from entropylens.evaluation import answer_benchmarks, load_benchmarks
        from entropylens.rundir import new_directory

        prepare_process()
        drawing = (temperature, top_p, top_k, repetition_penalty)
        sampling = _sampling(max_new_tokens, seed, model_sampling, *drawing)
        directory = output or new_directory(model)
        asked = load_benchmarks(
            benchmark or [], directory,
            source=_source(problem_column, answer_column, split, dataset_revision),
            num_problems=num_problems, need_answers=False, force=force,
        )  # fmt: skip
        opened = open_engine(
            model, engine=engine.value, dtype=dtype, device=device, revision=revision,
            trust_remote_code=trust_remote_code, tensor_parallel=tensor_parallel,
            data_parallel=data_parallel,
        )  # fmt: skip
        run, journals = answer_benchmarks(
            opened, asked, directory, num_samples=samples,
            sampling=sampling,
            own_sampling=model_sampling, template=template,
            thinking=None if thinking is None else thinking is Thinking.on, force=force,
        )  # fmt: skip
        count = sum(len(it.prompts) * it.sampling.num_samples for it in journals)
        typer.echo(f"{count} answers in {run.completions}")


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Hub ids, directories, GGUF files, veRL checkpoints or runs, or `bundled`."
        ),
    ],
    benchmark: Benchmark = None,
    samples: Samples = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Of Pass@K and Maj@K; default 1, 2, 4 ... n.")
    ] = None,
    num_problems: NumProblems = None,
    grading: Annotated[
        Grading, typer.Option(help="math: Math-Verify | strict: equal text, as the paper's code.")
    ] = Grading.math,
    max_new_tokens: MaxNewTokens = 8192,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    model_sampling: OwnSampling = False,
    template: Template = None,
    thinking: ThinkingOption = None,
    problem_column: ProblemColumn = None,
    answer_column: AnswerColumn = None,
    split: Split = None,
    dataset_revision: DatasetRevision = None,
    output: Output = None,
    engine: EngineOption = EngineName.auto,
    tensor_parallel: TensorParallel = 1,
    data_parallel: DataParallel = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Avg@K, Pass@K and Maj@K of a model, with intervals; of several, Table 1 as well.

    The same command resumes what was interrupted.
    """
    with reported(debug):
        from entropylens.engines import check_named
        from entropylens.evaluation import evaluate as run
        from entropylens.rundir import new_directory

        prepare_process()
        drawing = (temperature, top_p, top_k, repetition_penalty)
        sampling = _sampling(max_new_tokens, seed, model_sampling, *drawing)
        named = _named(models)
        check_named(list(named.values()), revision, trust_remote_code)
        directory = output or new_directory(models[0] if len(named) == 1 else "evaluations")
        found = {}
        for name, model in named.items():
            place = directory if len(named) == 1 else directory / name
            found[name] = run(
                model,
                benchmark or [],
                num_samples=samples,
                ks=k or (),
                num_problems=num_problems,
                source=_source(problem_column, answer_column, split, dataset_revision),
                sampling=sampling,
                own_sampling=model_sampling,
                template=template,
                thinking=None if thinking is None else thinking is Thinking.on,
                grading=grading.value,
                output=place,
                force=force,
                engine=engine.value,
                tensor_parallel=tensor_parallel,
                data_parallel=data_parallel,
                dtype=dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            if not as_json:
                _tell(name if len(named) > 1 else "", found[name], place)
        if as_json:
            told = {
                name: it.to_dict() | {"scores": json.loads(it.scores.to_json(orient="records"))}
                for name, it in found.items()
            }
            typer.echo(json.dumps(told if len(told) > 1 else next(iter(told.values())), indent=2))
        if len(found) > 1:
            tell_table1(found, directory)


def _tell(name: str, evaluation: Evaluation, place: Path) -> None:
    from rich.console import Console

    from entropylens.terminal import score_table

    if name:
        typer.echo(f"{name}:")
    Console().print(score_table(evaluation))
    typer.echo(f"\nWritten to {place}")


def tell_table1(found: dict[str, Evaluation], directory: Path) -> None:
    """Write Table 1 of several evaluations and print it, or say why there is none."""
    from entropylens.errors import SettingError
    from entropylens.table1 import markdown, table1, write_table1

    try:
        table = table1(found)
    except SettingError as error:
        typer.echo(f"no Table 1: {error.line}", err=True)
        return
    paths = write_table1(table, directory)
    typer.echo(f"\n{markdown(table)}\nWritten to {', '.join(map(str, paths))}", err=True)


def _named(models: list[str]) -> dict[str, str]:
    """Names of the directories, and models; a training run stands for its checkpoints."""
    from entropylens.rundir import distinct_names
    from entropylens.sources import verl

    found = {}
    for name, model in zip(distinct_names(models), models, strict=True):
        steps = verl.steps(Path(model))
        if len(steps) < 2:
            found[name] = model
            continue
        prefix = "" if len(models) == 1 else f"{name}-"
        found |= {f"{prefix}step_{step}": str(path.parent) for step, path in steps}
    return found


def _source(
    problems: str | None, answers: str | None, split: str | None, revision: str | None
) -> Any:
    from entropylens.problems import Source

    return Source(problems, answers, split, revision)


def _sampling(
    max_new_tokens: int,
    seed: int,
    own: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
) -> Sampling:
    from entropylens.errors import SettingError
    from entropylens.sampling import Sampling

    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if own and given:
        raise SettingError(
            f"--model-sampling and --{next(iter(given)).replace('_', '-')} contradict each other",
            "pass one of them",
        )
    return Sampling(max_new_tokens=max_new_tokens, seed=seed, **given)
