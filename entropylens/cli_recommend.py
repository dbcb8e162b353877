"""`entropylens recommend`: the layer to train first, of a finished analysis or of a model."""

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

if TYPE_CHECKING:
    from entropylens.decision import Decision

__all__ = ["recommend"]


class Rule(StrEnum):
    """How the layer is chosen."""

    stages = "stages"
    paper = "paper"


def recommend(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            help="A directory that `analyze` or `recommend -o` wrote, or a model, whose FFNs are "
            "then read and nothing else; without it, the bundled model."
        ),
    ] = None,
    rule: Annotated[Rule, typer.Option(help="stages, or the paper's literal rule.")] = Rule.stages,
    reading: Annotated[
        str | None,
        typer.Option(
            help="raw | normed; default raw, and for a model the normed one beside it where the "
            "raw one says nothing."
        ),
    ] = None,
    until_sure: Annotated[
        float | None,
        typer.Option(help="Take prompts in doublings, and stop when it is so sure: 0.95."),
    ] = None,
    positions: Annotated[
        int, typer.Option(help="Positions read of each response, at random; 0 for all.")
    ] = 32,
    responses: ResponsesFile = None,
    dataset: Dataset = None,
    num_prompts: NumPrompts = None,
    samples: Samples = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    template: Template = None,
    thinking: ThinkingOption = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A directory for recommendation.json; default none."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    batch_tokens: BatchTokens = 512,
    seed: Annotated[int, typer.Option(help="Of positions, order, sampling and resamples.")] = 0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    skip_bad: SkipBad = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say which layer to train first, how sure that is, and why.

    Of a model only the FFNs are read, at some positions of its responses. With --until-sure, no
    more prompts than it takes; "undecided" is an answer, too.
    """
    with reported(debug, resumes=False):
        if target is not None and _is_analysis(Path(target)):
            _refuse_options_of_models(context, target)
            _print_analysis(Path(target), rule, reading, as_json)
            return
        if target is not None and _is_decision(Path(target)):
            _refuse_options_of_models(context, target)
            _print_decision(Path(target), as_json)
            return
        from entropylens.quick import recommend_layer

        sampling = sampling_of(samples, max_new_tokens, temperature, seed)
        prepare_process()
        decision = recommend_layer(
            target,
            responses,
            positions=positions or None,
            until_sure=until_sure,
            reading=reading or "auto",
            rule=rule.value,
            datasets=dataset or (),
            num_prompts=num_prompts,
            sampling=sampling,
            template=template,
            thinking=None if thinking is None else thinking is Thinking.on,
            output=output,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            batch_tokens=batch_tokens,
            skip_bad=skip_bad,
            seed=seed,
            force=force,
        )
        _tell(decision, as_json)
        if output is not None and not as_json:
            typer.echo(f"\nWritten to {output}")


def _is_analysis(path: Path) -> bool:
    return (path / "analysis.json").is_file() or (path / "run.json").is_file()


def _is_decision(path: Path) -> bool:
    """Whether `recommend -o` wrote it; a training run's file of that name stands beside config."""
    return (path / "recommendation.json").is_file() and not (path / "config.yaml").is_file()


def _print_decision(path: Path, as_json: bool) -> None:
    from entropylens.decision import Decision

    _tell(Decision.load(path), as_json)


def _tell(decision: Decision, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(decision.to_dict(), indent=2))
    else:
        _print(decision.readings.values(), decision.sentence)


def _refuse_options_of_models(context: typer.Context, target: str) -> None:
    from entropylens.errors import SettingError

    of_a_directory = {"target", "rule", "reading", "as_json", "debug"}
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in of_a_directory and source is not None and source.name == "COMMANDLINE":
            raise SettingError(
                f"{parameter.opts[-1]} is for a model, and {target!r} is a finished analysis",
                "leave it out, or name the model",
            )


def _print_analysis(path: Path, rule: Rule, reading: str | None, as_json: bool) -> None:
    from entropylens.results import Analysis

    found = Analysis.load(path).recommend(rule.value, reading=reading)
    if as_json:
        typer.echo(json.dumps(found.to_dict() | {"stages": found.stages.to_dict()}, indent=2))
    else:
        _print([found])


def _print(found: Any, sentence: str = "") -> None:
    from rich.console import Console

    from entropylens.terminal import recommendation_text

    console = Console()
    if sentence:
        console.print(sentence, highlight=False, markup=False)
    for one in found:
        console.print(recommendation_text(one))
