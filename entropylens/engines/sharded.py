"""Several copies of a model that share the prompts: one Ray actor each, on a GPU of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from entropylens.engines import open_one
from entropylens.engines.engine import Answers, Job
from entropylens.errors import AllocationError, EntropyLensError, SettingError
from entropylens.prompts import Prompt
from entropylens.sampling import Sampling

__all__ = ["ShardedEngine"]


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
        # Without it Ray makes the machine's own address of 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise SettingError(
                "--data-parallel needs Ray", "pip install ray, or leave it out"
            ) from error
        import torch

        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        needs: dict[str, float] = {"num_cpus": 1}
        if torch.cuda.is_available():
            needs["num_gpus"] = options.get("tensor_parallel", 1)
        every = ray.cluster_resources()
        for kind, number in needs.items():
            there = every.get(kind.removeprefix("num_").removesuffix("s").upper(), 0)
            if there < copies * number:
                raise SettingError(
                    f"{copies} copies need {copies * number:g} {kind.removeprefix('num_')}, and "
                    f"{there:g} are there",
                    "lower --data-parallel or --tensor-parallel",
                )
        self._ray = ray
        self.name = model
        actor = ray.remote(_Copy).options(**needs)
        self._copies = [actor.remote() for _ in range(copies)]
        opening = [it.open.remote(model, engine, dict(options)) for it in self._copies]
        try:
            told = self._get(opening)[0]
        except BaseException:
            self.close()
            raise
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
            self._ray.kill(copy)
        self._copies = []

    def _get(self, reference: Any) -> Any:
        """What a copy returns or raises."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EntropyLensError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayActorError as error:
            raise AllocationError(
                f"a copy of {self.name!r} has died ({' '.join(str(error).split())[:200]})",
                "lower --data-parallel where memory is short; what was finished is kept",
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
        shared = self._ray.put(list(prompts))
        left = [job for job in jobs if job in wanted]
        count = len(self._copies)
        running = [
            copy.answer.options(num_returns="streaming").remote(
                shared, left[place::count], sampling
            )
            for place, copy in enumerate(self._copies)
        ]
        while running:
            done, _ = self._ray.wait(running)
            for one in done:
                try:
                    found: Answers = self._get(next(one))
                except StopIteration:
                    running.remove(one)
                    continue
                produced(sum(map(len, found.values())))
                yield found


class _Copy:
    """The actor: an engine of its own."""

    def open(self, model: str, engine: str, options: dict[str, Any]) -> dict[str, Any]:
        self._engine = open_one(model, engine, options)
        names = ("fingerprint", "settings", "tokenizer", "limits", "ends")
        return {name: getattr(self._engine, name) for name in names}

    def suggested(self) -> Mapping[str, Any]:
        return self._engine.suggested

    def answer(
        self, prompts: Sequence[Prompt], jobs: Sequence[Job], sampling: Sampling
    ) -> Iterator[Answers]:
        yield from self._engine.answer(prompts, jobs, set(jobs), sampling, lambda _: None)
