"""The command line's pictures: plot, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropylens.cli_common import Debug, Replace, reported

__all__ = ["OUTPUT", "Columns", "Directories", "Output", "figures", "plot"]

OUTPUT = Path("runs/figures")

Directories = Annotated[
    list[Path], typer.Argument(help="What analyze, train or evaluate wrote; several side by side.")
]
Output = Annotated[Path, typer.Option("-o", "--output", help="For .png and .pdf.")]
Columns = Annotated[
    int | None,
    typer.Option(min=1, max=2, help="Fit the figure to 1 or 2 columns of a paper's page."),
]


def plot(
    directories: Directories,
    figure: Annotated[
        str,
        typer.Option(help="1c | 2 ... 11 as in the paper, trainability, table1 or table5."),
    ],
    output: Output = OUTPUT,
    columns: Columns = None,
    force: Replace = False,
    debug: Debug = False,
) -> None:
    """Draw one figure of the paper from runs of your own."""
    with reported(debug):
        from entropylens.collection import load_collection
        from entropylens.files import refuse_existing
        from entropylens.plots import draw
        from entropylens.plots.style import save, saved_as
        from entropylens.plots.tables import TABLES, write_table

        collection = load_collection(directories)
        if figure in TABLES:
            refuse_existing((output / it for it in TABLES[figure].files), force=force)
            paths = write_table(figure, collection, output)
        else:
            stem, drawn = draw(figure, collection, columns=columns)
            refuse_existing(saved_as(output / stem), force=force)
            paths = tuple(save(drawn, output / stem))
        typer.echo("\n".join(map(str, paths)))


def figures(
    directories: Directories,
    output: Output = OUTPUT,
    columns: Columns = None,
    force: Replace = False,
    debug: Debug = False,
) -> None:
    """Draw every figure and table that the runs have the data for; say what others need."""
    with reported(debug):
        from entropylens.collection import load_collection
        from entropylens.errors import SettingError, TrainingFilesError
        from entropylens.files import refuse_existing
        from entropylens.plots import everything
        from entropylens.plots.style import save, saved_as
        from entropylens.plots.tables import TABLES, write_table

        collection = load_collection(directories)
        drawn, missing = everything(collection, columns=columns)
        for stem in drawn:
            refuse_existing(saved_as(output / stem), force=force)
        for table in TABLES.values():
            if getattr(collection, table.needs):
                refuse_existing((output / it for it in table.files), force=force)
        for stem, picture in drawn.items():
            typer.echo("\n".join(map(str, save(picture, output / stem))))
        for name, table in TABLES.items():
            if not getattr(collection, table.needs):
                missing[name] = table.hint
                continue
            try:
                typer.echo("\n".join(map(str, write_table(name, collection, output))))
            except (SettingError, TrainingFilesError) as error:
                missing[name] = error.line
        for name, hint in missing.items():
            typer.echo(f"not drawn: {name}: {hint}", err=True)
