"""The command line: parses, calls, prints. Heavy packages are imported by the commands alone."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropylens.cli_common import (
    BatchTokens,
    Dataset,
    Debug,
    Device,
    Dtype,
    Force,
    Json,
    MaxNewTokens,
    NumPrompts,
    ResponsesFile,
    Revision,
    Samples,
    SkipBad,
    Temperature,
    Template,
    Thinking,
    ThinkingOption,
    TrustRemoteCode,
    prepare_process,
    reported,
    sampling_of,
)
from entropylens.cli_comparison import compare
from entropylens.cli_evaluation import evaluate, generate
from entropylens.cli_figures import figures, plot
from entropylens.cli_recommend import recommend
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


class Precision(StrEnum):
    """How products are made."""

    exact = "exact"
    fast = "fast"


@app.command()
def analyze(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, directory or GGUF file; without it, the bundled model."),
    ] = None,
    responses: ResponsesFile = None,
    dataset: Dataset = None,
    num_prompts: NumPrompts = None,
    samples: Samples = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    template: Template = None,
    thinking: ThinkingOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: runs/<model>-<n>.")
    ] = None,
    reading: Annotated[Reading, typer.Option(help="raw is what training uses.")] = Reading.raw,
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_tokens: BatchTokens = 512,
    precision: Annotated[
        Precision, typer.Option(help="fast: bf16 products where they are near enough.")
    ] = Precision.exact,
    keep_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep this quantity of every token (tokens.parquet; may be repeated); by default "
            "two of the first 3 responses."
        ),
    ] = None,
    top_tokens: Annotated[
        int | None,
        typer.Option(help="Keep this many top tokens of every layer's policy, too; 0 for none."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, control and resamples.")] = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    skip_bad: SkipBad = False,
    force: Force = False,
    workers: Annotated[
        int | None, typer.Option(help="Copies that share the responses (Ray); default none.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, or `auto`; default a new one.")
    ] = None,
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
        from entropylens.series import analyze_series
        from entropylens.sources import verl

        directory = output or new_directory(model or MODEL_NAME)
        prepare_process()
        settings: dict[str, Any] = {
            "datasets": dataset or (),
            "num_prompts": num_prompts,
            "sampling": sampling_of(samples, max_new_tokens, temperature, seed),
            "template": template,
            "thinking": None if thinking is None else thinking is Thinking.on,
            "output": directory,
            "reading": reading.value,
            "dtype": dtype,
            "device": device,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "batch_tokens": batch_tokens,
            "precision": precision.value,
            "skip_bad": skip_bad,
            "keep_tokens": keep_tokens or None,
            "top_tokens": top_tokens,
            "seed": seed,
            "force": force,
            "workers": workers,
            "ray_address": ray_address,
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
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Print its anatomy, and verify()'s error of each layer.")
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Show every known family and its verified error.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
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


app.command()(recommend)
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
