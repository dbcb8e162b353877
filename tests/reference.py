"""The same quantities computed plainly and independently, one response at a time.

What a branch adds to the stream is found by ablation: with all parameters of a layer's FFN set
to zero, the layer gives H^{l-1} + A^l, and F^l is what is missing to H^l. Whether there is a
middle state is found by ablating attention. Nothing of entropylens is used; logits are whole.
"""

from contextlib import contextmanager

import torch

DECODERS = ("model", "transformer", "decoder", "backbone")
LISTS = ("layers", "h", "blocks")
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
MIXERS = ("self_attn", "linear_attn", "mamba", "attn", "attention", "self_attention", "mixer")
FFNS = ("mlp", "ffn", "feed_forward", "shared_mlp", "block_sparse_moe", "fc1", "fc2")


def plain_quantities(model, response):
    """Name -> [layers] means over the response's tokens, and pi_theta's entropy and NLL."""
    decoder = model.base_model
    while not any(hasattr(decoder, name) for name in LISTS):
        decoder = _first(decoder, DECODERS)
        assert decoder is not None
    layers, norm = list(_first(decoder, LISTS)), _first(decoder, NORMS)
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    read = slice(len(response.prompt_ids) - 1, ids.shape[1] - 1)
    tokens = ids[0, len(response.prompt_ids) :]
    logits, stream, reads = _run(model, layers, ids)

    def policy(state):
        with torch.no_grad():
            scores = _output(model.config, model.get_output_embeddings()(state[read]))
        return torch.log_softmax(scores.double(), -1)

    def entropy(state):
        return -(policy(state).exp() * policy(state)).sum(-1)

    def normed(state):
        with torch.no_grad():
            return norm(state)

    theta = torch.log_softmax(logits[read].double(), -1)
    rows = []
    for place, layer in enumerate(layers):
        before, after = stream[place], stream[place + 1]
        mixers, ffns = _branches(layer)
        absent = torch.full_like(before, torch.nan)
        with _ablated(ffns):
            mid = _run(model, layers, ids)[1][place + 1]
        attn, ffn = mid - before, after - mid
        with _ablated(mixers):
            serial = not torch.equal(_run(model, layers, ids)[2][place][1], reads[place][1])
        base = mid if serial or not ffns or not mixers else before
        if not mixers:
            attn = absent
        if not ffns:
            ffn = absent
        attn_in, ffn_in = reads[place]
        no_middle = absent if base is before and mixers and ffns else base
        row = {
            "entropy_layer": entropy(after),
            "entropy_attn": entropy(attn),
            "entropy_ffn": entropy(ffn),
            "delta_layer": entropy(after) - entropy(before),
            "delta_attn": entropy(attn) - entropy(attn_in),
            "delta_ffn": entropy(ffn) - entropy(ffn_in),
            "cos_attn": _cosine(attn, before)[read],
            "cos_ffn": _cosine(ffn, base)[read],
            "cos_final": _cosine(after, stream[-1])[read],
            "normed_entropy_layer": entropy(normed(after)),
            "normed_entropy_attn": entropy(normed(attn)),
            "normed_entropy_ffn": entropy(normed(ffn)),
            "normed_delta_layer": entropy(normed(after)) - entropy(normed(before)),
            "normed_delta_attn": entropy(normed(attn)) - entropy(normed(before)),
            "normed_delta_ffn": entropy(normed(ffn)) - entropy(normed(base)),
            "normed_step_attn": entropy(normed(no_middle)) - entropy(normed(before)),
            "normed_step_ffn": entropy(normed(after)) - entropy(normed(no_middle)),
        }
        if not mixers:
            row["normed_step_attn"] = entropy(absent)
        if not ffns:
            row["normed_step_ffn"] = entropy(absent)
        for name, state in (
            ("layer", after), ("attn", attn), ("ffn", ffn), ("attn_in", attn_in),
            ("mid", no_middle), ("ffn_in", ffn_in),
        ):  # fmt: skip
            row[f"rms_{name}"] = (state.norm(dim=-1) / state.shape[-1] ** 0.5)[read]
        for prefix, log_probs in (("", policy(after)), ("normed_", policy(normed(after)))):
            row[f"{prefix}nll_layer"] = -log_probs[range(len(tokens)), tokens]
            row[f"{prefix}agree_layer"] = (log_probs.argmax(-1) == theta.argmax(-1)).double()
            row[f"{prefix}kl_layer"] = (theta.exp() * (theta - log_probs)).sum(-1)
        rows.append(row)
    found = {name: [float(row[name].detach().mean()) for row in rows] for name in rows[0]}
    policy_entropy = float(-(theta.exp() * theta).sum(-1).mean())
    policy_nll = float(-theta[range(len(tokens)), tokens].mean())
    return found, policy_entropy, policy_nll


def _first(module, names):
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _branches(layer):
    """The modules of each branch; a slot called "mixer" may hold an FFN."""
    named = dict(layer.named_children())
    mixers = [named[name] for name in MIXERS if named.get(name) is not None]
    ffns = [named[name] for name in FFNS if named.get(name) is not None]
    slots = [it for it in mixers if type(it).__name__.endswith(("MLP", "MoE"))]
    return [it for it in mixers if it not in slots], ffns + slots


@contextmanager
def _ablated(modules):
    parameters = [parameter for module in modules for parameter in module.parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _run(model, layers, ids):
    """Logits, H^0..H^L, and what attention and FFN of each layer read; positions first."""
    stream, reads, handles = {}, {}, []

    def given(args, kwargs):
        return args[0] if args else kwargs["hidden_states"]

    def flat(state):
        return state.detach().reshape(-1, state.shape[-1]).clone()

    def watch_layer(place):
        def hook(_module, args, kwargs, output):
            stream[place] = flat(given(args, kwargs))
            stream[place + 1] = flat(output[0] if isinstance(output, tuple) else output)

        return hook

    def watch_branch(key):
        def hook(_module, args, kwargs):
            reads[key] = flat(given(args, kwargs))

        return hook

    for place, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(watch_layer(place), with_kwargs=True))
        for kind, modules in enumerate(_branches(layer)):
            if modules:
                hook = watch_branch((place, kind))
                handles.append(modules[0].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    nothing = torch.full_like(stream[0], torch.nan)
    both = [[reads.get((place, kind), nothing) for kind in (0, 1)] for place in range(len(layers))]
    return logits, [stream[place] for place in range(len(layers) + 1)], both


def _output(config, logits):
    """What each model's own forward() does after lm_head."""
    if config.model_type.startswith("gemma") and getattr(config, "final_logit_softcapping", None):
        return config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    if config.model_type.startswith("cohere"):
        return logits * config.logit_scale
    if config.model_type.startswith("granite"):
        return logits / config.logits_scaling
    return logits


def _cosine(left, right):
    return (left * right).sum(-1) / (left.norm(dim=-1) * right.norm(dim=-1))
