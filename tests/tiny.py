"""Tiny models of entropylens.specimens, and a tokenizer made on the spot."""

import string

from transformers import PreTrainedTokenizerFast

from entropylens.specimens import CONTEXT, EVERY_FAMILY, VOCAB, tiny_config, tiny_model

__all__ = [
    "CONTEXT",
    "EVERY_FAMILY",
    "FAMILIES",
    "VOCAB",
    "tiny_config",
    "tiny_model",
    "tiny_tokenizer",
]

#: The layouts that most tests run on; tests/test_families.py runs on EVERY_FAMILY.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2")


def tiny_tokenizer():
    """One token a printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [c for c in " \n" + string.printable[:94] if c not in '~"']
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return fast
