"""The laboratory's subject: a tiny model with Qwen3's architecture, taught from demonstrations.

Teaching stops as soon as the sampled accuracy is in reach of reinforcement learning: right often
enough for a group of answers to differ, wrong often enough for something to be learned.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bupo.lab.answering import ask
from bupo.lab.task import Sum, draw_sums, make_tokenizer
from entropylens.errors import SettingError
from entropylens.files import make_directory, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Lesson", "accuracy", "make_model", "start", "teach"]

#: The record beside a start's weights.
RECORD = "lesson.json"
#: Tells the draws of demonstrations from those of rollouts.
_TEACHING = 1


@dataclass(frozen=True)
class Lesson:
    """How a start is made.

    Args:
        seed: of weights, demonstrations and samples.
        layers: L.
        width: d_model.
        enough: sampled accuracy on the development split at which teaching stops.
        bounds: what the accuracy must lie in then.
        most_steps: teaching that has not come so far is given up.
        batch: demonstrations a step.
        lr: AdamW's, after `warmup` steps.
        warmup: steps over which the learning rate rises.
        look_every: steps between two looks at the accuracy.
        look_at: problems of a look.
    """

    seed: int
    layers: int = 6
    width: int = 64
    enough: float = 0.4
    bounds: tuple[float, float] = (0.3, 0.6)
    most_steps: int = 3000
    batch: int = 256
    lr: float = 3e-3
    warmup: int = 50
    look_every: int = 10
    look_at: int = 256


def make_model(lesson: Lesson) -> PreTrainedModel:
    """The untaught model: Qwen3's, tied, with a vocabulary of 32."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=32, hidden_size=lesson.width, intermediate_size=3 * lesson.width,
        num_hidden_layers=lesson.layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=lesson.width // 4, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()


def teach(
    lesson: Lesson, *, progress: bool = True
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train on demonstrations up to the wanted accuracy.

    Returns:
        The model, and one record a look: step, loss (nats a token) and accuracy.

    Raises:
        SettingError: it never got there, or went beyond between two looks.
    """
    tokenizer, model = make_tokenizer(), make_model(lesson)
    asked = draw_sums("development", lesson.look_at, lesson.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lesson.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / lesson.warmup)
    )
    looks: list[dict[str, float]] = []
    with tqdm(total=lesson.enough, unit="accuracy", disable=not progress) as bar:
        for step in range(1, lesson.most_steps + 1):
            sums = draw_sums("train", lesson.batch, _TEACHING, lesson.seed, step)
            ids, labels = _demonstrations(tokenizer, sums)
            logits = model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % lesson.look_every:
                continue
            found = accuracy(model, tokenizer, asked, samples=1, seed=lesson.seed)
            looks.append({"step": step, "loss": float(loss.detach()), "accuracy": found})
            bar.n = min(found, lesson.enough)
            bar.set_postfix(step=step, loss=f"{float(loss.detach()):.3f}")
            if found >= lesson.enough:
                break
    low, high = lesson.bounds
    reached = looks[-1]["accuracy"] if looks else 0.0
    if not low <= reached <= high:
        raise SettingError(
            f"after {step} steps {reached:.0%} of the answers are right, not {low:.0%} to "
            f"{high:.0%}",
            "change the seed, most_steps or look_every",
        )
    return model.eval(), looks


def start(lesson: Lesson, directory: Path, *, progress: bool = True) -> Path:
    """The directory of a taught model, taught now if it is not there.

    Raises:
        SettingError: as `teach`; or the directory holds another lesson's.
    """
    record = directory / RECORD
    told = _told(lesson)
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8"))["lesson"] != told:
            raise SettingError(
                f"{directory} holds a start made otherwise", "give another directory"
            )
        return directory
    model, looks = teach(lesson, progress=progress)
    make_directory(directory)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    write_text(record, json.dumps({"lesson": told, "looks": looks}, indent=1) + "\n")
    return directory


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sums: Sequence[Sum],
    *,
    samples: int,
    seed: int,
) -> float:
    """Avg@K at temperature 1.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        sums: what is asked.
        samples: K.
        seed: of the samples.
    """
    return float(ask(model, tokenizer, sums, samples, (seed,)).rewards.mean())


def _demonstrations(
    tokenizer: PreTrainedTokenizerFast, sums: Sequence[Sum]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded input_ids, and labels that count the response and its end alone."""
    rows, starts = [], []
    for one in sums:
        asked = tokenizer(one.prompt)["input_ids"]
        rows.append([*asked, *tokenizer(one.demonstration)["input_ids"], tokenizer.eos_token_id])
        starts.append(len(asked))
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for place, (row, first) in enumerate(zip(rows, starts, strict=True)):
        ids[place, : len(row)] = torch.tensor(row)
        labels[place, first : len(row)] = torch.tensor(row[first:])
    return ids, labels


def _told(lesson: Lesson) -> dict[str, Any]:
    """A lesson as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(vars(lesson)))
    return found
