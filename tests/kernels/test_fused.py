"""The Triton kernel, on Triton's interpreter, against plain float64 and the eager body.

All bounds follow from u = 2^-24, float32's unit roundoff, and the number of roundings. Most
logits here are multiples of 1/64 below 2^17, which float32 products and sums hold exactly: then
only the reduction rounds.
"""

import functools
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

import entropylens
from entropylens.batching import pieces
from entropylens.kernels import compiled, fused, fused_reading
from entropylens.kernels.fused import (
    FUSED,
    INTERPRETED,
    LONGEST_SPAN,
    Asked,
    available,
    choose_span,
    merge,
    reduce_rows,
)
from entropylens.policy import EAGER, VOCAB_TILE, Unembedding, entropy_float64, policy_head
from entropylens.quantities import quantities_of
from entropylens.readings import Sites, TopTokens, normed_reading, raw_reading, read_policies
from entropylens.recognition import anatomy_of
from entropylens.responses import Response
from entropylens.transform import IDENTITY, OutputTransform

CPU = torch.device("cpu")
U = 2.0**-24

pytestmark = pytest.mark.skipif(bool(available(CPU)), reason=available(CPU) or "available")


def exact(seed, *shape, dtype=torch.float32, largest=8):
    """Multiples of 1/8 up to largest/8: every dtype holds them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-largest, largest + 1, shape, generator=generator) / 8).to(dtype)


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def log_probs_of(states, unembedding):
    return torch.log_softmax(logits_of(states, unembedding), -1)


def logits_of(states, unembedding):
    logits = states.double() @ unembedding.weight.double().T
    if unembedding.bias is not None:
        logits = logits + unembedding.bias.double()
    return unembedding.transform(logits)


def roundings(vocab):
    """Those of one term of a sum: its exp, the sum of its block, five a merge of blocks."""
    block = INTERPRETED[1]
    return 4 + block + 5 * math.ceil(vocab / block)


def logit_error(states, unembedding, additions=0):
    """What float32 may lose of a logit: products summed in any order, bias, scale, soft cap."""
    reach = (states.double().abs() @ unembedding.weight.double().abs().T).max().item()
    if unembedding.bias is not None:
        reach += unembedding.bias.double().abs().max().item()
    transform = unembedding.transform
    softcap = 8 * U * (transform.softcap or 0.0)
    return (states.shape[-1] + 2 + additions) * U * reach * abs(transform.scale) + softcap


def entropy_bound(vocab, of_logits=0.0):
    """|dH| <= 2 H max|dl|; H = log T - W/T, T and W off by roundings * u each, |W/T| <= ln V."""
    return 2 * math.log(vocab) * of_logits + roundings(vocab) * U * (1 + 2 * math.log(vocab))


def entropies(states, unembedding, span=None):
    found = reduce_rows(
        states, unembedding.weight, unembedding.bias, unembedding.transform, None, span
    )
    return merge(found).entropy()


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@dtypes
@pytest.mark.parametrize(("vocab", "d_model"), [(97, 36), (1000, 100), (4099, 36)])
def test_entropy_is_the_oracles_to_the_roundings_of_the_sums(dtype, vocab, d_model):
    unembedding = Unembedding(exact(0, vocab, d_model, dtype=dtype))
    states = exact(1, 35, d_model, dtype=dtype)
    torch.testing.assert_close(
        entropies(states, unembedding),
        entropy_float64(states, unembedding),
        atol=entropy_bound(vocab),
        rtol=0,
    )


@dtypes
@pytest.mark.parametrize("transform", [IDENTITY, OutputTransform(0.25), OutputTransform(0.5, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_scale_and_soft_cap_are_applied(dtype, transform, bias):
    weight, shift = normal(0, 150, 100, dtype=dtype), normal(2, 150, dtype=dtype)
    unembedding = Unembedding(weight, shift if bias else None, transform)
    for size in (1e-2, 1.0, 30.0):
        states = normal(1, 5, 100, dtype=dtype) * size
        torch.testing.assert_close(
            entropies(states, unembedding),
            entropy_float64(states, unembedding),
            atol=entropy_bound(150, logit_error(states, unembedding)),
            rtol=0,
        )


@dtypes
@pytest.mark.parametrize("shift", [-32768.0, 32768.0])
def test_a_common_shift_of_all_logits_costs_nothing(dtype, shift):
    weight = torch.cat([exact(0, 1000, 36, dtype=dtype), torch.ones(1000, 1, dtype=dtype)], 1)
    states = torch.cat([exact(1, 9, 36, dtype=dtype), torch.full((9, 1), shift, dtype=dtype)], 1)
    unembedding = Unembedding(weight)
    expected = entropy_float64(states, unembedding)
    found = entropies(states, unembedding)
    torch.testing.assert_close(found, expected, atol=entropy_bound(1000), rtol=0)


@dtypes
def test_one_hot_and_uniform_policies_have_the_exact_limits(dtype):
    weight = torch.eye(97, dtype=dtype)
    states = torch.cat([torch.zeros(1, 97), torch.eye(97)[[0, 64, 96]] * 3e4]).to(dtype)
    found = entropies(states, Unembedding(weight))
    assert found[0].item() == pytest.approx(math.log(97), abs=roundings(97) * U)
    assert found[1:].tolist() == pytest.approx([0.0] * 3, abs=1e-30)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_logits_that_overflow_are_no_small_ones():
    states = torch.tensor([[3e38, 3e38], [1.0, 1.0]])
    found = entropies(states, Unembedding(torch.ones(5, 2)))
    assert found.isnan().tolist() == [True, False]


def test_operands_of_two_dtypes_meet_in_float32():
    states, weight = exact(0, 5, 36, dtype=torch.float32), exact(1, 97, 36, dtype=torch.bfloat16)
    expected = entropy_float64(states, Unembedding(weight))
    found = entropies(states, Unembedding(weight))
    torch.testing.assert_close(found, expected, atol=entropy_bound(97), rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 70),
    vocab=st.integers(1, 300),
    d_model=st.integers(1, 70),
    span=st.integers(40, 301),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_shape_and_any_split_of_the_vocabulary(seed, rows, vocab, d_model, span, dtype):
    unembedding = Unembedding(exact(seed, vocab, d_model, dtype=dtype))
    states = exact(seed + 1, rows, d_model, dtype=dtype)
    expected, atol = entropy_float64(states, unembedding), entropy_bound(max(vocab, 2))
    torch.testing.assert_close(entropies(states, unembedding, span), expected, atol=atol, rtol=0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 39), edge=st.integers(1, 149))
def test_splitting_rows_or_tiles_changes_nothing(seed, cut, edge):
    weight, states = exact(seed, 150, 36), exact(seed + 1, 40, 36)
    whole = reduce_rows(states, weight, None, IDENTITY)
    rows = [reduce_rows(part, weight, None, IDENTITY) for part in (states[:cut], states[cut:])]
    assert torch.equal(torch.cat(rows, -1), whole)
    tiles = [reduce_rows(states, part, None, IDENTITY) for part in (weight[:edge], weight[edge:])]
    found = merge(torch.cat(tiles)).entropy()
    torch.testing.assert_close(found, merge(whole).entropy(), atol=2 * entropy_bound(150), rtol=0)


@dtypes
@pytest.mark.parametrize("transform", [IDENTITY, OutputTransform(0.5, 4.0)])
def test_what_is_asked_of_the_stream(dtype, transform):
    vocab, positions, layers = 297, 13, 3
    unembedding = Unembedding(exact(0, vocab, 36, dtype=dtype), exact(2, vocab), transform)
    final, states = (
        exact(1, positions, 36, dtype=dtype),
        exact(3, layers * positions, 36, dtype=dtype),
    )
    tokens = torch.arange(positions) * 24  # the last of them at the vocabulary's end
    tokens[-1] = vocab - 1
    theta = log_probs_of(final, unembedding)
    tops = theta.argmax(-1)
    parts = []
    for start, stop in ((0, 128), (128, vocab)):
        asked = Asked(theta[:, start:stop].exp().float(), tokens - start, tops - start)
        bias = unembedding.bias[start:stop]
        parts.append(
            reduce_rows(states, unembedding.weight[start:stop], bias, transform, asked, 80)
        )
    found = merge(torch.cat(parts))

    logits, of_logits = logits_of(states, unembedding), logit_error(states, unembedding)
    rows = torch.arange(layers * positions)
    close = {"atol": of_logits, "rtol": 0}
    torch.testing.assert_close(found.maximum, logits.amax(-1), **close)
    torch.testing.assert_close(found.at_token, logits[rows, tokens.repeat(layers)], **close)
    torch.testing.assert_close(found.at_top, logits[rows, tops.repeat(layers)], **close)
    size = logits.abs().max().item()
    sums = {"atol": of_logits + roundings(vocab) * U * size, "rtol": 0}
    dot = (theta.exp().repeat(layers, 1) * logits).sum(-1)
    torch.testing.assert_close(found.dot, dot, **sums)
    log_normalizer = logits.logsumexp(-1)
    torch.testing.assert_close(found.log_normalizer(), log_normalizer, **sums)


def test_spans_fill_a_card_and_stay_short():
    for row_blocks in (1, 4, 32, 33, 144, 1000):
        for columns in (97, 16384, 151936, 262144):
            span = choose_span(row_blocks, columns, 132)
            assert 0 < span <= LONGEST_SPAN
            assert span % 256 == 0
            rounds = math.ceil(row_blocks * math.ceil(columns / span) / 132)
            if columns > 16384:
                assert row_blocks * columns >= 0.85 * rounds * span * 132


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from entropylens.kernels import fused_triton

kernel, config = fused_triton.reduce_rows, fused_triton.HALF_CONFIGS[0]
names = kernel.arg_names
pointers = {"states": "*bf16", "weight": "*bf16", "bias": "*bf16", "probs": "*fp32"}
pointers |= {"tokens": "*i64", "tops": "*i64", "out": "*fp32"}
strides = ("width", "state_stride", "weight_stride", "probs_stride")
for asked in (False, True):
    constants = {"HAS_BIAS": True, "HAS_SCALE": True, "HAS_SOFTCAP": True, "ASKED": asked}
    constants |= {"WIDEN": False, "EVEN": True, "FLOOR": -80.0, "BLOCK_ROWS": 128, **config.kwargs}
    types = dict.fromkeys(names, "i32") | pointers | {"scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *strides)}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in done.asm["ptx"]
    assert done.asm["cubin"]
"""


def test_it_compiles_for_hopper_without_a_card(tmp_path):
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


# Readings


@pytest.fixture
def biased():
    model = tiny_model("llama")
    bias = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


@pytest.fixture(params=["llama", "gemma2", "bias", "bf16"])
def model(request):
    if request.param == "bias":
        return request.getfixturevalue("biased")
    if request.param == "bf16":
        return tiny_model("llama", torch.bfloat16)
    return tiny_model(request.param)


@pytest.mark.parametrize("reading", ["raw", "normed"])
def test_a_reading_is_the_eager_one(model, reading):
    ids = torch.arange(90).tolist()
    items = [Response(tuple(ids[:5]), tuple(ids[20:36])), Response(tuple(ids[40:43]), (3, 1, 4))]
    anatomy = anatomy_of(model)
    unembedding = anatomy.unembedding
    (piece,) = pieces(anatomy, items, [0, 1], 512)
    states, ticks, found, tops = piece.states, [], {}, {}
    head = policy_head(states.final, unembedding, piece.tokens)
    for body in (EAGER, FUSED):
        top = TopTokens(3)
        top.kept = torch.tensor([1, 4, 17])
        rest = (
            unembedding,
            head,
            piece.tokens,
            body,
            lambda name=body.name: ticks.append(name),
            top,
        )
        if reading == "raw":
            found[body.name] = raw_reading(states, *rest)
        else:
            found[body.name] = normed_reading(states, anatomy.norm, *rest)
        tops[body.name] = top
    assert ticks == ["eager", "triton"]  # the vocabulary is one tile

    vocab, additions = unembedding.vocab_size, 2 * states.num_layers
    sites = [states.embedding, states.final, *states.attn_in, *states.ffn_in, *states.stream_out]
    sites += [*states.attn_out, *states.ffn_out]
    if reading == "normed":
        with torch.no_grad():
            sites = [states.final, *(anatomy.norm(site) for site in sites)]
    stacked = torch.cat(sites).detach()
    of_logits = logit_error(stacked, unembedding, additions)
    size = logits_of(stacked, unembedding).abs().max().item()
    entropy = 2 * entropy_bound(vocab, of_logits)  # both bodies round
    fit = 2 * (4 * of_logits + roundings(vocab) * U * (1 + 2 * size + 2 * math.log(vocab)))
    assert found["triton"].keys() == found["eager"].keys()
    for name, expected in found["eager"].items():
        short = name.removeprefix("normed_")
        atol = {"agree_layer": 0, "nll_layer": fit, "kl_layer": fit}.get(
            short, entropy if short.startswith("entropy") else 2 * entropy
        )
        torch.testing.assert_close(
            found["triton"][name], expected, atol=atol, rtol=0, check_dtype=False, msg=name
        )
    assert torch.equal(tops["triton"].ids, tops["eager"].ids)
    assert torch.equal(tops["triton"].ranks, tops["eager"].ranks)
    torch.testing.assert_close(
        tops["triton"].probs, tops["eager"].probs, atol=fit, rtol=0, check_dtype=False
    )


def test_tiles_of_a_larger_vocabulary_come_together(monkeypatch):
    monkeypatch.setattr(fused_reading, "HELD_PROBS", 1)  # a tile is VOCAB_TILE
    vocab, positions = 2 * VOCAB_TILE + 3, 5
    unembedding = Unembedding(exact(0, vocab, 36), exact(5, vocab))
    plain, added = exact(1, 2, positions, 36), exact(2, 2, positions, 36)
    start = exact(3, positions, 36)
    sites = Sites(start, (plain,), (added,), start + added.cumsum(0), True)
    final, tokens = exact(4, positions, 36), torch.tensor([0, 2047, 2048, 4096, 4098])
    head = policy_head(final, unembedding, tokens)
    ticks, found, tops = [], [], []
    for body in (EAGER, FUSED):
        top = TopTokens(3)
        top.kept = torch.tensor([0, 4])
        tick = functools.partial(ticks.append, body.name)
        found.append(read_policies(sites, final, unembedding, head, tokens, body, tick, top))
        tops.append(top)
    assert ticks == ["eager"] * 3 + ["triton"] * 3
    eager, ours = ([*it.plain, *it.added, *it[2:]] for it in found)
    size = 36 * 4  # no logit is larger
    atol = 2 * roundings(vocab) * U * (1 + 2 * size)
    torch.testing.assert_close(ours, eager, atol=atol, rtol=0, check_dtype=False)
    assert torch.equal(tops[1].ranks, tops[0].ranks)
    torch.testing.assert_close(tops[1].probs, tops[0].probs, atol=atol, rtol=0, check_dtype=False)


def test_an_analysis_is_the_eager_one(llama, responses):
    options = {"reading": "both", "progress": False}
    plain = entropylens.analyze(llama, responses, kernel="eager", **options)
    ours = entropylens.analyze(llama, responses, kernel="triton", **options)
    assert ours.kernel == "triton"
    for name in quantities_of("both"):
        # As float32 against float64 in test_readings.
        expected = pytest.approx(plain.responses[name].tolist(), abs=1e-3, rel=1e-4)
        assert ours.responses[name].tolist() == expected, name
    assert ours.recommend().layer == plain.recommend().layer


def test_float64_is_read_by_the_torch_path(responses):
    model = tiny_model("llama", torch.float64)
    plain = entropylens.analyze(model, responses[:1], kernel="eager", progress=False)
    ours = entropylens.analyze(model, responses[:1], kernel="triton", progress=False)
    assert ours.layers.equals(plain.layers)
    assert ours.kernel == "eager"


# Which body runs


def test_a_gpu_takes_triton_and_says_when_it_cannot(monkeypatch, caplog):
    cuda = torch.device("cuda")
    monkeypatch.setattr(compiled, "available", lambda device: "")
    assert compiled.select_body("auto", cuda, 0.0).name == "triton"
    assert compiled.select_body("eager", cuda, 0.0).name == "eager"
    monkeypatch.setattr(compiled, "available", lambda device: "No module named 'triton'")
    with caplog.at_level(logging.WARNING):
        assert compiled.select_body("auto", cuda, math.inf).name == "eager"
    assert "No module named 'triton'" in caplog.text


def test_a_cpu_has_only_the_interpreter(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(compiled, "available", available.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert compiled.select_body("triton", CPU, 0.0).name == "eager"
    assert "TRITON_INTERPRET=1" in caplog.text


def test_other_devices_and_broken_compilers_are_told(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no ptxas\nat all")

    assert "mps" in available(torch.device("mps"))
    monkeypatch.setattr(fused, "reduce_rows", broken)
    assert available.__wrapped__(CPU) == "no ptxas"
