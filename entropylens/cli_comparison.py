"""The command line's comparison: evaluations problem by problem, or analyses layer by layer."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entropylens.cli_common import Debug, Json, Replace, reported
from entropylens.cli_evaluation import tell_table1

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropylens.collection import Collection
    from entropylens.comparison import Comparison
    from entropylens.contrast import ModelContrast
    from entropylens.results import Analysis

__all__ = ["compare"]


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(help="What analyze, or what evaluate wrote; the first against all others."),
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
    force: Replace = False,
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
            _evaluations(collection, output, k or [], seed, as_json, force)
        elif len(collection.analyses) == count:
            if k:
                raise SettingError("--k is about evaluations", "leave it out for analyses")
            _analyses(directories, collection, output, seed, as_json, force)
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
    collection: Collection,
    output: Path | None,
    ks: list[int],
    seed: int,
    as_json: bool,
    force: bool,
) -> None:
    from entropylens.comparison import compare as run
    from entropylens.files import refuse_existing
    from entropylens.table1 import TABLE1_FILES

    found = dict(collection.evaluations)
    (first, base), *others = found.items()
    places = {}
    if output is not None:
        places = {name: output if len(others) == 1 else output / name for name, _ in others}
        written = [place / "comparison.json" for place in places.values()]
        refuse_existing([*written, *(output / name for name in TABLE1_FILES)], force=force)
    compared = [run(base, it, (first, name), ks=ks, seed=seed) for name, it in others]
    if as_json:
        _tell_json(compared)
    else:
        for one in compared:
            typer.echo("\n".join(one.sentences))
    if output is not None:
        for one in compared:
            one.save(places[one.second])
        tell_table1(found, output)


def _analyses(
    directories: Sequence[Path],
    collection: Collection,
    output: Path | None,
    seed: int,
    as_json: bool,
    force: bool,
) -> None:
    from entropylens.contrast import contrast
    from entropylens.files import refuse_existing, write_text
    from entropylens.report.comparison import comparison_page
    from entropylens.rundir import new_directory

    models = dict(collection.analyses)
    (first, base), *others = models.items()
    place = output or new_directory("compare")
    page = place / "comparison.html"
    refuse_existing([page], force=force)
    compared = [
        contrast(base, it, (first, name), reading=reading, seed=seed)
        for name, it in others
        for reading in base.readings
    ]
    for one in compared:
        inside = [one.second] if len(others) > 1 else []
        one.save(place.joinpath(*inside, *([one.reading] if len(base.readings) > 1 else [])))
    write_text(page, comparison_page(models, compared))
    if as_json:
        _tell_json(compared)
    else:
        for one in compared:
            typer.echo("\n".join(one.sentences))
        for (_, analysis), path in zip(others, directories[1:], strict=True):
            _how_to_fix_the_text(directories[0], base, path, analysis)
    typer.echo(f"\nWritten to {place}; open {page}", err=as_json)


def _how_to_fix_the_text(place: Path, first: Analysis, other: Path, second: Analysis) -> None:
    """Own responses mix what the weights do with what the text does: say how to tell them apart."""
    from entropylens.demo import MODEL_NAME

    answers = place / "completions.jsonl"
    texts = [set(it.responses.get("response_key", ())) for it in (first, second)]
    tokenizers = {it.settings.get("tokenizer") for it in (first, second)}
    named = second.model == MODEL_NAME or "/" in second.model or Path(second.model).exists()
    if texts[0] == texts[1] or len(tokenizers) > 1 or None in tokenizers or not named:
        return
    if not answers.is_file():
        return
    words = ["entropylens", "analyze"]
    words += [] if second.model == MODEL_NAME else [second.model]
    words += ["--responses", str(answers), "--reading", second.reading, "--dtype", second.dtype]
    words += ["--revision", second.revision] if second.revision else []
    words += ["-o", f"{other}-same-responses"]
    typer.echo(f"On the same responses: {shlex.join(words)}; then name that directory here too")


def _tell_json(compared: Sequence[Comparison | ModelContrast]) -> None:
    told = [
        it.to_dict() | {"rows": json.loads(it.frame.to_json(orient="records"))} for it in compared
    ]
    typer.echo(json.dumps(told, indent=2))
