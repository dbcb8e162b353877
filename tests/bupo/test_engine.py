import dataclasses
import math
from functools import cache

import pytest
import torch
from bupo.cpu.engines import CPUEngine
from bupo.engine import OTHER_ENTROPY, OTHER_LOG_PROBS
from bupo.orders import Order
from engines import (
    LAYER,
    batch_of,
    build,
    gradients,
    group,
    infer,
    internal,
    is_inner,
    loss_of,
    plain_model,
    plain_policy,
    samples,
    save_model,
    update,
    weights,
)

#: Untied and tied.
FAMILIES = ("llama", "qwen3-tied")
#: Ways to cut six samples into micro-batches.
CUTS = (
    {"micro_batch_size_per_gpu": 6},
    {"micro_batch_size_per_gpu": 2},
    {"micro_batch_size_per_gpu": 1},
    {"use_dynamic_bsz": True, "max_token_len_per_gpu": 30},
)
PADDING = [False, True]  # use_remove_padding
CLOSE = {"atol": 1e-5, "rtol": 0, "check_dtype": False}


@pytest.fixture(autouse=True, scope="module")
def one_rank():
    with group():
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory of a family's tiny model."""
    return cache(lambda family: save_model(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def reading(directory):
    """An engine for whoever only reads: nothing in it changes."""
    return cache(lambda family, **model: build(directory(family), **model))


@pytest.fixture(scope="module")
def policies(directory):
    """The plain policies of samples(), layer None being pi_theta."""

    @cache
    def found(family, layer, temperature):
        model = plain_model(directory(family))
        with torch.no_grad():
            return [plain_policy(model, item, layer, temperature) for item in samples()]

    return found


def assert_same_policy(found, expected, log_probs="log_probs", entropy="entropy"):
    for row, entropies, policy in zip(found[log_probs], found[entropy], expected, strict=True):
        torch.testing.assert_close(row, policy.log_probs, **CLOSE)
        torch.testing.assert_close(entropies, policy.entropy, **CLOSE)


def differ(before, after):
    """Names of the weights that differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# What the engine reads.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("packed", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_old_log_probs_are_those_of_pi_l(reading, policies, family, packed, temperature):
    engine = reading(family, use_remove_padding=packed)
    expected = policies(family, LAYER, temperature)
    for place, cut in enumerate(CUTS):
        order = internal(skip_upper_layers=bool(place % 2))
        asked = {"use_remove_padding": packed, "temperature": temperature} | cut
        assert_same_policy(infer(engine, batch_of(samples(), order, **asked)), expected)
    theta = policies(family, None, temperature)
    gap = max(float((a - b).abs().max()) for (a, _), (b, _) in zip(theta, expected, strict=True))
    assert gap > 0.1  # else the test would not tell the two policies apart


@pytest.mark.parametrize("order", [None, Order(), Order(layer=LAYER)])
@pytest.mark.parametrize("packed", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_internal_order_they_are_those_of_pi_theta(
    reading, policies, family, packed, order
):
    engine = reading(family, use_remove_padding=packed)
    for cut in CUTS[::3]:
        data = batch_of(samples(), order, use_remove_padding=packed, temperature=0.7, **cut)
        found = infer(engine, data)
        assert_same_policy(found, policies(family, None, 0.7))
        assert OTHER_LOG_PROBS not in found


def with_a_hole(items):
    """Two tokens of a response that no policy produced, as a tool's answer would be."""
    items[3] = dataclasses.replace(items[3], mask=[1] * 6 + [0] * 2 + [1] * 8)
    return items


@pytest.mark.parametrize("stride", [1, 2, 7, 1000])
@pytest.mark.parametrize("is_internal", [False, True])
@pytest.mark.parametrize("packed", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_policy_is_read_at_every_stride_th_response_position(
    reading, policies, family, packed, is_internal, stride
):
    items = with_a_hole(samples())
    order = Order(layer=LAYER, internal=is_internal, stride=stride)
    asked = {"use_remove_padding": packed, "temperature": 0.7}
    found = infer(reading(family, use_remove_padding=packed), batch_of(items, order, **asked))
    own, other = (LAYER, None) if is_internal else (None, LAYER)
    assert_same_policy(found, policies(family, own, 0.7))
    kept = torch.cat([torch.tensor(item.response_mask) for item in items]).bool()
    for name, which in ((OTHER_LOG_PROBS, "log_probs"), (OTHER_ENTROPY, "entropy")):
        row = torch.cat(found[name])
        expected = torch.cat([getattr(it, which) for it in policies(family, other, 0.7)])
        watched = row.isfinite()
        torch.testing.assert_close(row[watched], expected[watched], **CLOSE)
        assert row[~watched].isnan().all()
        assert not watched[~kept].any()
        places = watched[kept].nonzero()[:, 0]
        count = int(kept.sum())
        assert count // stride <= len(places) <= math.ceil(count / stride)
        assert (places.diff() == stride).all()


@pytest.mark.parametrize("is_internal", [False, True])
@pytest.mark.parametrize("packed", PADDING)
def test_no_micro_batch_mistakes_the_watched_positions(reading, policies, packed, is_internal):
    engine = reading("llama", use_remove_padding=packed)
    other = policies("llama", None if is_internal else LAYER, 1.0)
    for cut in CUTS[1::2]:
        for stride in (1, 3):
            order = Order(layer=LAYER, internal=is_internal, stride=stride)
            found = infer(engine, batch_of(samples(), order, use_remove_padding=packed, **cut))
            if stride == 1:
                assert_same_policy(found, other, OTHER_LOG_PROBS, OTHER_ENTROPY)
            row = torch.cat(found[OTHER_LOG_PROBS])
            expected = torch.cat([it.log_probs for it in other])
            watched = row.isfinite()
            assert 0 < watched.sum() <= len(row) / stride + 3  # each micro-batch rounds
            torch.testing.assert_close(row[watched], expected[watched], **CLOSE)


def test_outside_the_response_nothing_is_watched(reading):
    items = samples()
    data = batch_of(items, Order(layer=LAYER, stride=1))
    engine = reading("llama", use_remove_padding=False)
    with engine.eval_mode():
        rows = engine.infer_batch(data)["model_output"][OTHER_LOG_PROBS].unbind()
    for row, item in zip(rows, items, strict=True):
        expected = [False] * (len(item.prompt) - 1) + [True] * len(item.response) + [False]
        assert row.isfinite().tolist() == expected


# What an update changes (Eq. 16).


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("packed", PADDING)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_internal_update_changes_layers_up_to_l_and_both_embeddings(
    directory, family, checkpointing, packed, skipping
):
    engine = build(
        directory(family), use_remove_padding=packed, enable_gradient_checkpointing=checkpointing
    )
    start = weights(engine)
    asked = {"use_remove_padding": packed}
    for _ in range(2):  # moments of the first must not move what the second leaves alone
        update(engine, batch_of(samples(), internal(skip_upper_layers=skipping), **asked))
    inner = weights(engine)
    assert differ(start, inner) == {name for name in start if is_inner(name)}
    assert "model.norm.weight" in start
    update(engine, batch_of(samples(), Order(layer=LAYER), **asked))
    assert differ(inner, weights(engine)) == set(start)


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_lora_only_adapters_up_to_l_change(directory, family, checkpointing, skipping):
    engine = build(directory(family), lora_rank=4, enable_gradient_checkpointing=checkpointing)
    start = weights(engine)
    adapters = {name for name in start if "lora_" in name}
    update(engine, batch_of(samples(), internal(skip_upper_layers=skipping)))
    inner = weights(engine)
    assert differ(start, inner) == {name for name in adapters if is_inner(name)}
    update(engine, batch_of(samples()))
    assert differ(inner, weights(engine)) == adapters


@pytest.mark.parametrize(
    ("family", "checkpointing", "packed"),
    [
        ("llama", False, True),
        ("llama", True, False),
        ("qwen3-tied", False, False),
        ("qwen3-tied", True, True),
    ],
)
def test_skipping_the_upper_layers_gives_the_same_gradients(
    directory, family, checkpointing, packed
):
    model = {"use_remove_padding": packed, "enable_gradient_checkpointing": checkpointing}
    asked = {"use_remove_padding": packed, "micro_batch_size_per_gpu": 3}
    found = []
    for skipping in (False, True):
        engine = build(directory(family), **model)
        ran = []
        engine.module.model.layers[LAYER].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        data = batch_of(samples(), internal(skip_upper_layers=skipping), **asked)
        loss, grads = gradients(engine, data)
        update(engine, data)
        assert bool(ran) is not skipping
        found.append((loss, grads, weights(engine)))
    (loss, plain, after), (same_loss, skipped, same_after) = found
    assert loss == pytest.approx(same_loss, rel=1e-6)
    assert (
        plain.keys()
        == skipped.keys()
        == {name for name in after if is_inner(name)}
        - ({"lm_head.weight"} if family == "qwen3-tied" else set())
    )
    for name, grad in plain.items():
        torch.testing.assert_close(skipped[name], grad, atol=1e-6, rtol=1e-5)
    for name, weight in after.items():
        torch.testing.assert_close(same_after[name], weight, atol=1e-6, rtol=0)


# What is minimized (Eq. 10, and Eq. 4 for pi_theta).

#: Ratios of new to old probability: inside the clip's range, beyond it, and beyond a dual clip's.
RATIOS = (1.0, 0.5, 4.0, 1.1, 0.9, 6.5, 1.6, 0.3, 3.5)


def with_ratios(items, policy):
    """The items, their old log-probabilities being such that RATIOS come out."""
    found, count = [], 0
    for item, (log_probs, _) in zip(items, policy, strict=True):
        ratios = [RATIOS[(count + place) % len(RATIOS)] for place in range(len(item.response))]
        old = log_probs.float() - torch.tensor(ratios).log()
        found.append(dataclasses.replace(item, old_log_probs=old.tolist()))
        count += len(ratios)
    return found


def objective(model, items, layer, temperature, epsilon=0.2):
    """Minus the objective: a mean over tokens, then over responses."""
    means = []
    for item in items:
        new = plain_policy(model, item, layer, temperature).log_probs
        ratio = (new - torch.tensor(item.old_log_probs, dtype=torch.float64)).exp()
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        means.append(torch.minimum(ratio * item.advantage, clipped * item.advantage).mean())
    return -torch.stack(means).mean()


@pytest.mark.parametrize("layer", [LAYER, None])
@pytest.mark.parametrize("packed", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_the_equation(
    directory, reading, policies, family, packed, layer
):
    temperature = 0.7
    items = with_ratios(samples(), policies(family, layer, temperature))
    model = plain_model(directory(family))
    wanted = objective(model, items, layer, temperature)
    wanted.backward()
    expected = wanted.item()
    engine = reading(family, use_remove_padding=packed)
    order = Order(layer=LAYER) if layer is None else internal(skip_upper_layers=True)
    asked = {"use_remove_padding": packed, "temperature": temperature}
    for cut in CUTS:
        loss, found = gradients(engine, batch_of(items, order, **asked | cut))
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, parameter in model.named_parameters():
            if layer is not None and not is_inner(name):
                assert name not in found
                assert parameter.grad is None or not parameter.grad.any()
                continue
            error = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-4, name
    data = batch_of(items, order, **asked)
    for other in ({"clip_ratio_c": 3.0}, {"loss_agg_mode": "token-mean"}):
        assert gradients(engine, data, **other)[0] != pytest.approx(expected, rel=0.01)


# What may be asked for besides.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_unembedding_keeps_every_bit(directory, family):
    engine = build(directory(family))
    start = weights(engine)
    update(engine, batch_of(samples(), internal(freeze_unembedding=True)))
    frozen = weights(engine)
    held = {"lm_head.weight"} | ({"model.embed_tokens.weight"} if "tied" in family else set())
    assert differ(start, frozen) == {name for name in start if is_inner(name)} - held
    # Nor is it frozen for good.
    update(engine, batch_of(samples()))
    assert differ(frozen, weights(engine)) == set(start)


def test_a_frozen_unembedding_leaves_the_other_gradients_alone(directory):
    found = []
    for freezing in (False, True):
        engine = build(directory("llama"))
        _, grads = gradients(engine, batch_of(samples(), internal(freeze_unembedding=freezing)))
        found.append(grads)
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_optimizer_is_as_good_as_new(directory, tmp_path, family):
    engine, kept = build(directory(family)), build(directory(family))
    for one in (engine, kept):
        for seed in (1, 2):
            update(one, batch_of(samples(seed), internal()))
    at_switch = weights(engine)
    assert not differ(at_switch, weights(kept))
    fresh = build(save_model(tmp_path, family, weights=at_switch))
    assert not differ(at_switch, weights(fresh))
    engine.reset_optimizer()
    for one in (engine, fresh, kept):
        update(one, batch_of(samples(3)))
    assert not differ(weights(engine), weights(fresh))
    assert differ(weights(kept), weights(fresh))


# Nothing leaks.


def everything(engine, **values):
    """What an engine reads, and what it becomes by an update, without an order."""
    read = infer(engine, batch_of(samples(), **values))
    output = update(engine, batch_of(samples(1), **values))
    return read, loss_of(output), output["metrics"]["grad_norm"], weights(engine)


def assert_identical(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, rows in expected[0].items():
        assert all(torch.equal(a, b) for a, b in zip(found[0][name], rows, strict=True))
    assert found[1:3] == expected[1:3]
    assert not differ(found[3], expected[3])


@pytest.mark.parametrize("packed", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_order_it_is_verls_engine_bit_for_bit(directory, family, packed):
    ours = build(directory(family), use_remove_padding=packed)
    verls = build(directory(family), CPUEngine, use_remove_padding=packed)
    for cut in ({}, {"micro_batch_size_per_gpu": 2}):
        asked = {"use_remove_padding": packed} | cut
        assert_identical(everything(ours, **asked), everything(verls, **asked))


def test_internal_passes_leave_no_trace(directory):
    used, untouched = build(directory("llama")), build(directory("llama"), CPUEngine)
    for order in (internal(stride=2), internal(skip_upper_layers=True), Order(LAYER, stride=1)):
        infer(used, batch_of(samples(), order))
    gradients(used, batch_of(samples(), internal(skip_upper_layers=True)))
    assert_identical(everything(used), everything(untouched))


@pytest.mark.parametrize(
    "order", [internal(skip_upper_layers=True), internal(stride=2), internal()]
)
def test_a_failing_pass_leaves_no_trace_either(directory, order):
    used, untouched = build(directory("llama")), build(directory("llama"), CPUEngine)

    def fail(**_):
        raise FloatingPointError("in the loss")

    with pytest.raises(FloatingPointError, match="in the loss"), used.eval_mode():
        used.infer_batch(batch_of(samples(), order), loss_function=fail)
    with pytest.raises(FloatingPointError, match="in the loss"), used.train_mode():
        used.train_batch(batch_of(samples(), order), loss_function=fail)
    assert used.module.config.num_hidden_layers == 4
    assert_identical(everything(used), everything(untouched))


def test_an_order_is_taken_back_even_after_a_failure():
    extra_info = {"temperature": 1.0}
    order = internal(stride=3, freeze_unembedding=True)

    def interrupted():
        with order.given_with(extra_info):
            assert Order.read(extra_info) == order
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert extra_info == {"temperature": 1.0}
    assert Order.read(extra_info) == Order()


# Weights for whoever looks at them.


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_weights_are_those_of_the_policy_that_is_trained(directory, family, lora_rank):
    engine = build(directory(family), lora_rank=lora_rank)
    model = plain_model(directory(family))
    start = {name: weight.float() for name, weight in model.state_dict().items()}
    found = {name: weight.clone() for name, weight in engine.whole_weights()}
    assert found.keys() == start.keys()
    assert not differ(found, start)
    for _ in range(3):
        update(engine, batch_of(samples()))
    before = weights(engine)
    model.load_state_dict({name: weight.clone() for name, weight in engine.whole_weights()})
    assert not differ(before, weights(engine))  # adapters are apart again
    with torch.no_grad():
        expected = [plain_policy(model, item) for item in samples()]
        moved = [plain_policy(plain_model(directory(family)), item) for item in samples()]
    assert_same_policy(infer(engine, batch_of(samples())), expected)
    with pytest.raises(AssertionError):
        assert_same_policy(infer(engine, batch_of(samples())), moved)
