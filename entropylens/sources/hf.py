"""Hugging Face models: by Hub id, directory or GGUF file, or already loaded."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entropylens.errors import (
    AllocationError,
    EntropyLensError,
    ModelAccessError,
    ModelNotFoundError,
    NotADecoderError,
    SettingError,
    WeightsError,
)
from entropylens.memory import is_allocation_failure
from entropylens.recognition import understand
from entropylens.sources.subject import Subject

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "attention_for",
    "check_decoder",
    "explained",
    "is_wrapper",
    "load",
    "load_config",
    "load_tokenizer",
    "load_unverified",
    "pick_device",
    "pick_dtype",
    "warn_of_missing_cap",
    "wrap",
]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Subject:
    """Load a model for reading, and verify that its states add up.

    Args:
        model: a Hub id, a directory with safetensors, or a GGUF file.
        dtype: auto (float32 on a CPU, the checkpoint's own on a GPU) or a torch dtype's name.
        device: auto (cuda, else cpu) or a torch device with float64, which mps has not.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: let the repository's own Python code run.
        name: what to call it; by default `model`.

    Raises:
        ModelNotFoundError, ModelAccessError, WeightsError, NotADecoderError,
        UnknownArchitectureError, DecompositionError, SettingError: what their names say.
    """
    loaded, tokenizer = load_unverified(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    local = Path(model).expanduser().exists()
    commit = None if local else getattr(loaded.config, "_commit_hash", None)
    return wrap(loaded, tokenizer, name=name or str(model), revision=commit)


def load_unverified(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a decoder and its tokenizer, without looking into it yet; arguments as for `load`."""
    path = _local_path(str(model))
    place = pick_device(device)
    torch_dtype = pick_dtype(dtype, place)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path is None:
        source: str = str(model)
        options["revision"] = revision
    else:
        options["local_files_only"] = True
        if path.is_file():
            from entropylens.sources.gguf import check_gguf

            check_gguf(path)
            source, options["gguf_file"] = str(path.parent), path.name
        else:
            _check_weights(path)
            source = str(path)
    with explained(str(model)):
        config = load_config(source, options)
    check_decoder(config, str(model), trust_remote_code)
    with explained(str(model)):
        loaded = _load_model(source, config, torch_dtype, options).to(place)
    return loaded, load_tokenizer(source, path, options)


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
) -> Subject:
    """Understand a loaded model as it stands; nothing of it is changed.

    A PEFT model is read with its active adapters.

    Raises:
        NotADecoderError, UnknownArchitectureError, DecompositionError: what their names say.
        SettingError: a PEFT model with virtual tokens.
    """
    if hasattr(model, "get_base_model"):  # a PeftModel; its layers stand in the base model
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            raise SettingError(
                f"the adapter adds virtual tokens ({model.active_peft_config.peft_type.value})",
                "entropylens reads adapters of weights, such as LoRA; merge or choose another",
            )
        model = model.get_base_model()
    warn_of_missing_cap(model.config)
    quantizer = getattr(model, "quantization_method", None)
    quantizer = getattr(quantizer, "value", quantizer)
    if quantizer not in (None, "bitsandbytes"):
        logger.warning("models quantized by %s are read by an untested path", quantizer)
    anatomy, verification = understand(model)
    name = name or model.config.name_or_path or type(model).__name__
    return Subject(name, revision, model, tokenizer, anatomy, verification)


def pick_device(device: str) -> torch.device:
    """The device that a user's word means.

    Raises:
        SettingError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, dtype=torch.float64, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingError(
            f"device {device!r} cannot be used ({str(error).strip()})",
            "pass --device cpu, or see `entropylens doctor` for the devices here",
        ) from error
    return place


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The dtype to load in; "auto" stands for the checkpoint's own.

    Raises:
        SettingError: no such dtype.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise SettingError(f"no dtype {dtype!r}", f"choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _local_path(model: str) -> Path | None:
    """The path that a name means, or None where it can only be a Hub id."""
    path = Path(model).expanduser()
    if model.strip() and path.exists():
        return path
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    if looks_local or model.endswith((".gguf", ".safetensors")) or not model.strip():
        raise ModelNotFoundError(f"model {model!r} does not exist", "check the path")
    return None


def _check_weights(path: Path) -> None:
    """Refuse a directory whose weights are missing, incomplete, corrupt or pickled."""
    from safetensors import SafetensorError, safe_open

    if not (path / "config.json").is_file():
        raise WeightsError(
            f"directory {str(path)!r} holds no model (config.json is missing)",
            "name a directory written by save_pretrained()",
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightsError(
                f"{str(index)!r} is corrupt ({error})", "copy or download the model again"
            ) from error
        files = [path / shard for shard in sorted(shards)]
    else:
        files = [path / "model.safetensors"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        others = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
        if others:
            raise WeightsError(
                f"directory {str(path)!r} holds pickled weights only ({others[0].name})",
                "pickles can run code and are not read; convert them with "
                "save_pretrained(..., safe_serialization=True)",
            )
        raise WeightsError(
            f"directory {str(path)!r} holds no weights ({missing[0].name} is missing)",
            "copy or download the model again",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"weights file {str(file)!r} is truncated or corrupt ({error})",
                "copy or download the model again",
            ) from error


def load_config(source: str, options: dict[str, Any]) -> PretrainedConfig:
    """The configuration behind a name or path."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, **options)


def check_decoder(config: PretrainedConfig, name: str, trust_remote_code: bool) -> None:
    """Refuse what is no causal language model.

    Raises:
        NotADecoderError: its configuration says so.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wrapper = is_wrapper(config)
    known = wrapper or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or trust_remote_code
    named = getattr(config, "architectures", None) or []
    causal = wrapper or not named or any("CausalLM" in it or "LMHeadModel" in it for it in named)
    if config.is_encoder_decoder or not known or not causal:
        what = ", ".join(named) or config.model_type
        raise NotADecoderError(
            f"{name!r} is no decoder-only language model ({what})",
            "entropylens reads causal language models such as Llama, Qwen or GPT-2",
        )


def attention_for(config: PretrainedConfig) -> dict[str, str]:
    """The attention that computes what the configuration says: sdpa knows no soft cap (Gemma 2)."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def warn_of_missing_cap(config: PretrainedConfig) -> None:
    """Say where a loaded model does not compute what its configuration says."""
    if attention_for(config) and config._attn_implementation == "sdpa":
        logger.warning(
            "this model runs without the soft cap of its attention, which sdpa leaves out, and is "
            "read as it runs; model.set_attn_implementation('eager') puts it in"
        )


def is_wrapper(config: PretrainedConfig) -> bool:
    """Is it a text stack with others around it (Gemma 3 4B and up, Llama 4, Mistral 3)?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    named = getattr(config, "architectures", None) or []
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and any(
        "ForConditionalGeneration" in it for it in named
    )


def _load_model(
    source: str, config: PretrainedConfig, dtype: torch.dtype | str, options: dict[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForImageTextToText if is_wrapper(config) else AutoModelForCausalLM
    options = options | attention_for(config)
    model, info = loader.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(info["missing_keys"]) - tied)
    wrong = sorted(str(key) for key in info["mismatched_keys"])
    if missing or wrong:
        raise WeightsError(
            f"the weights of {source!r} do not fit its configuration ({len(missing)} missing, "
            f"{len(wrong)} of a wrong shape, such as {(missing or wrong)[0]})",
            "copy or download the model again; a model without lm_head is no language model",
        )
    return model


def load_tokenizer(
    source: str, path: Path | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None where the model came without a usable one: ids still work."""
    from transformers import AutoTokenizer

    from entropylens.sources.gguf import load_gguf_tokenizer

    # Without these transformers may make up an empty tokenizer of the model's family.
    if path is not None and path.is_dir() and not any(map(list, map(path.glob, _TOKENIZER_FILES))):
        logger.warning("%s holds no tokenizer: it can read token ids only", source)
        return None
    try:
        if "gguf_file" in options and path is not None:
            return load_gguf_tokenizer(path)
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # transformers raises anything from OSError to AttributeError here
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        logger.warning("%s comes without a usable tokenizer (%s)", source, why)
        return None


@contextlib.contextmanager
def explained(name: str) -> Any:
    """Turn what the Hub, safetensors or torch raise into what the user can do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from safetensors import SafetensorError

    try:
        yield
    except EntropyLensError:
        raise
    except Exception as error:  # transformers wraps the Hub's errors in OSError and ValueError
        causes = list(_causes(error))
        if is_allocation_failure(error):
            raise AllocationError(
                f"not enough memory to load {name!r}", "choose --dtype bfloat16 or a smaller model"
            ) from error
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
            raise ModelAccessError(
                f"model {name!r} is gated",
                "accept its licence on its Hub page, then log in: hf auth login",
            ) from error
        if any(isinstance(cause, SafetensorError) for cause in causes):
            raise WeightsError(
                f"the weights of {name!r} are truncated or corrupt ({error})",
                "copy or download the model again",
            ) from error
        if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
            raise ModelNotFoundError(
                f"model {name!r} is neither a path here nor a model on the Hub",
                "check its spelling; for a private one log in: hf auth login",
            ) from error
        if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            raise ModelNotFoundError(
                f"model {name!r} has no such revision", "check --revision on its Hub page"
            ) from error
        unreachable = (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
        if any(isinstance(cause, unreachable) for cause in causes) or "connect to" in str(error):
            raise ModelNotFoundError(
                f"model {name!r} is no path here, and the Hub cannot be reached",
                "check the spelling and the network, or name a local directory",
            ) from error
        if isinstance(error, OSError | ValueError | KeyError | RuntimeError):
            raise WeightsError(
                f"model {name!r} cannot be loaded ({str(error).strip()[:300]})",
                "check the directory, or see the whole error with --debug",
            ) from error
        raise


def _causes(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
