"""One pure function a figure: results in, matplotlib Figure out; no global state is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropylens.errors import EntropyLensError, SettingError
from entropylens.plots.change import change
from entropylens.plots.cosine import cosine
from entropylens.plots.dynamics import dynamics
from entropylens.plots.features import features
from entropylens.plots.flow import flow
from entropylens.plots.layout import page_width
from entropylens.plots.passing import passing, passing_each
from entropylens.plots.stages import stages
from entropylens.plots.style import model_colors
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
        draw: a Collection that has them, and the figure's width in inches or None -> the figure.
    """

    stem: str
    numbers: tuple[str, ...]
    needs: str
    hint: str
    draw: Callable[[Collection, float | None], Figure]


def _colors(collection: Collection) -> Mapping[str, str]:
    """One for all figures of a collection: none changes where a figure leaves a run out."""
    return model_colors([*dict.fromkeys([*collection.runs, *collection.evaluations])])


def _dynamics(collection: Collection, width: float | None) -> Figure:
    return dynamics([*collection.runs.values()], colors=_colors(collection), width=width)


def _features(collection: Collection, width: float | None) -> Figure:
    """Of the runs that looked at a fixed set; GRPO beside them may not have."""
    runs = [*collection.runs.values()]
    looked = [run for run in runs if run.looks is not None]
    return features(looked or runs, colors=_colors(collection), width=width)


def _trainability(collection: Collection, width: float | None) -> Figure:
    return trainability([*collection.analyses.values()], collection.probes, width=width)


def _of_models(
    function: Callable[..., Figure],
) -> Callable[[Collection, float | None], Figure]:
    return lambda collection, width: function([*collection.analyses.values()], width=width)


def _of_evaluations(
    function: Callable[..., Figure],
) -> Callable[[Collection, float | None], Figure]:
    return lambda collection, width: function(
        collection.evaluations, colors=_colors(collection), width=width
    )


_ANALYZE = "entropylens analyze MODEL -o DIR"
_TRAIN = "entropylens train --config NAME -o DIR"
_LOOKS = f"{_TRAIN} bupo.analyze_every=10"
_EVALUATE = "entropylens evaluate MODEL --benchmark NAME -n 300 -o DIR"

PICTURES = (
    Picture("figure1c_stages", ("1c",), "analyses", _ANALYZE, _of_models(stages)),
    Picture("figure2_flow", ("2", "9"), "analyses", _ANALYZE, _of_models(flow)),
    Picture("figure3_change", ("3", "10"), "analyses", _ANALYZE, _of_models(change)),
    Picture("figure4_dynamics", ("4", "7"), "runs", _TRAIN, _dynamics),
    Picture("figure5_features", ("5",), "runs", _LOOKS, _features),
    Picture("figure6_passing", ("6",), "evaluations", _EVALUATE, _of_evaluations(passing)),
    Picture("figure8_cosine", ("8",), "analyses", _ANALYZE, _of_models(cosine)),
    Picture("figure11_passing", ("11",), "evaluations", _EVALUATE, _of_evaluations(passing_each)),
    Picture("trainability", ("trainability",), "analyses", _ANALYZE, _trainability),
)


def draw(number: str, collection: Collection, *, columns: int | None = None) -> tuple[str, Figure]:
    """A figure by its number in the paper, or its name; and its file's name.

    Args:
        number: 1c | 2 ... 11 | trainability, or a file's name without its suffix.
        collection: what it is drawn from.
        columns: make it as wide as 1 or 2 columns of a paper's page.

    Raises:
        SettingError: no such figure, or the results that it needs are missing.
        TrainingFilesError: a run lacks what is shown.
    """
    for picture in PICTURES:
        if number in (*picture.numbers, picture.stem):
            if not getattr(collection, picture.needs):
                raise SettingError(
                    f"figure {number} is drawn from {picture.needs}, and none is named",
                    f"make one: {picture.hint}",
                )
            return picture.stem, picture.draw(collection, page_width(columns))
    known = [number for picture in PICTURES for number in picture.numbers]
    raise SettingError(f"there is no figure {number!r}", f"choose one of {', '.join(known)}")


def everything(
    collection: Collection, *, columns: int | None = None
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Every figure that the data allows, by its file's name; and what each other one lacks."""
    drawn, missing = {}, {}
    for picture in PICTURES:
        if not getattr(collection, picture.needs):
            missing[picture.stem] = picture.hint
            continue
        try:
            drawn[picture.stem] = picture.draw(collection, page_width(columns))
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
