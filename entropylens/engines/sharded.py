"""Several copies of a model that share the prompts: one Ray actor each, on a GPU of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from entropylens.engines import open_one
from entropylens.engines.engine import Answers, Job
from entropylens.errors import SettingError
from entropylens.prompts import Prompt
from entropylens.sampling import Sampling

__all__ = ["ShardedEngine"]

#: Jobs of a copy at a time: few enough that answers come back, and that none idles at the end.
ROUND = 512


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
        try:
            import ray
        except ImportError as error:
            raise SettingError(
                "--data-parallel needs Ray", "pip install ray, or leave it out"
            ) from error
        import torch

        if not ray.is_initialized():
            ray.init(
                include_dashboard=False, log_to_driver=False, configure_logging=False,
                _node_ip_address="127.0.0.1",
            )  # fmt: skip
        needs: dict[str, float] = {"num_cpus": 1}
        if torch.cuda.is_available():
            needs["num_gpus"] = options.get("tensor_parallel", 1)
            there = ray.cluster_resources().get("GPU", 0)
            if there < copies * needs["num_gpus"]:
                raise SettingError(
                    f"{copies} copies of {needs['num_gpus']:g} GPUs are more than the {there:g} "
                    "that Ray has",
                    "lower --data-parallel or --tensor-parallel",
                )
        self._ray = ray
        actor = ray.remote(_Copy).options(**needs)
        self._copies = [actor.remote(model, engine, dict(options)) for _ in range(copies)]
        told = ray.get(self._copies[0].told.remote())
        self.name = model
        self.fingerprint: str = told["fingerprint"]
        self.settings: Mapping[str, Any] = told["settings"]
        self.tokenizer = told["tokenizer"]
        self.limits = told["limits"]
        self.ends: frozenset[int] = told["ends"]

    @property
    def suggested(self) -> Mapping[str, Any]:
        """The fields of Sampling that the model's generation_config sets."""
        found: Mapping[str, Any] = self._ray.get(self._copies[0].suggested.remote())
        return found

    def answer(
        self,
        prompts: Sequence[Prompt],
        jobs: Sequence[Job],
        wanted: Collection[Job],
        sampling: Sampling,
        produced: Callable[[int], object],
    ) -> Iterator[Answers]:
        """See `Engine.answer`."""
        ray = self._ray
        shared = ray.put(list(prompts))
        left = [job for job in jobs if job in wanted]
        size = max(1, min(ROUND, -(-len(left) // len(self._copies))))
        rounds = iter([left[start : start + size] for start in range(0, len(left), size)])
        running: dict[Any, Any] = {}

        def give(copy: Any) -> None:
            if (some := next(rounds, None)) is not None:
                running[copy.answer.remote(shared, some, sampling)] = copy

        for copy in self._copies:
            give(copy)
        while running:
            done, _ = ray.wait(list(running))
            for one in done:
                give(running.pop(one))
                found: Answers = ray.get(one)
                produced(sum(map(len, found.values())))
                yield found


class _Copy:
    """The actor: an engine of its own."""

    def __init__(self, model: str, engine: str, options: dict[str, Any]) -> None:
        self._engine = open_one(model, engine, options)

    def told(self) -> dict[str, Any]:
        names = ("fingerprint", "settings", "tokenizer", "limits", "ends")
        return {name: getattr(self._engine, name) for name in names}

    def suggested(self) -> Mapping[str, Any]:
        return self._engine.suggested

    def answer(self, prompts: Sequence[Prompt], jobs: Sequence[Job], sampling: Sampling) -> Answers:
        answers: Answers = {}
        for fresh in self._engine.answer(prompts, jobs, set(jobs), sampling, lambda _: None):
            answers |= fresh
        return answers
