"""Every quantity of every family against the plain computation in reference.py."""

import numpy as np
import pytest
import torch
from reference import plain_quantities
from tiny import tiny_model

import entropylens
from entropylens.policy import entropy_float64
from entropylens.quantities import quantities_of


@pytest.mark.parametrize("batch_tokens", [5, 512])
def test_every_quantity_is_the_plain_one(any_model, responses, batch_tokens):
    analysis = entropylens.analyze(
        any_model, responses, reading="both", batch_tokens=batch_tokens, progress=False
    )
    frame = analysis.responses
    for index, response in enumerate(responses):
        expected, policy_entropy, policy_nll = plain_quantities(any_model, response)
        rows = frame[frame["response_id"] == index]
        assert rows["layer"].tolist() == [1, 2, 3, 4]
        for name, values in expected.items():
            np.testing.assert_allclose(rows[name], values, atol=1e-8, err_msg=name)
        assert rows["policy_entropy"].iloc[0] == pytest.approx(policy_entropy, abs=1e-8)
        assert rows["policy_nll"].iloc[0] == pytest.approx(policy_nll, abs=1e-8)
    # Behind its own norm, the last layer is the model.
    last = frame[frame["layer"] == 4]
    np.testing.assert_allclose(last["normed_nll_layer"], last["policy_nll"], atol=1e-9)
    np.testing.assert_allclose(last["normed_kl_layer"], 0, atol=1e-9)
    assert (last["normed_agree_layer"] == 1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_float32_accumulation_stays_exact(family, responses):
    double = entropylens.analyze(tiny_model(family, torch.float64), responses, progress=False)
    single = entropylens.analyze(tiny_model(family, torch.float32), responses, progress=False)
    for name in quantities_of("raw"):
        np.testing.assert_allclose(
            single.layers[name], double.layers[name], atol=1e-3, rtol=1e-4, err_msg=name
        )


def test_a_bf16_stream_gets_its_own_product(responses):
    """H^l is rounded after each addition, so its policy is not that of the unrounded sum."""
    from entropylens.batching import pieces
    from entropylens.recognition import anatomy_of

    model = tiny_model("llama", torch.bfloat16)
    analysis = entropylens.analyze(model, responses[:1], progress=False)
    (piece,) = pieces(anatomy_of(model), responses[:1], [0], 512)
    unembedding = anatomy_of(model).unembedding
    for place, state in enumerate(piece.states.stream_out):
        expected = float(entropy_float64(state, unembedding).mean())
        assert analysis.layers["entropy_layer"][place] == pytest.approx(expected, abs=1e-4)


def test_a_bias_belongs_to_every_policy(responses):
    model = tiny_model("llama", torch.float64)
    bias = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.lm_head.bias = torch.nn.Parameter(bias)
    analysis = entropylens.analyze(model, responses[:1], reading="both", progress=False)
    ids = responses[0].prompt_ids + responses[0].response_ids
    start = len(responses[0].prompt_ids) - 1
    for module in (None, "attn", "ffn"):
        log_probs = entropylens.internal_policy(model, ids, 2, module)[start:-1]
        expected = float(-(log_probs.exp() * log_probs).sum(-1).mean())
        name = f"entropy_{module or 'layer'}"
        assert analysis.layers[name][1] == pytest.approx(expected, abs=1e-9)
    tokens = torch.tensor(responses[0].response_ids)
    log_probs = entropylens.internal_policy(model, ids, 2)[start:-1]
    assert analysis.layers["nll_layer"][1] == pytest.approx(
        float(-log_probs[range(len(tokens)), tokens].mean()), abs=1e-9
    )
    last = analysis.responses[analysis.responses["layer"] == 4]
    np.testing.assert_allclose(last["normed_nll_layer"], last["policy_nll"], atol=1e-9)
