"""The command line: parses, calls, prints. Heavy packages are imported by the commands alone."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropylens.cli_common import Debug, Json, Thinking, prepare_process, reported
from entropylens.cli_comparison import compare
from entropylens.cli_evaluation import evaluate, generate
from entropylens.cli_figures import figures, plot
from entropylens.cli_training import export, prepare, train

if TYPE_CHECKING:
    from entropylens.results import Analysis

__all__ = ["app", "main"]

app = typer.Typer(
    help="How a language model's uncertainty moves through its layers, and which to train first.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Reading(StrEnum):
    """Which readings to measure."""

    raw = "raw"
    normed = "normed"
    both = "both"


class Rule(StrEnum):
    """How the layer is chosen."""

    stages = "stages"
    paper = "paper"


@app.command()
def analyze(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, directory or GGUF file; without it, the bundled model."),
    ] = None,
    responses: Annotated[
        Path | None, typer.Option(help="JSONL file of prompts and responses, ids or text.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Let the model answer this file, or `bundled`; may be repeated."),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Prompts of each dataset.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers a prompt; default 1.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens an answer at most; default 256.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature, 0 is greedy; default 1.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="chat | qwen-math | qwen3-nothinking | octothinker | plain."),
    ] = None,
    thinking: Annotated[Thinking | None, typer.Option(help="For models that can think.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: runs/<model>-<n>.")
    ] = None,
    reading: Annotated[Reading, typer.Option(help="raw is what training uses.")] = Reading.raw,
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto | cpu | cuda.")] = "auto",
    batch_tokens: Annotated[
        int, typer.Option(help="Response positions held in memory at a time.")
    ] = 512,
    keep_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Keep this of every token of every response; default: of the first 3."),
    ] = None,
    top_tokens: Annotated[
        int | None,
        typer.Option(help="Keep this many top tokens of every layer's policy, too; 0 for none."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, control and resamples.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model repository's code.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad responses out and count them.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another run in the output directory.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure every layer's and module's policy, and say which layer to train first.

    The same command resumes what was interrupted.
    """
    with reported(debug):
        from entropylens.analysis import analyze as run
        from entropylens.demo import MODEL_NAME
        from entropylens.rundir import new_directory
        from entropylens.sampling import Sampling
        from entropylens.series import analyze_series
        from entropylens.sources import verl

        given = {
            "num_samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature,
        }  # fmt: skip
        sampling: dict[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        directory = output or new_directory(model or MODEL_NAME)
        prepare_process()
        settings: dict[str, Any] = {
            "datasets": dataset or (),
            "num_prompts": num_prompts,
            "sampling": Sampling(**sampling, seed=seed) if sampling else None,
            "template": template,
            "thinking": None if thinking is None else thinking is Thinking.on,
            "output": directory,
            "reading": reading.value,
            "dtype": dtype,
            "device": device,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "batch_tokens": batch_tokens,
            "skip_bad": skip_bad,
            "keep_tokens": keep_tokens or None,
            "top_tokens": top_tokens,
            "seed": seed,
            "force": force,
        }
        if model is not None and len(verl.steps(Path(model))) > 1:
            series = analyze_series(model, responses, **settings)
            if as_json:
                found = {step: it.to_dict() for step, it in series.analyses.items()}
                typer.echo(json.dumps(found, indent=2))
            else:
                for step, analysis in series.analyses.items():
                    typer.echo(f"step {step}:")
                    _print_analysis(analysis, as_json)
        else:
            _print_analysis(run(model, responses, **settings), as_json)
        if not as_json:
            typer.echo(f"\nWritten to {directory}; open {_report_of(directory)}")


@app.command()
def recommend(
    target: Annotated[
        str, typer.Argument(help="A directory that `analyze` wrote, or a model to analyze.")
    ],
    rule: Annotated[Rule, typer.Option(help="stages, or the paper's literal rule.")] = Rule.stages,
    reading: Annotated[
        str | None, typer.Option(help="raw | normed; default raw where measured.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say which layer to train first, how sure that is, and why."""
    with reported(debug):
        from rich.console import Console

        from entropylens.results import Analysis
        from entropylens.terminal import recommendation_text

        path = Path(target)
        if (path / "analysis.json").is_file() or (path / "run.json").is_file():
            analysis = Analysis.load(path)
        else:
            from entropylens.analysis import analyze as run
            from entropylens.rundir import new_directory

            prepare_process()
            directory = new_directory(target)
            analysis = run(target, output=directory)
            typer.echo(f"analysis written to {directory}", err=True)
        found = analysis.recommend(rule.value, reading=reading)
        if as_json:
            typer.echo(json.dumps(found.to_dict() | {"stages": found.stages.to_dict()}, indent=2))
        else:
            Console().print(recommendation_text(found))


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Print its anatomy, and verify()'s error of each layer.")
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Show every known family and its verified error.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto | cpu | cuda.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model repository's code.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, optional parts and the cache; or how a model is understood."""
    with reported(debug):
        if families:
            from entropylens.doctor import family_table

            prepare_process()
            typer.echo(family_table().to_string(index=False, float_format="{:.0e}".format))
            return
        if model is None:
            from entropylens.doctor import environment

            for name, finding in environment():
                typer.echo(f"{name:18} {finding}")
            return
        from entropylens.doctor import examine

        prepare_process()
        examined = examine(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        typer.echo(examined.text)
        examined.verification.raise_if_broken()


app.command()(generate)
app.command()(evaluate)
app.command()(compare)
app.command()(plot)
app.command()(figures)
app.command()(prepare)
app.command()(train)
app.command()(export)


def main() -> None:
    """Entry point of the `entropylens` command."""
    app()


def _report_of(directory: Path) -> Path:
    series = directory / "series.csv"
    return series if series.is_file() else directory / "report.html"


def _print_analysis(analysis: Analysis, as_json: bool) -> None:
    from rich.console import Console

    from entropylens.terminal import summary

    if as_json:
        typer.echo(json.dumps(analysis.to_dict(), indent=2))
    else:
        Console(soft_wrap=False).print(summary(analysis))


if __name__ == "__main__":
    main()
