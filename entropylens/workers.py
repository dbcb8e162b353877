"""Several processes, here or on other machines, that share one analysis: a Ray actor each.

Every actor opens the model itself. The driver, which holds none, hands out the same groups of
responses that one process would measure, one at a time to whichever actor is free.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from entropylens.anatomy import Family
from entropylens.demo import MODEL_NAME, demo_model
from entropylens.doctor import usable_cores
from entropylens.engines.hf import HFEngine
from entropylens.engines.sharded import Copy, ShardedEngine
from entropylens.errors import AllocationError, EntropyLensError, SettingError, WeightsError
from entropylens.families import families, register
from entropylens.measure import Measured, Station
from entropylens.ray_cluster import RayCluster
from entropylens.responses import Response
from entropylens.sources import open_model
from entropylens.sources.subject import Facts
from entropylens.tokens import TokenKeeper

__all__ = ["Workers"]

logger = logging.getLogger(__name__)

#: Lost workers of a run that others are started for.
REPLACEMENTS = 3
#: Seconds to wait for a machine that has room, once no worker is left.
PATIENCE = 120.0


class Place(NamedTuple):
    """Where an actor runs."""

    node: str
    host: str
    process: int


class Ready(NamedTuple):
    """An actor's `Station`: its kernel, memory and precision."""

    kernel: str
    memory: int
    told: Mapping[str, Any]


class Workers(ShardedEngine):
    """Copies of a named model that answer and measure. See `engines.engine.Engine`.

    Args:
        model: a Hub id, directory, GGUF file or veRL checkpoint, the same on every machine; None
            for the bundled model.
        count: how many.
        address: of a running Ray cluster, see `RayCluster`.
        loading: dtype, device, revision, trust_remote_code, as for `open_model`.

    Attributes:
        facts: what a run says of the model.

    Raises:
        SettingError: Ray is not installed or not there, or has too few GPUs or cores.
        WeightsError: the machines hold different weights.
        EntropyLensError: the model cannot be opened.
    """

    remote = None

    def __init__(
        self, model: str | Path | None, count: int, address: str | None, loading: Mapping[str, Any]
    ) -> None:
        self.name = MODEL_NAME if model is None else str(model)
        path = demo_model() if model is None else Path(model).expanduser()
        self._source = str(path.absolute()) if path.exists() else str(model)
        self._cluster = RayCluster("--workers", address)
        self._loading = dict(loading)
        self._needs: dict[str, float] = {"num_cpus": 1}
        if loading["device"] != "cpu" and self._cluster.num_gpus:
            self._needs["num_gpus"] = 1
        elif loading["device"] == "auto":  # GPUs that the cluster does not lend are not for us
            self._loading["device"] = "cpu"
        self._cluster.require(count, self._needs, "lower --workers, or pass --device cpu")
        logger.info("starting %d workers", count)
        self._copies = [self._actor() for _ in range(count)]
        self._replacements = REPLACEMENTS
        try:
            places = self._get([it.place.remote() for it in self._copies])
            self._places = dict(zip(self._copies, places, strict=True))
            told = self._get([self._open(it) for it in self._copies])
            for place, one in zip(places, told, strict=True):
                self._check_alike(place, one["fingerprint"], told[0]["fingerprint"])
        except BaseException:
            self.close()
            raise
        self._learn(told[0])
        self.facts: Facts = replace(told[0]["facts"], name=self.name)
        for warning in told[0]["warnings"]:
            logger.warning("%s", warning)

    @property
    def dtype(self) -> str:
        """The dtype of the model's states, as text."""
        return self.facts.dtype

    def begin(
        self, items: Sequence[Response], keeper: TokenKeeper | None, settings: Mapping[str, Any]
    ) -> tuple[str, int, Mapping[str, Any]]:
        """Prepare every worker for these responses.

        Args:
            items: all responses.
            keeper: of single tokens, or None.
            settings: of `Station`.

        Returns:
            The kernel that all of them run, the bytes above the model that each needs, and what
            became of the precision.
        """
        self._lengths = [it.num_tokens for it in items]
        kept = None if keeper is None else (keeper.names, keeper.top, keeper.extent)
        self._task = [self._cluster.ray.put(tuple(items)), kept, dict(settings)]
        found = self._begin()
        if len({it.kernel for it in found}) > 1:  # a machine without a compiler
            self._task[2]["kernel"] = "eager"
        if len({it.told["precision"] for it in found}) > 1:  # or without fast products
            self._task[2]["precision"] = "exact"
        if self._task[2] != settings:  # the same for all
            found = self._begin()
        self._task[2]["kernel"] = found[0].kernel  # of those that take another's place, too
        self._ready = max(found, key=lambda it: it.told.get("precision_error", 0.0))
        return self._ready.kernel, max(it.memory for it in found), self._ready.told

    def _begin(self) -> list[Ready]:
        found: list[Ready] = self._get([it.begin.remote(*self._task) for it in self._copies])
        return found

    def measured(self, groups: Iterable[Sequence[int]], bar: tqdm[Any]) -> Iterator[Measured]:
        """What `Station.measure` returns of each group, as they are finished; see `begin`.

        Raises:
            AllocationError: every worker is lost.
            EntropyLensError: as a worker raised it.
        """
        left = deque(groups)
        idle = deque(self._copies)
        running: dict[Any, tuple[Any, Sequence[int]]] = {}
        starting: dict[Any, tuple[Any, Any, Any]] = {}

        def hand_out() -> None:
            while left and idle:
                worker, group = idle.popleft(), left.popleft()
                running[worker.measure.remote(group)] = worker, group

        while left or running:
            hand_out()
            done = self._next([*running, *starting], None if running else PATIENCE)
            if done is None and not self._any_placed(starting):
                raise AllocationError(
                    f"every worker of {self.name!r} is lost",
                    "see that the machines have enough memory, then run the same command again; "
                    "what was finished is kept",
                )
            found: Measured | None = None
            worker, group = running.pop(done, (None, ()))
            try:
                if worker is not None:
                    found = self._cluster.get(done)
                elif done is not None:
                    worker, *steps = starting.pop(done)
                    self._welcome(worker, [*steps, done])
            except self._cluster.lost as error:
                if group:
                    left.appendleft(group)
                self._replace(worker, group, error, starting)
                continue
            except EntropyLensError as error:
                if group:
                    raise
                self._replace(worker, group, error, starting)
                continue
            if worker is not None:
                idle.append(worker)
            hand_out()  # before what was found is written
            if found is not None:
                bar.update(sum(self._lengths[index] for index in group))
                yield found

    def _next(self, waits: Sequence[Any], timeout: float | None) -> Any:
        """The next reference that is there, or None after so many seconds."""
        done = self._cluster.ray.wait(waits, timeout=timeout)[0] if waits else []
        return done[0] if done else None

    def _actor(self) -> Any:
        spread = self._cluster.ray.remote(_Worker).options(
            scheduling_strategy="SPREAD", **self._needs
        )
        return spread.remote()

    def _open(self, worker: Any) -> Any:
        """Let a worker open the model; a reference to what it says of it."""
        others = [place.node for it, place in self._places.items() if it is not worker]
        threads = os.environ.get("OMP_NUM_THREADS")
        known = families()
        return worker.start.remote(self._source, self._loading, others, threads, known)

    def _check_alike(self, place: Place, fingerprint: str, expected: str) -> None:
        if fingerprint != expected:
            raise WeightsError(
                f"the worker on {place.host} opened other weights of {self.name!r} than the others",
                "copy one model to every machine, or name a commit with --revision",
            )

    def _any_placed(self, starting: Mapping[Any, tuple[Any, Any, Any]]) -> bool:
        places = [place for _, place, _ in starting.values()]
        return bool(places and self._cluster.ray.wait(places, timeout=0)[0])

    def _welcome(self, worker: Any, steps: Sequence[Any]) -> None:
        """Check a worker that takes a lost one's place."""
        place, told, ready = (self._cluster.get(step) for step in steps)
        self._places[worker] = place
        self._check_alike(place, told["fingerprint"], self.fingerprint)
        if (ready.kernel, ready.told["precision"]) != (
            self._ready.kernel,
            self._ready.told["precision"],
        ):
            raise SettingError(
                f"{place.host} cannot compute as the others do", "use machines of one kind"
            )

    def _replace(
        self,
        worker: Any,
        group: Sequence[int],
        error: Exception,
        starting: dict[Any, tuple[Any, Any, Any]],
    ) -> None:
        """Say that a worker is lost, and start another while there are some left to start."""
        ray = self._cluster.ray
        ray.kill(worker)  # what cannot be reached may still be there
        self._copies.remove(worker)
        place = self._places.pop(worker, None)
        where = "that was starting" if place is None else f"on {place.host} ({place.process})"
        why = error.line if isinstance(error, EntropyLensError) else str(error)
        again = f"; its {len(group)} responses are measured again" if group else ""
        another = "another is started" if self._replacements else "no other is started"
        logger.warning(
            "the worker %s is lost%s, %s: %s", where, again, another, " ".join(why.split())[:200]
        )
        if self._replacements:
            self._replacements -= 1
            fresh = self._actor()
            self._copies.append(fresh)
            steps = fresh.place.remote(), self._open(fresh)
            starting[fresh.begin.remote(*self._task)] = fresh, *steps


class _Worker(Copy):
    """The actor: a model that answers and measures."""

    def place(self) -> Place:
        """Where it runs."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(node, socket.gethostname(), os.getpid())

    def start(
        self,
        model: str,
        loading: Mapping[str, Any],
        others: Sequence[str],
        threads: str | None,
        known: Sequence[Family],
    ) -> dict[str, Any]:
        """Open the model, and say what `Workers` has to know of it.

        Args:
            model, loading: see `open_model`.
            others: the node of every other worker, which share its cores.
            threads: the driver's OMP_NUM_THREADS; Ray sets one of its own here.
            known: the families that the driver knows.
        """
        shared = max(1, usable_cores() // (1 + others.count(self.place().node)))
        torch.set_num_threads(int(threads) if threads else shared)
        for family in known:
            register(family, replace=True)
        said = _Listener()
        logging.getLogger("entropylens").addHandler(said)
        self._subject = open_model(model, **loading)
        self._engine = HFEngine.of(self._subject)
        about = {"facts": self._subject.facts, "fingerprint": self._subject.fingerprint}
        return self._told() | about | {"warnings": said.lines}

    def begin(
        self,
        items: Sequence[Response],
        kept: tuple[Any, ...] | None,
        settings: Mapping[str, Any],
    ) -> Ready:
        """See `Workers.begin`."""
        keeper = None
        if kept is not None:
            names, top, extent = kept
            reading = settings["reading"]
            keeper = TokenKeeper(names, top, reading, self._subject.tokenizer, extent)
        self._station = Station(self._subject, items, keeper, **settings)
        return Ready(self._station.kernel, self._station.memory, self._station.precision)

    def measure(self, group: Sequence[int]) -> Measured:
        """See `Station.measure`."""
        return self._station.measure(group, tqdm(disable=True))


class _Listener(logging.Handler):
    """Keeps warnings for the driver: what an actor logs is not shown."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
