"""Table 1 of the paper from own evaluations: Avg@K in percent, best bold, second underlined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from entropylens.benchmarks import column_title
from entropylens.errors import SettingError
from entropylens.files import make_directory, write_text, write_whole
from entropylens.scores import Evaluation

__all__ = ["TABLE1_FILES", "latex", "markdown", "table1", "write_table1"]

#: What `write_table1` writes.
TABLE1_FILES = ("table1.csv", "table1.md", "table1.tex")
_AVERAGE = "Average"


def table1(evaluations: Mapping[str, Evaluation]) -> pd.DataFrame:
    """One row an evaluation, one column a benchmark that any of them has, in the paper's order.

    Args:
        evaluations: by the name that its row gets.

    Returns:
        Percent, indexed by `Methods`; NaN where an evaluation lacks the benchmark. `Average` is
        the unweighted mean, of evaluations that have all benchmarks.

    Raises:
        SettingError: there is no evaluation, or a benchmark's K, problems or judge differ.
    """
    if not evaluations:
        raise SettingError("there is no evaluation", "name directories of `entropylens evaluate`")
    samples: dict[str, int] = {}
    asked: dict[str, tuple[str, str]] = {}
    for name, evaluation in evaluations.items():
        for one in evaluation.benchmarks:
            if asked.setdefault(one.name, (one.digest, one.grader)) != (one.digest, one.grader):
                raise SettingError(
                    f"{name} was asked other problems of {one.name}, or judged by another judge",
                    "evaluate all alike",
                )
            if samples.setdefault(one.name, one.num_samples) != one.num_samples:
                raise SettingError(
                    f"{name} has {one.num_samples} answers to each problem of {one.name}, another "
                    f"has {samples[one.name]}",
                    "evaluate all with the same -n",
                )
    order = sorted(samples, key=lambda it: (column_title(it)[0], list(samples).index(it)))
    called = [column_title(it)[1] for it in order]
    titles = {
        it: f"{title if called.count(title) == 1 else it} (Avg@{samples[it]})"
        for it, title in zip(order, called, strict=True)
    }
    rows = {
        name: {titles[one.name]: 100 * evaluation.score(one.name) for one in evaluation.benchmarks}
        for name, evaluation in evaluations.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(titles.values()))
    frame[_AVERAGE] = frame.mean(axis=1, skipna=False)
    return frame.rename_axis("Methods")


def markdown(table: pd.DataFrame) -> str:
    """The table for a README."""
    marks = {0: "**{}**".format, 1: "<u>{}</u>".format}
    lines = [" | ".join(["Methods", *table.columns]), " | ".join(["---"] * (table.shape[1] + 1))]
    lines += [" | ".join([str(name), *cells]) for name, cells in _cells(table, marks)]
    return "".join(f"| {line} |\n" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """The table for a paper; it needs the package booktabs."""
    marks = {0: r"\textbf{{{}}}".format, 1: r"\underline{{{}}}".format}

    def row(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    lines = [
        rf"\begin{{tabular}}{{l{'c' * table.shape[1]}}}",
        r"\toprule",
        row(["Methods", *map(_escaped, table.columns)]),
        r"\midrule",
        *(row([_escaped(str(name)), *cells]) for name, cells in _cells(table, marks)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def write_table1(table: pd.DataFrame, directory: Path) -> tuple[Path, ...]:
    """Write table1.csv, table1.md and table1.tex.

    Raises:
        OutputDirectoryError: the directory cannot be written.
    """
    make_directory(directory)
    paths = tuple(directory / name for name in TABLE1_FILES)
    write_whole(paths[0], lambda aside: table.round(2).to_csv(aside))
    write_text(paths[1], markdown(table))
    write_text(paths[2], latex(table))
    return paths


def _cells(
    table: pd.DataFrame, marks: Mapping[int, Callable[[str], str]]
) -> list[tuple[str, list[str]]]:
    """Rows of text; what is equal as printed is marked alike. Of equals none is the best."""
    printed = table.round(2)
    rows = []
    for name in table.index:
        cells = []
        for column in table.columns:
            value = printed.loc[name, column]
            if pd.isna(value):
                cells.append("-")
                continue
            higher = printed[column].dropna().unique()
            place = int((higher > value).sum())
            text = f"{value:.2f}"
            cells.append(marks[place](text) if len(higher) > 1 and place in marks else text)
        rows.append((str(name), cells))
    return rows


def _escaped(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, f"\\{character}" if character != "\\" else "/")
    return text
