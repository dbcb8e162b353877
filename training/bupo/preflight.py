"""Before training: which layer the analyzer recommends, and what its gradient would do.

Both let the model answer problems of the training set.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from bupo.checks import reward_function
from bupo.layer_probe import Graded, LayerProbe, probe_layers
from entropylens.analysis import analyze
from entropylens.engines.hf import HFEngine
from entropylens.errors import SettingError
from entropylens.files import make_directory, write_text
from entropylens.generation import generate
from entropylens.prompts import load_prompts
from entropylens.results import Analysis
from entropylens.rundir import open_run
from entropylens.sampling import Sampling
from entropylens.sources import hf, load_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["measure_layers", "recommended_layer"]

logger = logging.getLogger(__name__)

#: Problems that are answered for each purpose; tokens an answer for the recommendation.
_ANALYZED, _PROBED, _TOKENS = 24, 16, 256


def recommended_layer(
    config: DictConfig, directory: Path, analysis: Path | None = None
) -> tuple[int, list[str]]:
    """The layer that the analyzer recommends; it is written to recommendation.json.

    Args:
        config: of the run.
        directory: of the run; an analysis of its own goes into `analysis/`.
        analysis: a directory that `entropylens analyze` wrote for this model.

    Returns:
        l, and warnings.

    Raises:
        SettingError: the rule does not apply to this model; it says what to pass instead.
    """
    if analysis is not None:
        found = Analysis.load(analysis)
    else:
        model, tokenizer = _load(config)
        found = analyze(
            model,
            tokenizer=tokenizer,
            datasets=_train_files(config)[:1],
            num_prompts=_ANALYZED,
            sampling=Sampling(max_new_tokens=min(_TOKENS, config.data.max_response_length)),
            thinking=config.data.apply_chat_template_kwargs.get("enable_thinking"),
            output=directory / "analysis",
        )
    choice = found.recommendation
    make_directory(directory)
    write_text(
        directory / "recommendation.json",
        json.dumps(choice.to_dict() | {"stages": choice.stages.to_dict()}, indent=2) + "\n",
    )
    if choice.applies != "yes" or choice.layer is None:
        named = "none" if choice.layer is None else str(choice.layer)
        raise SettingError(
            f"--layer auto: the rule applies {choice.applies!r} to this model (layer {named}): "
            f"{choice.reason}",
            "pass --layer N to choose one yourself, see what each would do with --probe-layers, "
            "or train with bupo.internal_steps=0",
        )
    return choice.layer, _warnings(found, choice.layer)


def _warnings(analysis: Analysis, layer: int) -> list[str]:
    frame, uniform = analysis.layers, math.log(analysis.vocab_size)
    if "nll_layer" not in frame:  # the raw reading was not asked for
        return []
    nll = float(frame["nll_layer"][frame["layer"] == layer].iloc[0])
    if nll < uniform:
        return []
    return [
        f"pi_{layer} gives the tokens that the model produces {nll:.1f} nats of surprise, more "
        f"than guessing would ({uniform:.1f}): it hardly knows what it is trained on"
    ]


def measure_layers(config: DictConfig, directory: Path, *, force: bool = False) -> LayerProbe:
    """Compare the InterGRPO and GRPO gradients layer by layer; saved as layer_probe.csv.

    Args:
        config: of the run.
        directory: of the probe alone; the same call goes on with the answers that are there.
        force: replace a probe of other settings.

    Raises:
        EntropyLensError: as `probe_layers`, `load_prompts` and the reward function.
    """
    model, tokenizer = _load(config)
    subject = hf.wrap(model, tokenizer, name=str(config.actor_rollout_ref.model.path))
    file = _train_files(config)[0]
    rows = pd.read_parquet(file).head(_PROBED).to_dict("records")
    prompts = load_prompts(
        file,
        tokenizer,
        subject.limits,
        num_prompts=_PROBED,
        thinking=config.data.apply_chat_template_kwargs.get("enable_thinking"),
    )
    rollout = config.actor_rollout_ref.rollout
    sampling = Sampling(
        num_samples=rollout.n,
        max_new_tokens=config.data.max_response_length,
        temperature=rollout.temperature,
        seed=rollout.seed,
    )
    settings = {
        "model": subject.fingerprint,
        "sampling": asdict(sampling),
        "prompts": [prompt.key for prompt in prompts],
    }
    run = open_run(directory, settings, force=force)
    answers = generate(HFEngine.of(subject), prompts, sampling, run.completions)
    score = reward_function(config)
    graded = []
    for number, answer in enumerate(answers):
        row = rows[number // rollout.n]
        told = score(
            data_source=row["data_source"],
            solution_str=tokenizer.decode(answer.response_ids, skip_special_tokens=True),
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row.get("extra_info") or {},
        )
        value = float(told["score"] if isinstance(told, dict) else told)
        graded.append(Graded(answer.prompt_ids, answer.response_ids, value, number // rollout.n))
    logger.info("mean reward %.3f", sum(it.reward for it in graded) / len(graded))
    probe = probe_layers(model, graded, temperature=rollout.temperature, seed=rollout.seed)
    probe.save(directory)
    return probe


def _train_files(config: DictConfig) -> list[str]:
    files = OmegaConf.to_container(config.data)["train_files"]  # type: ignore[call-overload,index]
    return [str(it) for it in files] if isinstance(files, list) else [str(files)]


def _load(config: DictConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    settings = config.actor_rollout_ref.model
    model, tokenizer = load_named(settings.path, trust_remote_code=bool(settings.trust_remote_code))
    if tokenizer is None:
        raise SettingError(
            f"model {settings.path!r} has no tokenizer", "put its tokenizer files beside it"
        )
    if settings.custom_chat_template is not None:
        tokenizer.chat_template = settings.custom_chat_template
    return model, tokenizer
