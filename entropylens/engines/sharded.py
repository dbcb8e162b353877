"""Several copies of a model that share the prompts: one Ray actor each, on a GPU of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from entropylens.engines import open_one
from entropylens.engines.engine import Answers, Engine, Job
from entropylens.errors import AllocationError
from entropylens.prompts import Prompt
from entropylens.ray_cluster import RayCluster
from entropylens.sampling import Sampling

__all__ = ["Copy", "ShardedEngine"]


class ShardedEngine:
    """See `engines.engine.Engine`. Each copy answers the samples that it would answer alone.

    Args:
        model: a Hub id, directory or checkpoint.
        engine: hf | vllm.
        options: of the engine.
        copies: how many.

    Raises:
        SettingError: Ray is not installed, or has too few GPUs for so many copies.
        EntropyLensError: the model cannot be loaded.
    """

    def __init__(self, model: str, engine: str, options: Mapping[str, Any], copies: int) -> None:
        import torch

        self._cluster = RayCluster("--data-parallel")
        needs: dict[str, float] = {"num_cpus": 1}
        if torch.cuda.is_available():
            needs["num_gpus"] = options.get("tensor_parallel", 1)
        remedy = "lower --data-parallel or --tensor-parallel"
        self._cluster.require(copies, needs, remedy)
        actor = self._cluster.ray.remote(Copy).options(**needs)
        self._copies = [actor.remote() for _ in range(copies)]
        opening = [it.open.remote(model, engine, dict(options)) for it in self._copies]
        self.name = model
        try:
            self._learn(self._get(opening)[0])
        except BaseException:
            self.close()
            raise

    def _learn(self, told: Mapping[str, Any]) -> None:
        """Take over what a copy says of its engine."""
        self.fingerprint: str = told["fingerprint"]
        self.settings: Mapping[str, Any] = told["settings"]
        self.tokenizer = told["tokenizer"]
        self.limits = told["limits"]
        self.ends: frozenset[int] = told["ends"]

    @property
    def suggested(self) -> Mapping[str, Any]:
        """The fields of Sampling that the model's generation_config sets."""
        found: Mapping[str, Any] = self._get(self._copies[0].suggested.remote())
        return found

    def close(self) -> None:
        """End the copies."""
        for copy in self._copies:
            self._cluster.ray.kill(copy)
        self._copies = []

    def _get(self, reference: Any) -> Any:
        """What a copy returns or raises."""
        try:
            return self._cluster.get(reference)
        except self._cluster.lost as error:
            raise AllocationError(
                f"a copy of {self.name!r} has died ({' '.join(str(error).split())[:200]})",
                f"lower {self._cluster.flag} where memory is short; what was finished is kept",
            ) from error

    def answer(
        self,
        prompts: Sequence[Prompt],
        jobs: Sequence[Job],
        wanted: Collection[Job],
        sampling: Sampling,
        produced: Callable[[int], object],
    ) -> Iterator[Answers]:
        """See `Engine.answer`. Answers come as each copy finishes them."""
        shared = self._cluster.ray.put(list(prompts))
        left = [job for job in jobs if job in wanted]
        count = len(self._copies)
        running = [
            copy.answer.options(num_returns="streaming").remote(
                shared, left[place::count], sampling
            )
            for place, copy in enumerate(self._copies)
        ]
        while running:
            done, _ = self._cluster.ray.wait(running)
            for one in done:
                try:
                    found: Answers = self._get(next(one))
                except StopIteration:
                    running.remove(one)
                    continue
                produced(sum(map(len, found.values())))
                yield found


class Copy:
    """The actor: an engine of its own."""

    _engine: Engine

    def open(self, model: str, engine: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load the model, and say what `ShardedEngine` has to know of it."""
        self._engine = open_one(model, engine, options)
        return self._told()

    def _told(self) -> dict[str, Any]:
        names = ("fingerprint", "settings", "tokenizer", "limits", "ends")
        return {name: getattr(self._engine, name) for name in names}

    def suggested(self) -> Mapping[str, Any]:
        """See `Engine.suggested`."""
        return self._engine.suggested

    def answer(
        self, prompts: Sequence[Prompt], jobs: Sequence[Job], sampling: Sampling
    ) -> Iterator[Answers]:
        """The wanted jobs' answers, batch by batch."""
        yield from self._engine.answer(prompts, jobs, set(jobs), sampling, lambda _: None)
