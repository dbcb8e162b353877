"""GGUF files: checked before they are read, and their tokenizers mended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropylens.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_gguf", "load_gguf_tokenizer"]


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF, or ends before its tensors do.

    Raises:
        WeightsError: it is truncated or corrupt.
    """
    try:
        reader = _reader(path)
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
        whole = end <= path.stat().st_size
    except Exception as error:  # the reader raises whatever its numpy views stumble over
        raise WeightsError(
            f"GGUF file {str(path)!r} is truncated or corrupt ({error})",
            "copy or download the file again",
        ) from error
    if not whole:
        raise WeightsError(
            f"GGUF file {str(path)!r} is truncated ({path.stat().st_size} of {end} bytes)",
            "copy or download the file again",
        )


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a GGUF file, with what transformers' conversion loses put back.

    transformers up to 5.10 takes the wrong end token, no padding token, and drops the digit
    splitting of the `smollm` pre-tokenizer.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = _reader(path).fields

    def field(name: str) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    for role, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        token_id = field(key)
        if token_id is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(int(token_id)))
    # Cleaning up would take blanks before punctuation out of decoded text.
    tokenizer.clean_up_tokenization_spaces = False
    if field("pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)
