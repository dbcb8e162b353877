"""Random tiny models, built from a config, and a tokenizer made on the spot."""

import string

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2")
VOCAB = 97
CONTEXT = 512


def tiny_model(family, dtype=torch.float32, layers=4, seed=0):
    """A random model with d_model 32; weights are large enough for peaked policies."""
    sizes = (
        {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": CONTEXT}
        if family == "gpt2"
        else {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
        }
    )
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": VOCAB - 1}
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **sizes, **special)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.to(dtype).eval()


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
