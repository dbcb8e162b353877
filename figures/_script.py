"""What the scripts beside this file share: `entropylens plot` with the figure's number given."""

from __future__ import annotations

import inspect
import sys

import typer

from entropylens.cli_common import Replace
from entropylens.cli_figures import OUTPUT, Columns, Directories, Output, plot

__all__ = ["main"]


def main(number: str) -> None:
    """Draw this figure, or write this table, from the directories on the command line.

    Args:
        number: as `entropylens plot --figure` takes it.
    """

    def script(
        directories: Directories,
        output: Output = OUTPUT,
        columns: Columns = None,
        force: Replace = False,
    ) -> None:
        plot(directories, number, output, columns, force)

    script.__doc__ = inspect.getdoc(sys.modules["__main__"])  # what --help shows
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(script)
    app()
