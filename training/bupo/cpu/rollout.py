"""Rollouts on a CPU: Hugging Face generate in a Ray actor, behind veRL's server interface.

Each token is drawn from a number that depends on (seed, step, request, position) alone, so neither
batching nor timing changes a sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float, Int
from torch import Tensor
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from entropylens.engines.engine import until_end
from entropylens.engines.hf import (
    draw_tokens,
    end_tokens,
    keyed_draws,
    left_padded,
    plain_generation,
)

__all__ = ["GenerateAdapter", "GenerateReplica", "GenerateServer", "Request", "answer"]

#: Seconds that a request waits for others to share its forward passes; and how many share them.
_WINDOW, _BATCH = 0.05, 64


@dataclass(frozen=True)
class Request:
    """One answer to be generated.

    Args:
        prompt_ids: the prompt.
        key: what tells this request from every other: (seed, step, index, sample).
        temperature: of the softmax; 0 takes the likeliest token.
    """

    prompt_ids: tuple[int, ...]
    key: tuple[int, ...]
    temperature: float


@torch.inference_mode()
def answer(
    model: Any, requests: Sequence[Request], max_new_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Token ids and their log-probabilities (nats, at the request's temperature), a request each.

    Args:
        model: a Hugging Face causal language model.
        requests: answered in one left-padded batch.
        max_new_tokens: tokens an answer at most; an end token counts.
    """
    from transformers import LogitsProcessorList

    input_ids, mask = left_padded([request.prompt_ids for request in requests])
    width = input_ids.shape[1]
    sampler = _Sampler(requests, width, max_new_tokens)
    with plain_generation(model) as ends:
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([sampler]),
        )
    log_probs = torch.stack(sampler.log_probs, dim=1).tolist()
    answers = []
    for row, scores in zip(output[:, width:].tolist(), log_probs, strict=True):
        ids = until_end(row, ends)
        answers.append((list(ids), scores[: len(ids)]))
    return answers


class _Sampler:
    """A logits processor that leaves one token standing, the one drawn, and notes how likely."""

    def __init__(self, requests: Sequence[Request], prompt_width: int, count: int) -> None:
        self.temperatures = [request.temperature for request in requests]
        draws = [keyed_draws(request.key, request.prompt_ids, count) for request in requests]
        self.draws = torch.from_numpy(np.stack(draws, axis=1))
        self.prompt_width = prompt_width
        self.log_probs: list[Float[Tensor, " batch"]] = []

    def __call__(
        self, input_ids: Int[Tensor, "batch sequence"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        draws = self.draws[input_ids.shape[1] - self.prompt_width]
        tokens = torch.empty(len(scores), dtype=torch.long)
        for temperature in set(self.temperatures):
            rows = torch.tensor([it == temperature for it in self.temperatures])
            tokens[rows] = draw_tokens(scores[rows], draws[rows], temperature)
        scale = torch.tensor([it or 1.0 for it in self.temperatures])[:, None]
        likely = torch.log_softmax(scores.float() / scale, dim=-1)
        self.log_probs.append(likely.gather(1, tokens[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class GenerateServer:
    """A Ray actor that answers requests; those that arrive together share their forward passes.

    Args:
        model_config: veRL's model configuration (path, override_config, trust_remote_code).
        response_length: tokens an answer at most.
    """

    def __init__(self, model_config: dict[str, Any], response_length: int) -> None:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            GenerationConfig,
        )

        trusting = {"trust_remote_code": bool(model_config["trust_remote_code"])}
        config = AutoConfig.from_pretrained(
            model_config["path"], attn_implementation="sdpa", **trusting
        )
        # The weights come from the trainer, in float32.
        self.model = AutoModelForCausalLM.from_config(config, **trusting).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(model_config["path"], **trusting)
        with contextlib.suppress(OSError):  # many models name their end tokens there alone
            self.model.generation_config = GenerationConfig.from_pretrained(model_config["path"])
        if tokenizer.eos_token_id is not None and not end_tokens(self.model):
            self.model.generation_config.eos_token_id = tokenizer.eos_token_id
        self.response_length = response_length
        self.global_steps: int | None = None
        self._waiting: list[tuple[Request, asyncio.Future[TokenOutput]]] = []
        self._task: asyncio.Task[None] | None = None
        self._model_in_use = asyncio.Lock()

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling_params: dict[str, Any],
        **_: Any,
    ) -> TokenOutput:
        """Answer one request."""
        future: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        request = Request(
            tuple(prompt_ids),
            tuple(sampling_params["key"]),
            float(sampling_params.get("temperature", 1.0)),
        )
        self._waiting.append((request, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(_WINDOW)
        while self._waiting:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            try:
                async with self._model_in_use:
                    answers = await asyncio.to_thread(
                        answer, self.model, [it[0] for it in batch], self.response_length
                    )
                for (_, future), (ids, log_probs) in zip(batch, answers, strict=True):
                    future.set_result(
                        TokenOutput(
                            token_ids=ids,
                            log_probs=log_probs,
                            stop_reason="completed",
                            extra_fields={"global_steps": self.global_steps},
                        )
                    )
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    async def load_weights(self, weights: dict[str, Tensor], global_steps: int | None) -> None:
        """Take the trainer's weights; a tied lm_head need not be among them."""
        async with self._model_in_use:
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
            self.model.tie_weights()
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        self.global_steps = global_steps

    async def nothing(self, *_: Any, **__: Any) -> None:
        """What a server with a GPU would do here."""

    wake_up = sleep = abort_all_requests = resume_generation = nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    start_profile = stop_profile = nothing


def _server_name(rank: int) -> str:
    return f"bupo_generate_{rank}"


class GenerateReplica(RolloutReplica):
    """One server a rank."""

    async def launch_servers(self) -> None:
        """Start the Ray actor."""
        name = _server_name(self.replica_rank)
        server = (
            ray.remote(GenerateServer)
            .options(name=name, num_cpus=1, max_concurrency=self.max_concurrency)
            .remote(
                model_config={
                    "path": self.model_config.path,
                    "trust_remote_code": self.model_config.trust_remote_code,
                },
                response_length=self.config.response_length,
            )
        )
        self.servers = [server]
        self._server_handle, self._server_address = server, name


class GenerateAdapter(BaseRollout):
    """Lives in the trainer's rank and sends it the weights."""

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """Nothing to release."""

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        global_steps: int | None = None,
        **_: Any,
    ) -> None:
        """Send all weights. Every rank must go through them: gathering is a collective."""
        gathered = {name: weight.detach().to("cpu", copy=True) for name, weight in weights}
        server = ray.get_actor(_server_name(int(os.environ["RANK"])))
        await server.load_weights.remote(gathered, global_steps)
