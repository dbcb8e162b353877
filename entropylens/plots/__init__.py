"""One pure function a figure: results in, matplotlib Figure out; no global state is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropylens.errors import EntropyLensError, SettingError
from entropylens.plots.change import change
from entropylens.plots.cosine import cosine
from entropylens.plots.dynamics import dynamics
from entropylens.plots.features import features
from entropylens.plots.flow import flow
from entropylens.plots.passing import passing, passing_each
from entropylens.plots.stages import stages
from entropylens.plots.trainability import trainability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from entropylens.collection import Collection
    from entropylens.results import Analysis

__all__ = [
    "FIGURES",
    "PICTURES",
    "Picture",
    "Plots",
    "change",
    "cosine",
    "draw",
    "dynamics",
    "everything",
    "features",
    "flow",
    "passing",
    "passing_each",
    "stages",
    "trainability",
]

#: File name of each figure of analyses -> its function.
FIGURES = {
    "figure1c_stages": stages,
    "figure2_flow": flow,
    "figure3_change": change,
    "figure8_cosine": cosine,
    "trainability": trainability,
}


@dataclass(frozen=True)
class Picture:
    """A figure of the paper, or one that it has not.

    Args:
        stem: its file's name.
        numbers: what the paper calls it, and where it shows the same for more models.
        needs: of a Collection: analyses | runs | evaluations.
        hint: what makes them.
        draw: a Collection that has them -> the figure.
    """

    stem: str
    numbers: tuple[str, ...]
    needs: str
    hint: str
    draw: Callable[[Collection], Figure]


_ANALYZE = "entropylens analyze MODEL -o DIR"
_TRAIN = "entropylens train --config NAME -o DIR"
_LOOKS = f"{_TRAIN} bupo.analyze_every=10"
_EVALUATE = "entropylens evaluate MODEL --benchmark NAME -n 300 -o DIR"

PICTURES = (
    Picture(
        "figure1c_stages", ("1c",), "analyses", _ANALYZE, lambda it: stages([*it.analyses.values()])
    ),
    Picture(
        "figure2_flow", ("2", "9"), "analyses", _ANALYZE, lambda it: flow([*it.analyses.values()])
    ),
    Picture(
        "figure3_change", ("3", "10"), "analyses", _ANALYZE,
        lambda it: change([*it.analyses.values()]),
    ),
    Picture(
        "figure4_dynamics", ("4", "7"), "runs", _TRAIN, lambda it: dynamics([*it.runs.values()])
    ),
    Picture(
        "figure5_features", ("5",), "runs", _LOOKS, lambda it: features([*it.runs.values()])
    ),
    Picture(
        "figure6_passing", ("6",), "evaluations", _EVALUATE, lambda it: passing(it.evaluations)
    ),
    Picture(
        "figure8_cosine", ("8",), "analyses", _ANALYZE, lambda it: cosine([*it.analyses.values()])
    ),
    Picture(
        "figure11_passing", ("11",), "evaluations", _EVALUATE,
        lambda it: passing_each(it.evaluations),
    ),
    Picture(
        "trainability", ("trainability",), "analyses", _ANALYZE,
        lambda it: trainability([*it.analyses.values()], it.probes),
    ),
)  # fmt: skip


def draw(number: str, collection: Collection) -> tuple[str, Figure]:
    """A figure by its number in the paper, or its name; and its file's name.

    Raises:
        SettingError: no such figure, or the results that it needs are missing.
    """
    for picture in PICTURES:
        if number in (*picture.numbers, picture.stem):
            if not getattr(collection, picture.needs):
                raise SettingError(
                    f"figure {number} is drawn from {picture.needs}, and none is named",
                    f"make one: {picture.hint}",
                )
            return picture.stem, picture.draw(collection)
    known = [number for picture in PICTURES for number in picture.numbers]
    raise SettingError(f"there is no figure {number!r}", f"choose one of {', '.join(known)}")


def everything(collection: Collection) -> tuple[dict[str, Figure], dict[str, str]]:
    """Every figure that the data allows, by its file's name; and what each other one lacks."""
    drawn, missing = {}, {}
    for picture in PICTURES:
        if not getattr(collection, picture.needs):
            missing[picture.stem] = picture.hint
            continue
        try:
            drawn[picture.stem] = picture.draw(collection)
        except EntropyLensError as error:
            missing[picture.stem] = error.line
    return drawn, missing


@dataclass(frozen=True)
class Plots:
    """The figures of one analysis, for `analysis.plot.<TAB>`."""

    analysis: Analysis

    def stages(self) -> Figure:
        """Figure 1c: the FFN's stages."""
        return stages([self.analysis])

    def flow(self) -> Figure:
        """Figure 2: entropy along the stream."""
        return flow([self.analysis])

    def change(self) -> Figure:
        """Figure 3: entropy change of attention and FFN."""
        return change([self.analysis])

    def cosine(self) -> Figure:
        """Figure 8: residual cosine similarity."""
        return cosine([self.analysis])

    def trainability(self) -> Figure:
        """How well each layer's policy knows the text."""
        return trainability([self.analysis])
