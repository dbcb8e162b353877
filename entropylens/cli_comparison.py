"""The command line's comparison: evaluations problem by problem, or analyses layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropylens.cli_common import Debug, Json, reported
from entropylens.cli_evaluation import tell_table1

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropylens.collection import Collection
    from entropylens.results import Analysis

__all__ = ["compare"]


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(help="What `analyze`, or `evaluate`, wrote; the first against each other."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="For tables, and the page of analyses (runs/compare-<n>)."
        ),
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Of Pass@K and Maj@K; default 1, 2, 4 ... n.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say which evaluation is better, or how far one model's layers lie from another's."""
    with reported(debug):
        from entropylens.collection import load_collection
        from entropylens.errors import SettingError

        if len(directories) < 2:
            raise SettingError("there is one directory", "name at least two")
        collection = load_collection(directories)
        count = len(directories)
        if len(collection.evaluations) == count:
            _evaluations(collection, output, k or [], seed, as_json)
        elif len(collection.analyses) == count:
            if k:
                raise SettingError("--k is about evaluations", "leave it out for analyses")
            _analyses(collection, output, seed, as_json)
            if not as_json:
                _how_to_fix_the_text(directories, [*collection.analyses.values()])
        else:
            held = [
                f"{what}: {', '.join(found)}"
                for what in ("analyses", "evaluations", "runs")
                if (found := getattr(collection, what))
            ]
            raise SettingError(
                f"these are not all of one kind ({'; '.join(held)})",
                "compare analyses with analyses, or evaluations with evaluations",
            )


def _evaluations(
    collection: Collection, output: Path | None, ks: list[int], seed: int, as_json: bool
) -> None:
    from entropylens.comparison import compare as run

    found = dict(collection.evaluations)
    (first, base), *others = found.items()
    compared = [run(base, it, (first, name), ks=ks, seed=seed) for name, it in others]
    if as_json:
        _tell_json(compared)
    else:
        for one in compared:
            typer.echo("\n".join(one.sentences))
    if output is not None:
        for one in compared:
            one.save(output if len(compared) == 1 else output / one.second)
        tell_table1(found, output)


def _analyses(collection: Collection, output: Path | None, seed: int, as_json: bool) -> None:
    from entropylens.contrast import contrast
    from entropylens.files import write_text
    from entropylens.report.comparison import comparison_page
    from entropylens.rundir import new_directory

    models = dict(collection.analyses)
    (first, base), *others = models.items()
    compared = [contrast(base, it, (first, name), seed=seed) for name, it in others]
    place = output or new_directory("compare")
    if as_json:
        _tell_json(compared)
    else:
        for one in compared:
            typer.echo("\n".join(one.sentences))
    for one in compared:
        one.save(place if len(compared) == 1 else place / one.second)
    page = place / "comparison.html"
    write_text(page, comparison_page(models, compared))
    typer.echo(f"\nWritten to {place}; open {page}", err=as_json)


def _how_to_fix_the_text(directories: Sequence[Path], analyses: Sequence[Analysis]) -> None:
    """Own responses mix what the weights do with what the text does: say how to tell them apart."""
    answers, first = directories[0] / "completions.jsonl", analyses[0]
    for analysis in analyses[1:]:
        texts = [set(it.responses.get("response_key", ())) for it in (first, analysis)]
        same = first.settings.get("tokenizer") == analysis.settings.get("tokenizer")
        if texts[0] != texts[1] and same and answers.is_file():
            typer.echo(
                f"On the same responses: entropylens analyze {analysis.model} --responses "
                f"{answers} -o DIR, and name DIR here too"
            )


def _tell_json(compared: list[Any]) -> None:
    told = [
        {
            "first": it.first,
            "second": it.second,
            "sentences": it.sentences,
            "rows": json.loads(it.frame.to_json(orient="records")),
        }
        for it in compared
    ]
    typer.echo(json.dumps(told, indent=2))
