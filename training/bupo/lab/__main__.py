"""`python -m bupo.lab`: run the laboratory, or go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropylens.cli_common import Debug, reported


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small, in minutes.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: runs/lab or runs/lab-quick.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread; default: one a core.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew, removing the laboratory there.")
    ] = False,
    debug: Debug = False,
) -> None:
    """BuPO beside its baselines and controls on a tiny model: LAB.md and its figures.

    The same command goes on with what is there, run by run.
    """
    with reported(debug):
        from bupo.lab.experiment import Laboratory
        from bupo.lab.plan import FULL, QUICK
        from bupo.lab.writeup import write_up
        from entropylens.doctor import usable_cores

        directory = output or Path("runs") / ("lab-quick" if quick else "lab")
        plan = QUICK if quick else FULL
        found = Laboratory(plan, directory, workers or usable_cores()).run(force=force)
        typer.echo(f"Written to {write_up(found, directory)}")


if __name__ == "__main__":
    typer.run(main)
