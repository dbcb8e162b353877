"""analyze(): from a model to its target layer; resumable in a directory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropylens.dataset_files import BUNDLED
from entropylens.engines.hf import HFEngine
from entropylens.errors import SettingError
from entropylens.generation import generate
from entropylens.measure import BATCH_TOKENS, measure
from entropylens.output import write_outputs
from entropylens.prompts import Prompt, load_datasets, refuse_both
from entropylens.quantities import READINGS
from entropylens.responses import Response, Responses, parse_responses, read_responses
from entropylens.results import Analysis
from entropylens.rundir import fingerprint, open_run
from entropylens.sampling import Sampling
from entropylens.sources import open_model
from entropylens.sources.subject import Subject
from entropylens.tokens import EVERYTHING, SHOWN, TokenKeeper
from entropylens.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["analyze"]

logger = logging.getLogger(__name__)

#: Top tokens that a report's token view shows.
SHOWN_TOP = 5


def analyze(
    model: Any = None,
    responses: str | Path | Iterable[Response | Mapping[str, Any]] | None = None,
    *,
    datasets: Sequence[str] = (),
    num_prompts: int | None = None,
    sampling: Sampling | None = None,
    template: str | None = None,
    thinking: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    reading: str = "raw",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    remote: bool | str = False,
    batch_tokens: int = BATCH_TOKENS,
    kernel: str = "auto",
    precision: str = "exact",
    skip_bad: bool = False,
    keep_tokens: Sequence[str] | None = None,
    top_tokens: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
    workers: int | None = None,
    ray_address: str | None = None,
) -> Analysis:
    """Measure every layer's and module's policy over a model's own responses.

    Args:
        model: a Hub id, a directory, a GGUF file or a veRL checkpoint; a loaded Hugging Face or
            PEFT model, a TransformerLens bridge or an nnsight model, which is left as it came;
            None for the bundled SmolLM2-135M-Instruct.
        responses: a JSONL file (see `responses.read_responses`) or such objects in memory; None
            lets the model answer `datasets`.
        datasets: files or `bundled` (the default); the choice is then shown for each of them.
        num_prompts, template, thinking: see `prompts.load_prompts`.
        sampling: how answers are drawn.
        tokenizer: of a loaded model, for anything that is text.
        output: a directory for all results; the same call resumes what was interrupted.
        reading: raw | normed | both.
        dtype, device, revision, trust_remote_code: how a named model is loaded.
        remote: let a server run an nnsight model and return what was read: True (NDIF), its URL,
            or "local" for a dry run here.
        batch_tokens: response positions whose states are held at a time.
        kernel: auto | triton | compiled | eager, the body that reduces the logits.
        precision: exact | fast: bf16 products, where this CPU is faster with them, at sites whose
            means they move by less than 0.01 nats on a sample of the run; the error is told.
        skip_bad: leave bad responses out and count them.
        keep_tokens: quantities to keep token by token too (`Analysis.tokens`, tokens.parquet).
            By default, entropy_layer and delta_layer of the first 3 responses, up to 256 tokens.
        top_tokens: how many of pi_l's most probable tokens to keep with them, and the produced
            token's rank; by default 5 of those responses. Where either is given, all responses
            are kept; (), and 0, keep nothing.
        seed: of the same-norm control and of resamples.
        force: replace another run in `output`.
        progress: show progress bars.
        workers: copies of a named model that share answering and measuring, each in a Ray actor
            on a GPU of its own where there are GPUs; None for this process alone.
        ray_address: of a running Ray cluster, or "auto"; None starts Ray on this machine.

    Raises:
        EntropyLensError: its subclasses tell what is wrong and what to do.
    """
    _check_settings(reading, kernel, precision, batch_tokens, seed)
    refuse_both(responses, datasets, num_prompts, sampling, template, thinking)
    if remote and responses is None:
        raise SettingError("remote= reads responses, it makes none", "pass responses")
    if remote and kernel in ("compiled", "triton"):
        raise SettingError("a server runs the eager kernel", "leave kernel at auto")
    if remote and precision != "exact":
        raise SettingError("a server computes exactly", "leave precision at exact")
    if remote and top_tokens:
        raise SettingError("top_tokens are not read remotely", "leave top_tokens at 0")
    _check_workers(workers, ray_address, model, remote)
    sampling = sampling or Sampling(seed=seed)
    loading = {
        "dtype": dtype, "device": device, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    opened = contextlib.ExitStack()
    subject: Subject | Workers
    if workers is None:
        subject = open_model(model, tokenizer, remote=remote, **loading)
    else:
        subject = opened.enter_context(
            contextlib.closing(Workers(model, workers, ray_address, loading))
        )
    with opened:
        prompts: tuple[Prompt, ...] = ()
        given = Responses(())
        settings: dict[str, Any] = {
            "model": subject.fingerprint,
            "dtype": subject.dtype,
            "reading": reading,
            "seed": seed,
        }
        if precision != "exact":
            settings["precision"] = precision
        keeper = _keeper(keep_tokens, top_tokens, reading, subject)
        if keeper is not None:
            settings["tokens"] = [keeper.names, keeper.top, *astuple(keeper.extent)]
        if responses is None:
            datasets = datasets or (BUNDLED,)
            prompts = load_datasets(
                datasets, subject.tokenizer, subject.limits, num_prompts=num_prompts,
                template=template, thinking=thinking,
            )  # fmt: skip
            settings |= {
                "sampling": asdict(sampling),
                "prompts": [(prompt.task, prompt.key) for prompt in prompts],
            }
        else:
            given = _checked(responses, subject, skip_bad)
            settings["responses"] = [
                (response.task, response.key, response.truncated) for response in given.items
            ]

        run = None if output is None else open_run(Path(output), settings, force=force)
        if run is not None:
            logger.info("writing to %s", run.path)
        if run is not None and run.complete:
            logger.info("%s is finished already: nothing is computed again", run.path)
            run.close()
            return Analysis.load(run.path)
        if prompts:
            journal = None if run is None else run.completions
            engine = HFEngine.of(subject) if isinstance(subject, Subject) else subject
            given = Responses(generate(engine, prompts, sampling, journal, progress=progress))
        analysis = measure(
            subject, given, run, reading=reading, batch_tokens=batch_tokens, kernel=kernel,
            seed=seed, keeper=keeper, progress=progress, precision=precision,
        )  # fmt: skip
        chosen: dict[str, Any] = {"device": subject.facts.device, "batch_tokens": batch_tokens}
        chosen |= analysis.settings
        vocabulary = getattr(subject.tokenizer, "get_vocab", None)
        if vocabulary is not None:
            chosen["tokenizer"] = fingerprint(vocabulary())
        if prompts:
            chosen |= {"datasets": list(datasets), "num_prompts": num_prompts, "template": template}
            chosen |= {"thinking": thinking, "sampling": asdict(sampling)}
        elif isinstance(responses, str | Path):
            chosen["responses"] = Path(responses).name
        analysis = replace(analysis, settings=chosen)
        if run is not None:
            write_outputs(analysis, run.path)
            run.close()
        return analysis


def _keeper(
    names: Sequence[str] | None, top: int | None, reading: str, subject: Subject | Workers
) -> TokenKeeper | None:
    if names is None and top is None:
        prefix = "normed_" if reading == "normed" else ""
        shown = [f"{prefix}entropy_layer", f"{prefix}delta_layer"]
        top = SHOWN_TOP if subject.remote is None else 0
        return TokenKeeper(shown, top, reading, subject.tokenizer, SHOWN)
    if not names and not top:
        return None
    return TokenKeeper(names or (), top or 0, reading, subject.tokenizer, EVERYTHING)


def _check_settings(
    reading: str, kernel: str, precision: str, batch_tokens: int, seed: int
) -> None:
    for name, value, known in (
        ("reading", reading, (*READINGS, "both")),
        ("kernel", kernel, ("auto", "triton", "compiled", "eager")),
        ("precision", precision, ("exact", "fast")),
    ):
        if value not in known:
            raise SettingError(f"no {name} {value!r}", f"choose one of {', '.join(known)}")
    for name, number, least in (("batch_tokens", batch_tokens, 1), ("seed", seed, 0)):
        if number < least:
            raise SettingError(f"{name} is {number}", f"give at least {least}")


def _check_workers(
    workers: int | None, ray_address: str | None, model: Any, remote: bool | str
) -> None:
    if workers is None:
        if ray_address is not None:
            raise SettingError("a Ray cluster is named and no workers", "pass --workers N too")
        return
    if workers < 1:
        raise SettingError(f"workers is {workers}", "give at least 1")
    if remote:
        raise SettingError("remote= lets a server read the model", "leave out workers or remote")
    if not (model is None or isinstance(model, str | Path)):
        raise SettingError(
            "each worker opens the model itself, and a loaded one cannot travel to it",
            "name the model by its Hub id or path, or leave workers out",
        )


def _checked(
    responses: str | Path | Iterable[Response | Mapping[str, Any]],
    subject: Subject | Workers,
    skip_bad: bool,
) -> Responses:
    if isinstance(responses, str | Path):
        return read_responses(responses, subject.tokenizer, subject.limits, skip_bad=skip_bad)
    return parse_responses(
        enumerate(responses, start=1), subject.tokenizer, subject.limits, skip_bad=skip_bad
    )
