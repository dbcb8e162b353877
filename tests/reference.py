"""The same quantities computed plainly and independently, in float64, one response at a time.

States come from the norms' inputs and outputs and from differences along the stream, not from
the modules that entropylens hooks; logits are built whole.
"""

import torch

NORMS = {"gpt2": ("ln_1", "ln_2")}
PATHS = {"gpt2": ("transformer", "h", "ln_f")}


def plain_quantities(model, response):
    """Name -> [layers] means over the response's tokens, and pi_theta's entropy and NLL."""
    family = model.config.model_type
    first_norm, second_norm = NORMS.get(family, ("input_layernorm", "post_attention_layernorm"))
    decoder_path, layers_path, norm_path = PATHS.get(family, ("model", "layers", "norm"))
    decoder = getattr(model, decoder_path)
    layers, norm = getattr(decoder, layers_path), getattr(decoder, norm_path)
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    start, stop = len(response.prompt_ids) - 1, ids.shape[1] - 1
    tokens = ids[0, start + 1 : stop + 1]

    reads, handles = {}, []

    def watch(key, module):
        def hook(_module, args, output):
            reads[key] = (args[0][0, start:stop], output[0, start:stop])

        handles.append(module.register_forward_hook(hook))

    for place, layer in enumerate(layers):
        watch((place, 1), getattr(layer, first_norm))
        watch((place, 2), getattr(layer, second_norm))
    watch("final", norm)
    with torch.no_grad():
        logits = model(ids).logits[0, start:stop].double()
    for handle in handles:
        handle.remove()

    weight = model.get_output_embeddings().weight.double()
    theta = torch.log_softmax(logits, -1)
    stream_in = [reads[place, 1][0] for place in range(len(layers))] + [reads["final"][0]]
    rows = []
    for place in range(len(layers)):
        before, after = stream_in[place], stream_in[place + 1]
        attn_in, mid, ffn_in = reads[place, 1][1], reads[place, 2][0], reads[place, 2][1]
        attn, ffn = mid - before, after - mid
        with torch.no_grad():
            n_before, n_mid, n_after, n_attn, n_ffn = map(norm, (before, mid, after, attn, ffn))
        log_probs = torch.log_softmax(after @ weight.T, -1)
        row = {
            "entropy_layer": _entropy(after, weight),
            "entropy_attn": _entropy(attn, weight),
            "entropy_ffn": _entropy(ffn, weight),
            "delta_layer": _entropy(after, weight) - _entropy(before, weight),
            "delta_attn": _entropy(attn, weight) - _entropy(attn_in, weight),
            "delta_ffn": _entropy(ffn, weight) - _entropy(ffn_in, weight),
            "cos_attn": _cosine(attn, before),
            "cos_ffn": _cosine(ffn, mid),
            "cos_final": _cosine(after, stream_in[-1]),
            "nll_layer": -log_probs[range(len(tokens)), tokens],
            "agree_layer": (log_probs.argmax(-1) == theta.argmax(-1)).double(),
            "kl_layer": (theta.exp() * (theta - log_probs)).sum(-1),
            "normed_entropy_layer": _entropy(n_after, weight),
            "normed_entropy_attn": _entropy(n_attn, weight),
            "normed_entropy_ffn": _entropy(n_ffn, weight),
            "normed_delta_layer": _entropy(n_after, weight) - _entropy(n_before, weight),
            "normed_delta_attn": _entropy(n_attn, weight) - _entropy(n_before, weight),
            "normed_delta_ffn": _entropy(n_ffn, weight) - _entropy(n_mid, weight),
            "normed_step_attn": _entropy(n_mid, weight) - _entropy(n_before, weight),
            "normed_step_ffn": _entropy(n_after, weight) - _entropy(n_mid, weight),
        }
        for name, state in (
            ("layer", after), ("attn", attn), ("ffn", ffn), ("attn_in", attn_in), ("mid", mid),
            ("ffn_in", ffn_in),
        ):  # fmt: skip
            row[f"rms_{name}"] = state.norm(dim=-1) / state.shape[-1] ** 0.5
        rows.append(row)
    found = {name: [float(row[name].detach().mean()) for row in rows] for name in rows[0]}
    policy_entropy = float(-(theta.exp() * theta).sum(-1).mean())
    policy_nll = float(-theta[range(len(tokens)), tokens].mean())
    return found, policy_entropy, policy_nll


def _entropy(states, weight):
    log_probs = torch.log_softmax(states.double() @ weight.T, -1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _cosine(left, right):
    return (left * right).sum(-1) / (left.norm(dim=-1) * right.norm(dim=-1))
