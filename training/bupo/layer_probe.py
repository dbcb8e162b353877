"""Before any training: how far does the InterGRPO(l) gradient point where GRPO's does?

At the old policy every importance ratio is 1 and nothing is clipped, so Eq. 4 and 10 both have the
gradient 1/P sum_p 1/G sum_i A_i 1/|o_i| sum_t grad log pi(o_it), of pi_theta and of pi_l. They are
compared on the trainable parameters that both policies have: those of layers 1..l, and those of no
layer but the final norm's (embeddings, lm_head; one parameter where they are tied).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bupo.alignment import Sketch, aligned, dot
from bupo.policy_gradients import GradientSum, PolicyGradients, shared_parameters
from entropylens.anatomy import Anatomy, Passes
from entropylens.capture import evaluating
from entropylens.errors import AnalysisFilesError, SettingError
from entropylens.files import make_directory, write_text, write_whole
from entropylens.memory import allocations_explained
from entropylens.planning import plan
from entropylens.recognition import anatomy_of
from entropylens.resampling import RESAMPLES, PromptSums
from entropylens.responses import Limits, Response, parse_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Graded", "LayerProbe", "probe_layers"]

#: Informative prompts are put into at most so many blocks, for the intervals.
MAX_BLOCKS = 32

Array = NDArray[Any]


@dataclass(frozen=True)
class Graded:
    """One answer and what it was worth.

    Args:
        prompt_ids: what the model read.
        response_ids: what it produced.
        reward: R_i.
        group: its prompt's number, the same for all samples of it.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float
    group: int


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """The two gradients compared, layer by layer.

    A batch's gradient is signal and sampling noise, and the same answers give both gradients, so
    both noises: `cosine` is that of batches of this many prompts, not of infinitely many. Its
    interval and norm_ratio's cover the mean over such batches (a jackknife over blocks of
    informative prompts, with Student's t). `cosine_expected` is the cosine of the expected
    gradients, without that bias; NaN where noise hides one of them. Intervals are at 95 %, are NaN
    under 3 blocks (nll_layer's: prompts), and are rough under 8.

    Args:
        layers: one row a layer: `layer, shared_parameters` (numbers in them), `cosine,
            cosine_expected, norm_ratio` (|g_inter| / |g_grpo|) and `nll_layer` (-log pi_l(token),
            mean over tokens, nats), each of the four with `_low` and `_high`.
        policy_nll: -log pi_theta(token), mean over tokens, nats.
        num_layers: L.
        num_prompts: groups.
        num_responses: answers.
        num_informative: groups whose rewards differ; the others have no gradient.
        num_blocks: of these, what the jackknife leaves out in turn.
        temperature: of all policies here.
        seed: of resamples and sketches.
    """

    layers: pd.DataFrame
    policy_nll: float
    num_layers: int
    num_prompts: int
    num_responses: int
    num_informative: int
    num_blocks: int
    temperature: float
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """One row a layer."""
        return self.layers.copy()

    def to_dict(self) -> dict[str, Any]:
        """What layer_probe.json holds: everything but the rows."""
        return {it.name: getattr(self, it.name) for it in fields(self) if it.name != "layers"}

    def save(self, directory: str | Path) -> None:
        """Write layer_probe.csv and layer_probe.json, each whole.

        Raises:
            OutputDirectoryError: the directory cannot be written.
        """
        path = make_directory(Path(directory))
        write_whole(path / "layer_probe.csv", lambda aside: self.layers.to_csv(aside, index=False))
        write_text(path / "layer_probe.json", json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> LayerProbe:
        """Read what `save` wrote.

        Raises:
            AnalysisFilesError: there is nothing, or nothing readable.
        """
        path = Path(directory)
        try:
            rows = pd.read_csv(path / "layer_probe.csv", float_precision="round_trip")
            content = json.loads((path / "layer_probe.json").read_text(encoding="utf-8"))
            return cls(layers=rows, **content)
        except (OSError, ValueError, TypeError) as error:
            raise AnalysisFilesError(
                f"{str(path)!r} holds no readable layer probe ({error})",
                "name a directory that `entropylens train --probe-layers` wrote",
            ) from error


def probe_layers(
    model: PreTrainedModel,
    graded: Sequence[Graded],
    *,
    layers: Sequence[int] | None = None,
    temperature: float = 1.0,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
    batch_tokens: int = 256,
    layers_at_once: int = 2,
    progress: bool = True,
) -> LayerProbe:
    """Compare the InterGRPO(l) and GRPO gradients of graded answers; nothing is updated.

    Above the model it holds `layers_at_once` + 2 gradients (float32 at least), 8 MB of sketches a
    layer, and the activations and logits of one forward pass. Layer l takes l/L of a backward pass
    over the answers; each `layers_at_once` layers share a forward pass up to the highest of them.

    Args:
        model: a loaded causal language model; it is left as it came, gradients included.
        graded: answers in any order; at least one prompt has answers of different rewards.
        layers: candidates from 1 to L-1; by default all.
        temperature: what logits are divided by, as in training.
        num_resamples: of prompts, for the interval of nll_layer.
        seed: of resamples and sketches.
        batch_tokens: produced tokens a forward pass; a longer answer goes alone.
        layers_at_once: layers that share a forward pass.
        progress: show a progress bar.

    Raises:
        SettingError: no such layer, nothing to train, or no group whose rewards differ.
        ResponsesError: ids that the model cannot read.
        AllocationError: not enough memory for these settings.
        NotADecoderError, UnknownArchitectureError: as `entropylens.recognition.anatomy_of`.
    """
    if not 0 < temperature < math.inf or min(batch_tokens, layers_at_once, num_resamples) < 1:
        raise SettingError(
            "temperature, batch_tokens, layers_at_once or num_resamples is not positive",
            "give a positive temperature, and at least 1 of the others",
        )
    anatomy = anatomy_of(model)
    inner = _inner(layers, anatomy.num_layers)
    answers = _Answers.of(graded, anatomy)
    blocks = answers.blocks(batch_tokens, replace(anatomy.passes, continues=False))
    parameters, ends = shared_parameters(model, anatomy, inner)
    work = (len(inner) + 1) * sum(it.num_tokens for it in answers.responses)
    bar = tqdm(total=work, desc="probing", unit="tok", disable=not progress)
    run = PolicyGradients(
        *(model, anatomy, parameters, ends, answers.responses, answers.weights),
        *(blocks, temperature, bar),
    )
    sketch = Sketch(seed)
    rows: dict[int, dict[str, int | float]] = {}
    explained = allocations_explained(
        f"layers_at_once={layers_at_once}, batch_tokens={batch_tokens}",
        "try layers_at_once=1 and a smaller batch_tokens",
    )
    with bar, explained, evaluating(model), torch.enable_grad():
        grpo = run.sums([run.policy], sketch)[run.policy]
        for start in range(0, len(inner), layers_at_once):
            together = run.sums(inner[start : start + layers_at_once], sketch)
            for layer, inter in together.items():
                rows[layer] = _compared(grpo, inter, inner.index(layer))
            del together, inter  # before the next ones are made
    nll = answers.by_prompt([run.nll[site] for site in (*inner, run.policy)])
    low, high = nll.draw(num_resamples, seed).studentised()
    frame = pd.DataFrame([{"layer": layer} | rows[layer] for layer in inner])
    for end, values in (("", nll.means()), ("_low", low), ("_high", high)):
        frame[f"nll_layer{end}"] = values[:-1, 0]
    return LayerProbe(
        layers=frame,
        policy_nll=float(nll.means()[-1, 0]),
        num_layers=anatomy.num_layers,
        num_prompts=nll.num_prompts,
        num_responses=len(answers.responses),
        num_informative=len(answers.informative),
        num_blocks=len(grpo.blocks),
        temperature=temperature,
        seed=seed,
    )


def _inner(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    chosen = sorted(set(range(1, num_layers) if layers is None else layers))
    if not chosen or not 1 <= chosen[0] <= chosen[-1] < num_layers:
        raise SettingError(
            f"layers {chosen} are no inner layers of a model of {num_layers}",
            f"give layers from 1 to {num_layers - 1}",
        )
    return chosen


def _compared(grpo: GradientSum, inter: GradientSum, place: int) -> dict[str, int | float]:
    """One layer's columns; `place` is the layer's among the candidates."""
    common = grpo.gradient[: len(inter.gradient)]
    exact = dot(common, common), dot(common, inter.gradient), dot(inter.gradient, inter.gradient)
    first = torch.stack([block[place] for block in grpo.blocks])
    second = torch.stack([block[0] for block in inter.blocks])
    return {"shared_parameters": sum(inter.sizes), **aligned(exact, first, second)}


def _advantages(rewards: Array) -> Array:
    """(R_i - mean) / (std + 1e-6), with the sample standard deviation; 0 where none differs."""
    if rewards.min() == rewards.max():
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


@dataclass(frozen=True)
class _Answers:
    """Graded answers, checked, in an order that does not depend on how they came.

    Args:
        responses: all answers.
        prompts: the place of each one's prompt.
        weights: A_i / (P G |o_i|).
        informative: places of the prompts whose rewards differ.
    """

    responses: tuple[Response, ...]
    prompts: Array
    weights: Float[Tensor, " responses"]
    informative: tuple[int, ...]

    @classmethod
    def of(cls, graded: Sequence[Graded], anatomy: Anatomy) -> _Answers:
        items = sorted(graded, key=lambda it: (it.group, it.prompt_ids, it.response_ids, it.reward))
        given = [Response(tuple(it.prompt_ids), tuple(it.response_ids)) for it in items]
        limits = Limits(anatomy.unembedding.vocab_size, anatomy.context)
        responses = parse_responses(enumerate(given, 1), None, limits, source="graded").items
        rewards = np.array([it.reward for it in items], dtype=float)
        if not np.isfinite(rewards).all():
            raise SettingError("a reward is NaN or infinite", "give finite rewards")
        names, prompts = np.unique([it.group for it in items], return_inverse=True)
        lengths = np.array([it.num_tokens for it in responses])
        weights = np.zeros(len(items))
        for place, name in enumerate(names):
            members = np.flatnonzero(prompts == place)
            if len({responses[it].prompt_ids for it in members}) > 1:
                raise SettingError(f"group {name} has several prompts", "number each by itself")
            share = len(names) * len(members) * lengths[members]
            weights[members] = _advantages(rewards[members]) / share
        informative = tuple(np.unique(prompts[weights != 0]).tolist())
        if not informative:
            raise SettingError(
                f"rewards differ in none of {len(names)} groups, so there is no gradient",
                "give more answers a prompt, or prompts that the model solves now and then",
            )
        return cls(responses, prompts, torch.from_numpy(weights), informative)

    def blocks(self, batch_tokens: int, passes: Passes) -> list[list[list[int]]]:
        """Blocks of informative prompts and, where there are any, one of all others."""
        count = min(MAX_BLOCKS, len(self.informative))
        others = set(self.prompts.tolist()).difference(self.informative)
        parts = [self.informative[start::count] for start in range(count)]
        parts.append(tuple(others))
        return [self._groups(part, batch_tokens, passes) for part in parts if part]

    def _groups(self, prompts: Sequence[int], batch_tokens: int, passes: Passes) -> list[list[int]]:
        members = np.flatnonzero(np.isin(self.prompts, prompts)).tolist()
        groups = plan([self.responses[it] for it in members], batch_tokens, passes)
        return [[members[it] for it in group] for group in groups]

    def by_prompt(self, values: Sequence[Array]) -> PromptSums:
        """Sums over each prompt's answers, quantity by quantity in the place of layers."""
        tokens = np.bincount(self.prompts, [it.num_tokens for it in self.responses])
        sums = np.stack([np.bincount(self.prompts, it) for it in values], axis=1)
        return PromptSums(sums[..., None], tokens)
