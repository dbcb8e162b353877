"""bf16 products: near enough where they are used, float32 where they are not, and told."""

import io
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model

import entropylens
from entropylens import fast_reading, precision
from entropylens.errors import SettingError
from entropylens.fast_reading import FastSites, read_policies_fast
from entropylens.policy import EAGER, policy_head
from entropylens.precision import BOUND
from entropylens.readings import raw_sites, read_policies
from entropylens.responses import Response


@pytest.fixture(autouse=True)
def _bf16_everywhere(monkeypatch):
    """What is tested is the numbers: slow bf16 products are bf16 products."""
    monkeypatch.setattr(precision, "why_not_fast", lambda device: None)


@pytest.fixture
def many():
    generator = torch.Generator().manual_seed(1)

    def ids(count):
        return tuple(torch.randint(2, 90, (count,), generator=generator).tolist())

    return [Response(ids(4), ids(int(6 + 2 * place))) for place in range(12)]


def differences(fast, exact):
    names = [name for name in exact.layers if exact.layers[name].dtype == float]
    names = [name for name in names if not name.endswith(("_low", "_high"))]
    return (fast.layers[names] - exact.layers[names]).abs()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
@pytest.mark.parametrize("reading", ["raw", "normed", "both"])
def test_means_move_by_less_than_the_bound(family, reading, many):
    model = tiny_model(family)
    settings = {"reading": reading, "progress": False}
    exact = entropylens.analyze(model, many, **settings)
    fast = entropylens.analyze(model, many, precision="fast", **settings)
    assert fast.settings["precision"] == "fast"
    assert 0 < fast.settings["precision_error"] <= BOUND
    # Changes are of two sites each; the sample is not the whole run.
    assert differences(fast, exact).max(axis=None) < 2.5 * BOUND
    for name, found in exact.recommendations.items():
        assert fast.recommendations[name].layer == found.layer


def test_a_site_that_rounds_too_much_is_exact(many):
    """States far larger than usual: their logits are, and so is their rounding."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(300)
    exact = entropylens.analyze(model, many, progress=False)
    fast = entropylens.analyze(model, many, precision="fast", progress=False)
    count = int(fast.settings["precision_exact_sites"].split()[0])
    assert count > 0
    assert fast.settings["precision_error"] <= BOUND
    far = differences(fast, exact)
    assert far[["entropy_layer", "nll_layer", "kl_layer"]].max(axis=None) < 2.5 * BOUND


@torch.inference_mode()
def test_only_the_chosen_sites_round(any_model):
    from entropylens.capture import capture
    from entropylens.recognition import anatomy_of

    anatomy = anatomy_of(any_model)
    ids = torch.randint(2, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    states, _ = capture(anatomy, torch.arange(3, 12), ids, use_cache=False)
    tokens = torch.arange(9)
    head = policy_head(states.final, anatomy.unembedding, tokens)
    sites = replace_sums(raw_sites(states))
    rest = (sites, states.final, anatomy.unembedding, head, tokens, EAGER)
    exact = read_policies(*rest)
    layers = anatomy.num_layers
    alone = torch.zeros(4, layers, dtype=torch.bool)
    stream = torch.zeros(layers, dtype=torch.bool)
    alone[2, 1] = stream[2] = True
    found = read_policies_fast(*rest, FastSites(alone, stream))
    for group, (one, other) in enumerate(
        zip((*exact.plain, *exact.added), (*found.plain, *found.added), strict=True)
    ):
        for layer in range(layers):
            same = torch.allclose(one[layer], other[layer], atol=1e-9, rtol=0)
            assert same != bool(alone[group, layer])
    for layer in range(1, layers + 1):
        same = torch.allclose(exact.nll[layer], found.nll[layer], atol=1e-9, rtol=0)
        assert same != bool(stream[layer - 1])


def replace_sums(sites):
    """Every state's own product, in both: sums round otherwise."""
    return sites._replace(sums=False)


def test_where_it_is_no_faster_all_is_exact(many, monkeypatch, caplog):
    monkeypatch.setattr(precision, "why_not_fast", fast_reading.why_not_fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with caplog.at_level(logging.WARNING, logger="entropylens"):
        found = entropylens.analyze(tiny_model("llama"), many, precision="fast", progress=False)
    assert "neither avx512_bf16 nor AMX" in caplog.text
    assert found.settings["precision"].startswith("exact (")
    plain = entropylens.analyze(tiny_model("llama"), many, progress=False)
    np.testing.assert_array_equal(found.layers["delta_ffn"], plain.layers["delta_ffn"])


def test_what_is_refused(many):
    with pytest.raises(SettingError, match="no precision 'fastest'"):
        entropylens.analyze(tiny_model("llama"), many, precision="fastest", progress=False)


def test_a_page_and_a_summary_tell_it(many):
    from rich.console import Console

    from entropylens.report import report_page
    from entropylens.terminal import summary

    found = entropylens.analyze(tiny_model("llama"), many, precision="fast", progress=False)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(found))
    assert f"means move by at most {found.settings['precision_error']:.4f} nats" in (
        console.export_text()
    )
    assert "<dt>precision_error</dt>" in report_page(found)
    assert replace(found, settings={}).settings == {}
