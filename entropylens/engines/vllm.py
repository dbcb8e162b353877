"""vLLM: many answers at once, each drawn with a seed of its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropylens.engines.engine import Answers, Job, until_end
from entropylens.engines.hf import ends_in
from entropylens.errors import SettingError
from entropylens.prompts import Prompt
from entropylens.responses import Limits
from entropylens.sampling import Sampling, suggested
from entropylens.sources import hf, verl
from entropylens.sources.model_files import directory_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VLLMEngine"]

#: The lengths that vLLM is started for are multiples of this.
_STEP = 1024
#: Requests handed to vLLM at a time: it schedules them itself, and thousands wait cheaply.
IN_FLIGHT = 2048


class VLLMEngine:
    """A model in vLLM; see `engines.engine.Engine`. vLLM itself starts with the first answer.

    Args:
        model: a Hub id or a directory with safetensors.
        dtype: auto (the checkpoint's own) | float32 | bfloat16 | float16.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: let the repository's own Python code run.
        tensor_parallel: GPUs that hold the model together.

    Raises:
        SettingError: the model is a veRL checkpoint or a GGUF file.
        EntropyLensError: as `sources.hf.load`.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel: int = 1,
    ) -> None:
        path = Path(model).expanduser()
        if path.is_file() or verl.steps(path):
            raise SettingError(
                f"vLLM does not read {model!r}",
                "make a Hugging Face directory of it (`entropylens export CHECKPOINT DIR`), or "
                "pass --engine hf",
            )
        self.name = model
        self._path = path if path.is_dir() else None
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        options |= {"revision": revision} if self._path is None else {"local_files_only": True}
        source = model if self._path is None else str(path)
        with hf.explained(model):
            self._config = hf.load_config(source, options)
        hf.check_decoder(self._config, model, trust_remote_code)
        self.tokenizer: PreTrainedTokenizerBase | None = hf.load_tokenizer(
            source, self._path, options
        )
        text = self._config.get_text_config(decoder=True)
        context = getattr(text, "max_position_embeddings", None)
        self.limits = Limits(text.vocab_size, context)
        self._source, self._options = source, options
        self._generation_config = _generation_config(source, options)
        self.ends = ends_in(self._generation_config, text)
        if dtype != "auto" and dtype not in hf.DTYPES:
            raise SettingError(f"no dtype {dtype!r}", f"choose auto, {', '.join(hf.DTYPES)}")
        own = str(getattr(text, "dtype", None) or "float32").removeprefix("torch.")
        self._dtype = own if dtype == "auto" else dtype
        self.settings: Mapping[str, Any] = {"engine": "vllm", "dtype": self._dtype}
        self._tensor_parallel = tensor_parallel
        self._started: tuple[int, Any] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the directory's configuration and weights, or of the Hub's commit."""
        if self._path is not None:
            return directory_fingerprint(self._path)
        commit = getattr(self._config, "_commit_hash", None)
        return hashlib.sha256(f"{self.name}@{commit}".encode()).hexdigest()[:32]

    @property
    def is_supported(self) -> bool:
        """Whether vLLM knows the model's architecture."""
        from vllm import ModelRegistry

        known = set(ModelRegistry.get_supported_archs())
        return bool(known & set(getattr(self._config, "architectures", None) or ()))

    @property
    def suggested(self) -> Mapping[str, Any]:
        """The fields of Sampling that the model's generation_config sets."""
        return {} if self._generation_config is None else suggested(self._generation_config)

    def answer(
        self,
        prompts: Sequence[Prompt],
        jobs: Sequence[Job],
        wanted: Collection[Job],
        sampling: Sampling,
        produced: Callable[[int], object],
    ) -> Iterator[Answers]:
        """See `Engine.answer`. One request a (problem, sample): many samples in one request were
        reported to hang, and each has a seed of its own so.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        longest = max(len(prompt.ids) for prompt in prompts)
        engine = self._engine(longest + sampling.max_new_tokens)
        waiting = iter([job for job in jobs if job in wanted])
        running: dict[str, Job] = {}
        while True:
            while len(running) < IN_FLIGHT and (job := next(waiting, None)) is not None:
                prompt, sample = job
                ids = prompts[prompt].ids
                room = sampling.max_new_tokens
                if self.limits.context is not None:
                    room = min(room, self.limits.context - len(ids))
                params = SamplingParams(
                    max_tokens=room,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k or -1,
                    min_p=0.0,
                    repetition_penalty=sampling.repetition_penalty,
                    presence_penalty=0.0,
                    frequency_penalty=0.0,
                    seed=request_seed(sampling.seed, sample, prompts[prompt]),
                    stop_token_ids=sorted(self.ends),
                    ignore_eos=True,  # the end tokens are told above
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                name = f"{prompt}-{sample}"
                running[name] = job
                engine.add_request(name, {"prompt_token_ids": list(ids)}, params)
            if not running:
                return
            fresh: Answers = {}
            for output in engine.step():
                if output.finished:
                    ids = until_end(output.outputs[0].token_ids, self.ends)
                    produced(len(ids))
                    fresh[running.pop(output.request_id)] = ids
            if fresh:
                yield fresh

    def close(self) -> None:
        """End vLLM and give its memory back."""
        if self._started is not None:
            self._started[1].engine_core.shutdown()
            self._started = None

    def _engine(self, length: int) -> Any:
        """vLLM's own engine, started for prompts and answers of this length together."""
        length = -(-length // _STEP) * _STEP  # so that other prompts find it running
        if self.limits.context is not None:
            length = min(length, self.limits.context)
        if self._started is None or self._started[0] < length:
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
            from vllm import LLM

            self.close()
            try:
                llm = LLM(
                    model=self._source,
                    tokenizer=self._source,
                    trust_remote_code=self._options["trust_remote_code"],
                    revision=self._options.get("revision"),
                    dtype=self._dtype,
                    max_model_len=length,
                    tensor_parallel_size=self._tensor_parallel,
                    enable_prefix_caching=True,
                    generation_config="vllm",  # nothing of the model's own
                    **_of_this_machine(length),
                )
            except Exception as error:  # of vLLM, torch, CUDA, or a process that it started
                raise SettingError(
                    f"vLLM does not start with {self.name!r} ({type(error).__name__}: {error})",
                    "pass --engine hf; or where memory is short a smaller --max-new-tokens, or "
                    "more GPUs with --tensor-parallel",
                ) from error
            self._started = (length, llm.llm_engine)
        return self._started[1]


def request_seed(seed: int, sample: int, prompt: Prompt) -> int:
    """A number of 63 bits for one answer: the same wherever its prompt stands."""
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _of_this_machine(length: int) -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    # A prompt read in several steps meets a generator that cannot be set back there.
    return {"enforce_eager": True, "max_num_batched_tokens": max(8192, 2 * length)}


def _generation_config(source: str, options: Mapping[str, Any]) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source, **options)
    except OSError:  # it has none
        return None
