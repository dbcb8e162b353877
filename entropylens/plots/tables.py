"""Tables of the paper: 1 from evaluations, 5 from the configurations of training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from entropylens.errors import SettingError, TrainingFilesError
from entropylens.files import make_directory, write_text, write_whole
from entropylens.table1 import TABLE1_FILES, table1, write_table1
from entropylens.training_run import TrainingRun

if TYPE_CHECKING:
    from entropylens.collection import Collection

__all__ = ["TABLES", "table5", "write_table"]

_TABLE5_FILES = ("table5.csv", "table5.md")
_ACTOR = "actor_rollout_ref.actor"
#: Rows of Table 5, and where they stand in a run's configuration.
_ROWS = {
    "Optimizer": f"{_ACTOR}.optim.optimizer",
    "Policy learning rate": f"{_ACTOR}.optim.lr",
    "Critic learning rate": "critic.optim.lr",
    "Training batch size": "data.train_batch_size",
    "Samples per prompt": "actor_rollout_ref.rollout.n",
    "Mini-batch size": f"{_ACTOR}.ppo_mini_batch_size",
    "Policy updates per rollout": "",
    "Max prompt length": "data.max_prompt_length",
    "Max response length": "data.max_response_length",
    "Rollout temperature": "actor_rollout_ref.rollout.temperature",
    "Clip range": f"{_ACTOR}.clip_ratio",
    "Advantage": "algorithm.adv_estimator",
    "Layer": "bupo.layer",
    "Internal steps": "bupo.internal_steps",
    "Steps": "trainer.total_training_steps",
}


def table5(runs: Mapping[str, TrainingRun]) -> pd.DataFrame:
    """Hyperparameters, one row each as in Table 5, one column a run.

    Raises:
        TrainingFilesError: a run's config.yaml is gone.
    """
    columns = {}
    for name, run in runs.items():
        if not run.config:
            raise TrainingFilesError(
                f"run {name!r} has no config.yaml", "start it again: the file is written first"
            )
        found = {row: _value(run.config, key) for row, key in _ROWS.items() if key}
        batch, mini = found["Training batch size"], found["Mini-batch size"]
        epochs = _value(run.config, f"{_ACTOR}.ppo_epochs")
        found["Policy updates per rollout"] = epochs * -(-batch // mini)
        columns[name] = {row: found[row] for row in _ROWS}
    frame = pd.DataFrame(columns, dtype=object)
    return frame.rename_axis("Hyperparameter")


def _value(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _write_table5(collection: Collection, directory: Path) -> tuple[Path, ...]:
    table = table5(collection.runs)
    make_directory(directory)
    paths = tuple(directory / name for name in _TABLE5_FILES)
    write_whole(paths[0], lambda aside: table.to_csv(aside))
    rows = [
        "Hyperparameter | " + " | ".join(collection.runs),
        "--- | " + " | ".join("---" for _ in collection.runs),
    ]
    for name, row in table.iterrows():
        rows.append(f"{name} | " + " | ".join("-" if it is None else str(it) for it in row))
    write_text(paths[1], "".join(f"| {row} |\n" for row in rows))
    return paths


def _write_table1(collection: Collection, directory: Path) -> tuple[Path, ...]:
    return write_table1(table1(collection.evaluations), directory)


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Args:
        needs: of a Collection: runs | evaluations.
        hint: what makes them.
        files: their names.
        write: a Collection that has them, and a directory -> the files.
    """

    needs: str
    hint: str
    files: tuple[str, ...]
    write: Callable[[Collection, Path], tuple[Path, ...]]


TABLES: Mapping[str, Table] = {
    "table1": Table(
        "evaluations",
        "entropylens evaluate MODEL --benchmark NAME -o DIR",
        TABLE1_FILES,
        _write_table1,
    ),
    "table5": Table("runs", "entropylens train --config NAME -o DIR", _TABLE5_FILES, _write_table5),
}


def write_table(name: str, collection: Collection, directory: Path) -> tuple[Path, ...]:
    """Write a table of the paper, and return its files.

    Raises:
        SettingError: the results that it needs are missing.
        OutputDirectoryError: the directory cannot be written.
    """
    table = TABLES[name]
    if not getattr(collection, table.needs):
        raise SettingError(
            f"{name} is made of {table.needs}, and none is named", f"make one: {table.hint}"
        )
    return table.write(collection, directory)
