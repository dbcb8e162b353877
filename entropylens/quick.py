"""recommend_layer(): the layer to train first, from no more than the answer needs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from entropylens.dataset_files import BUNDLED
from entropylens.decision import FILE_NAME, Decision, profile_of
from entropylens.engines.hf import HFEngine
from entropylens.errors import OutputDirectoryError, SettingError
from entropylens.ffn_meter import FFNMeter, full_products, sampled_positions
from entropylens.generation import generate
from entropylens.kernels.compiled import select_body
from entropylens.looks import Look, check_until_sure, look_at, looks_frame, planned_looks
from entropylens.measure import BATCH_TOKENS
from entropylens.prompts import Prompt, load_datasets, refuse_both
from entropylens.quantities import READINGS
from entropylens.recommend import Recommendation, recommend
from entropylens.responses import Response, parse_responses, read_responses
from entropylens.sampling import Sampling
from entropylens.sources import open_model
from entropylens.sources.subject import Subject
from entropylens.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["recommend_layer"]

logger = logging.getLogger(__name__)

#: Positions of a response that are read.
POSITIONS = 32
#: And in the normed reading that is shown beside a raw one that says nothing.
NORMED_POSITIONS = 8


def recommend_layer(
    model: Any = None,
    responses: str | Path | Iterable[Response | Mapping[str, Any]] | None = None,
    *,
    positions: int | None = POSITIONS,
    until_sure: float | None = None,
    reading: str = "auto",
    rule: str = "stages",
    datasets: Sequence[str] = (),
    num_prompts: int | None = None,
    sampling: Sampling | None = None,
    template: str | None = None,
    thinking: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    kernel: str = "auto",
    skip_bad: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Decision:
    """Name the layer to train first, reading the FFNs alone: 2L + 1 products a position.

    Args:
        model, responses, datasets, num_prompts, sampling, template, thinking, tokenizer: as for
            `analyze`.
        positions: how many of each response are read, drawn at random
            (`ffn_meter.sampled_positions`); None for all.
        until_sure: take, or answer, prompts in doublings and in a random order, and stop as soon
            as the answer is right with this probability (see `looks`); else all are taken.
        reading: raw | normed | auto: raw, and where that names no layer or finds no boundary
            ("applies: no"), the normed one beside it, on at most NORMED_POSITIONS of the same
            positions of each response.
        rule: as for `Analysis.recommend`; "paper" goes without until_sure.
        output: a directory for recommendation.json; None writes nothing.
        dtype, device, revision, trust_remote_code, batch_tokens, kernel, skip_bad: as for
            `analyze`.
        seed: of positions, the order of prompts, control and resamples.
        force: replace the recommendation.json in `output`.
        progress: show progress bars.

    Raises:
        EntropyLensError: its subclasses tell what is wrong and what to do.
    """
    check_until_sure(until_sure)
    _check(
        reading, rule, kernel, {"positions": positions, "batch_tokens": batch_tokens, "seed": seed}
    )
    if rule != "stages" and until_sure is not None:
        raise SettingError("until_sure is about the rule of the stages", "leave one of them out")
    refuse_both(responses, datasets, num_prompts, sampling, template, thinking)
    if output is not None and (Path(output) / FILE_NAME).exists() and not force:
        raise OutputDirectoryError(
            f"{str(output)!r} holds a {FILE_NAME} already", "choose another -o, or pass --force"
        )
    subject = open_model(
        model, tokenizer, dtype=dtype, device=device, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    settings: dict[str, Any] = {"device": subject.facts.device, "batch_tokens": batch_tokens}
    if responses is None:
        sampling = sampling or Sampling(seed=seed)
        datasets = tuple(datasets) or (BUNDLED,)
        prompts = load_datasets(
            datasets, subject.tokenizer, subject.limits, num_prompts=num_prompts,
            template=template, thinking=thinking,
        )  # fmt: skip
        source = _to_answer(subject, prompts, sampling, seed, progress)
        settings |= {"datasets": list(datasets), "num_prompts": num_prompts, "template": template}
        settings |= {"thinking": thinking, **asdict(sampling)}
    else:
        source = _given(subject, responses, skip_bad, seed)
        if isinstance(responses, str | Path):
            settings["responses"] = Path(responses).name
    desk = _Desk(subject, source, positions, batch_tokens, kernel, seed, progress)
    decision = _decide(desk, until_sure, reading, rule, settings)
    if output is not None:
        decision.save(output)
    return decision


class _Source(NamedTuple):
    """Prompts in the order in which they are taken, and how the responses to some are had.

    Args:
        num_prompts: how many.
        take: responses to the prompts [start, stop).
        num_tokens: of the responses to all prompts, from those of the ones taken.
    """

    num_prompts: int
    take: Callable[[int, int], list[Response]]
    num_tokens: Callable[[Sequence[Response], int], float]


class _Desk:
    """A model and its responses, read as far as is asked for."""

    def __init__(
        self,
        subject: Subject,
        source: _Source,
        positions: int | None,
        batch_tokens: int,
        kernel: str,
        seed: int,
        progress: bool,
    ) -> None:
        self.subject, self.source, self.positions = subject, source, positions
        self.batch_tokens, self.kernel, self.seed = batch_tokens, kernel, seed
        self.progress = progress
        self.taken: list[Response] = []
        self.prompts = 0
        self.products = 0
        self.used = "eager"
        self._meters: dict[str, FFNMeter] = {}

    def take(self, prompts: int) -> list[Response]:
        """The responses to further prompts, up to so many of all."""
        fresh = self.source.take(self.prompts, prompts)
        self.taken += fresh
        self.prompts = prompts
        return fresh

    def read(
        self, items: Sequence[Response], reading: str, positions: int | None, first_id: int = 0
    ) -> pd.DataFrame:
        """Rows of some responses, numbered from first_id on; see `FFNMeter.measure`."""
        meter = self._meter(reading, positions)
        total = sum(len(sampled_positions(it, positions, self.seed)) for it in items)
        desc = "measuring" if reading == "raw" else f"measuring ({reading})"
        with tqdm(total=total, desc=desc, unit="pos", disable=not self.progress) as bar:
            before = meter.products
            rows = meter.measure(items, bar)
        self.products += meter.products - before
        return rows.assign(response_id=rows["response_id"] + first_id)

    def _meter(self, reading: str, positions: int | None) -> FFNMeter:
        if reading not in self._meters:
            anatomy = self.subject.anatomy
            mean = sum(it.num_tokens for it in self.taken) / len(self.taken)
            each = mean if positions is None else min(positions, mean)
            rows = each * self.source.num_prompts * (2 * anatomy.num_layers + 1)
            body = select_body(self.kernel, anatomy.device, rows * anatomy.unembedding.vocab_size)
            self.used = body.name
            self._meters[reading] = FFNMeter(
                self.subject, reading, positions, body, self.batch_tokens, self.seed
            )
        return self._meters[reading]

    @property
    def share(self) -> float:
        """Products so far, of those that `analyze` would need for all prompts."""
        facts = self.subject.facts
        tokens = self.source.num_tokens(self.taken, self.prompts)
        return self.products / (tokens * full_products(facts.num_layers, facts.dtype))


def _decide(
    desk: _Desk,
    until_sure: float | None,
    reading: str,
    rule: str,
    settings: Mapping[str, Any],
) -> Decision:
    subject, count = desk.subject, desk.source.num_prompts
    main = "normed" if reading == "normed" else "raw"
    plan = (count,) if until_sure is None else planned_looks(count)
    looks: list[Look] = []
    frames: list[pd.DataFrame] = []
    rows = pd.DataFrame()
    for prompts in plan:
        start = len(desk.taken)
        frames.append(desk.read(desk.take(prompts), main, desk.positions, start))
        rows = pd.concat(frames, ignore_index=True)
        if until_sure is not None:
            profile = profile_of(rows, main, subject.dtype)
            looks.append(look_at(profile, until_sure, len(plan), seed=desk.seed))
            logger.info(_said(looks[-1]))
            if looks[-1].sure:
                break
    profile = profile_of(rows, main, subject.dtype)
    found = recommend(profile, reading=main, rule=rule, seed=desk.seed)
    measured, readings, positions = {main: rows}, {main: found}, {main: desk.positions}
    if reading == "auto" and _says_nothing(found) and None not in subject.anatomy.ffn:
        few = NORMED_POSITIONS
        few = few if desk.positions is None else min(few, desk.positions)
        measured["normed"] = desk.read(desk.taken, "normed", few)
        readings["normed"] = _normed(measured["normed"], few, rule, desk)
        positions["normed"] = few
    facts = subject.facts
    return Decision(
        recommendation=found,
        decided=None if until_sure is None else looks[-1].sure,
        until_sure=until_sure,
        looks=looks_frame(looks),
        readings=readings,
        measured=measured,
        positions=positions,
        products=desk.share,
        num_prompts=count,
        model=facts.name,
        revision=facts.revision,
        num_layers=facts.num_layers,
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        kernel=desk.used,
        seed=desk.seed,
        versions=versions(),
        settings=settings,
    )


def _says_nothing(found: Recommendation) -> bool:
    return found.layer is None or found.applies == "no"


def _normed(rows: pd.DataFrame, positions: int, rule: str, desk: _Desk) -> Recommendation:
    profile = profile_of(rows, "normed", desk.subject.dtype)
    found = recommend(profile, reading="normed", rule=rule, seed=desk.seed)
    return found.with_note(f"Read on at most {positions} positions of each response.")


def _said(look: Look) -> str:
    layer = "no layer" if look.layer is None else f"layer {look.layer}"
    return (
        f"{look.prompts} prompts: {layer}, stability {look.stability:.2f}, agreement "
        f"{look.agreement:.2f} of {look.bound:.3f}: {'sure' if look.sure else 'not sure'}"
    )


def _order(keys: Iterable[str], seed: int) -> list[str]:
    """Distinct prompts in an order that their content and the seed settle.

    A file may be sorted, by task or difficulty; the first prompts must stand for all.
    """
    return sorted(
        dict.fromkeys(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()
    )


def _given(
    subject: Subject,
    responses: str | Path | Iterable[Response | Mapping[str, Any]],
    skip_bad: bool,
    seed: int,
) -> _Source:
    if isinstance(responses, str | Path):
        checked = read_responses(responses, subject.tokenizer, subject.limits, skip_bad=skip_bad)
    else:
        checked = parse_responses(
            enumerate(responses, start=1), subject.tokenizer, subject.limits, skip_bad=skip_bad
        )
    by_prompt: dict[str, list[Response]] = {}
    for item in checked.items:
        by_prompt.setdefault(item.prompt_key, []).append(item)
    order = _order(by_prompt, seed)

    def take(start: int, stop: int) -> list[Response]:
        return [item for key in order[start:stop] for item in by_prompt[key]]

    total = sum(item.num_tokens for item in checked.items)
    return _Source(len(order), take, lambda _taken, _prompts: total)


def _to_answer(
    subject: Subject, prompts: Sequence[Prompt], sampling: Sampling, seed: int, progress: bool
) -> _Source:
    by_key: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_key.setdefault(prompt.key, []).append(prompt)
    order = _order(by_key, seed)
    engine = HFEngine.of(subject)

    def take(start: int, stop: int) -> list[Response]:
        asked = [prompt for key in order[start:stop] for prompt in by_key[key]]
        return list(generate(engine, asked, sampling, progress=progress))

    def num_tokens(taken: Sequence[Response], prompts_taken: int) -> float:
        # Those that were not answered are taken to be as long.
        return sum(it.num_tokens for it in taken) * len(order) / prompts_taken

    return _Source(len(order), take, num_tokens)


def _check(reading: str, rule: str, kernel: str, numbers: Mapping[str, int | None]) -> None:
    for name, value, known in (
        ("reading", reading, ("auto", *READINGS)),
        ("rule", rule, ("stages", "paper")),
        ("kernel", kernel, ("auto", "triton", "compiled", "eager")),
    ):
        if value not in known:
            raise SettingError(f"no {name} {value!r}", f"choose one of {', '.join(known)}")
    for name, number in numbers.items():
        least = 0 if name == "seed" else 1
        if number is not None and number < least:
            raise SettingError(f"{name} is {number}", f"give at least {least}")
