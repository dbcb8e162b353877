"""What the laboratory was built to answer, as frames of a few numbers, from all runs of an arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from scipy import stats

from bupo.lab.results import AVERAGE, INTERNAL
from bupo.lab.run import HELD_OUT
from bupo.lab.starts import Inspection
from bupo.phase import MIN_STEPS

__all__ = ["calibration", "collapses", "cost", "layers", "ranking", "similarity"]

KL, _COSINE, _SECONDS = "fixed_set/kl", "fixed_set/cos_final", "timing_s/update_actor"
_RUN = ["arm", "start", "seed"]
#: A policy that gets less than this share of its first answers right has collapsed.
COLLAPSED = 0.5


def similarity(
    curves: pd.DataFrame, names: Sequence[str], reference: str, internal_steps: int
) -> pd.DataFrame:
    """cos(H^l, H^L) over the fixed set, an arm a row (Fig. 5a).

    Args:
        curves: see `results.curves`.
        names: of the arms, which look at the same layer.
        reference: the arm that a run's rise is compared with, at the same start and seed.
        internal_steps: s_inter; a look is made at it, or the first one after it counts.

    Returns:
        `arm, runs, start, s_inter, last` (means over runs), `rises` (runs in which it is higher at
        s_inter than at step 0), `above` (runs in which it has risen more than the reference).
    """
    looks = curves.dropna(subset=[_COSINE])
    rows = []
    for (arm, start, seed), run in looks[looks["arm"].isin([*names, reference])].groupby(_RUN):
        values = run.set_index("step")[_COSINE]
        # A collapsed model, whose states are NaN, cannot be looked at.
        then = next(iter(values[values.index >= internal_steps]), math.nan)
        rows.append((arm, start, seed, values.iloc[0], then, values.iloc[-1]))
    of_runs = pd.DataFrame(rows, columns=[*_RUN, "first", "s_inter", "last"])
    of_runs["rise"] = of_runs["s_inter"] - of_runs["first"]
    theirs = of_runs[of_runs["arm"] == reference][["start", "seed", "rise"]]
    paired = of_runs.merge(theirs, on=["start", "seed"], suffixes=("", "_reference"))
    found = []
    for name in names:
        own, pairs = of_runs[of_runs["arm"] == name], paired[paired["arm"] == name]
        found.append(
            {
                "arm": name, "runs": len(own), "start": own["first"].mean(),
                "s_inter": own["s_inter"].mean(), "last": own["last"].mean(),
                "rises": int((own["rise"] > 0).sum()),
                "above": int((pairs["rise"] > pairs["rise_reference"]).sum()),
            }
        )  # fmt: skip
    return pd.DataFrame(found)


def collapses(curves: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """When held-out Avg@1 falls below COLLAPSED of step 0's in two looks running, a run a row.

    Returns:
        `arm, start, seed, step` (of the second look; NaN: it never does), `first, last` (Avg@1 at
        step 0 and the end).
    """
    rows = []
    looks = curves[curves["arm"].isin(names)].dropna(subset=[HELD_OUT])
    for (arm, start, seed), run in looks.groupby(_RUN):
        values = run.set_index("step")[HELD_OUT]
        low = values < COLLAPSED * values.iloc[0]
        below = values.index[low & low.shift(1, fill_value=False)]
        rows.append(
            {
                "arm": arm, "start": start, "seed": seed,
                "step": below[0] if len(below) else float("nan"),
                "first": values.iloc[0], "last": values.iloc[-1],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def calibration(curves: pd.DataFrame, bounds: Sequence[float]) -> pd.DataFrame:
    """Where `internal_steps=auto` would end InterGRPO by its KL alone, for several bounds.

    As `bupo.phase`: not before MIN_STEPS, and after two looks running over the bound. A model that
    cannot be looked at any more has collapsed, and is over every bound.

    Args:
        curves: see `results.curves`; of InterGRPO throughout alone.
        bounds: nats a token.

    Returns:
        `kl_bound, runs, stopped` (runs that it ends), `step` (median of these), `change` (mean
        change of held-out Avg@1 from step 0 to there), `worst` (the least of them).
    """
    looks = curves.dropna(subset=[HELD_OUT])
    rows = []
    for bound in bounds:
        steps, changes = [], []
        for _, run in looks.groupby(_RUN):
            over = ~(run[KL] <= bound)
            ended = over & over.shift(1, fill_value=False) & (run["step"] >= MIN_STEPS)
            if ended.any():
                stop = run[ended].iloc[0]
                steps.append(stop["step"])
                changes.append(stop[HELD_OUT] - run[HELD_OUT].iloc[0])
        rows.append(
            {
                "kl_bound": bound, "runs": looks.groupby(_RUN).ngroups, "stopped": len(steps),
                "step": float(pd.Series(steps, dtype=float).median()), "change": _mean(changes),
                "worst": min(changes, default=float("nan")),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def layers(outcomes: pd.DataFrame, of_layers: Mapping[int, str]) -> pd.DataFrame:
    """BuPO's Avg@K at each inner layer, over the starts and seeds that all of them have.

    Returns:
        `layer, runs`, a column of means a start, and `all`.
    """
    of_them = outcomes[outcomes["arm"].isin(of_layers.values())]
    wide = of_them.pivot_table(index=["start", "seed"], columns="arm", values=AVERAGE).dropna()
    rows = []
    for layer, name in of_layers.items():
        values = wide[name]
        by_start = {str(start): float(it.mean()) for start, it in values.groupby("start")}
        rows.append({"layer": layer, "runs": len(values)} | by_start | {"all": values.mean()})
    return pd.DataFrame(rows)


def ranking(of_layers: pd.DataFrame, inspections: Mapping[str, Inspection]) -> pd.DataFrame:
    """How well what is known before training ranks the layers, a start a row.

    Args:
        of_layers: what `layers` returns.
        inspections: by start.

    Returns:
        `start, best` (layer), and where a layer named beforehand stands (1: the best): `paper`
        (by the paper's rule read literally, raw), `normed` (recommended by the normed reading),
        `cosine` (whose gradient points most where GRPO's does), each with `<name>_rank`; and
        `spearman` (of cosines and outcomes).
    """
    rows = []
    for start, it in inspections.items():
        found = of_layers.set_index("layer")[start]
        cosines = it.probe.layers.set_index("layer")["cosine"].reindex(found.index)
        ranks = found.rank(ascending=False, method="min").astype(int)
        best, likeliest = (one.index[int(one.to_numpy().argmax())] for one in (found, cosines))
        named = {
            "paper": it.analysis.recommend(reading="raw").paper_rule_layer,
            "normed": it.analysis.recommend(reading="normed").layer,
            "cosine": likeliest,
        }
        row: dict[str, Any] = {"start": start, "best": best}
        for name, layer in named.items():
            row |= {name: layer, f"{name}_rank": None if layer is None else ranks[layer]}
        rows.append(row | {"spearman": float(stats.spearmanr(cosines, found).statistic)})
    return pd.DataFrame(rows)


def cost(curves: pd.DataFrame) -> pd.Series:
    """Seconds of an internal step's updates over those of a full one: a run's medians, by run.

    Args:
        curves: see `results.curves`; of arms with both kinds of steps.
    """
    ratios = {}
    for key, run in curves.dropna(subset=[_SECONDS]).groupby(_RUN):
        medians = run.groupby(INTERNAL)[_SECONDS].median()
        ratios[key] = float(medians[1.0] / medians[0.0])
    return pd.Series(ratios, dtype=float)


def _mean(values: Sequence[float]) -> float:
    return float(pd.Series(values, dtype=float).mean())
