import bupo.cpu  # isort: skip  (veRL settles on a platform when it is first asked)

import asyncio

import numpy as np
import pytest
import torch
from bupo.cpu.rollout import GenerateServer, Request, answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import VOCAB, tiny_model, tiny_tokenizer

assert bupo.cpu
COUNT = 8
#: Many, so that random answers end.
ENDS = (1, 5, 9, 14, 22, 37, 41, 58, 60, 77)


def ending(model):
    model.generation_config.eos_token_id = list(ENDS)
    return model


@pytest.fixture(scope="module")
def model():
    return ending(tiny_model("llama"))


@pytest.fixture(scope="module")
def exact():
    """The same in float64."""
    return tiny_model("llama", torch.float64)


def a_request(number, temperature=1.0):
    """Prompts of 1 to 12 tokens; two requests in three share one with another."""
    generator = torch.Generator().manual_seed(number // 3)
    length = int(torch.randint(1, 13, (), generator=generator))
    prompt = torch.randint(3, 96, (length,), generator=generator).tolist()
    return Request(tuple(prompt), (7, 1, number // 3, number % 3), temperature)


REQUESTS = [a_request(number, (1.0, 0.6, 1.7, 0.0)[number % 4]) for number in range(18)]


@torch.no_grad()
def by_hand(exact, request):
    """One token after another: the whole sequence anew, no cache, no padding."""
    numbers = np.random.default_rng([*request.key, *request.prompt_ids]).random(COUNT)
    ids, log_probs = list(request.prompt_ids), []
    for number in numbers:
        logits = exact(torch.tensor([ids]), use_cache=False).logits[0, -1]
        scaled = (logits / (request.temperature or 1.0)).numpy()
        likely = scaled - np.logaddexp.reduce(scaled)
        if request.temperature == 0:
            token = int(np.argmax(scaled))
        else:
            token = int((np.exp(likely).cumsum() <= number).sum())
        ids.append(token)
        log_probs.append(likely[token])
        if token in ENDS:
            break
    return ids[len(request.prompt_ids) :], log_probs


@pytest.fixture(scope="module")
def expected(exact):
    return {request.key: by_hand(exact, request) for request in REQUESTS}


def assert_answers(found, requests, expected):
    for (ids, log_probs), request in zip(found, requests, strict=True):
        wanted, wanted_log_probs = expected[request.key]
        assert ids == wanted
        np.testing.assert_allclose(log_probs, wanted_log_probs, atol=1e-5)


def test_the_requests_are_of_all_kinds(expected):
    lengths = {len(request.prompt_ids) for request in REQUESTS}
    assert min(lengths) < 4
    assert max(lengths) > 9
    answered = [ids for ids, _ in expected.values()]
    ended = [ids for ids in answered if ids[-1] in ENDS]
    assert 4 < len(ended) < len(answered)
    assert len({len(ids) for ids in answered}) > 3


def test_tokens_and_log_probs_are_those_of_a_plain_computation(model, expected):
    assert_answers(answer(model, REQUESTS, COUNT), REQUESTS, expected)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=7))
def test_neither_company_nor_order_changes_an_answer(model, expected, chosen):
    assert_answers(answer(model, chosen, COUNT), chosen, expected)


def test_an_answer_stops_with_its_first_end_token_and_no_later(model):
    found = answer(model, [a_request(number) for number in range(40)], COUNT)
    for ids, log_probs in found:
        assert len(ids) == len(log_probs) <= COUNT
        assert not set(ids[:-1]) & set(ENDS)
        assert ids[-1] in ENDS or len(ids) == COUNT
    lengths = [len(ids) for ids, _ in found]
    assert COUNT in lengths
    assert min(lengths) < 4


def test_without_end_tokens_an_answer_is_as_long_as_it_may_be():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    found = answer(model, [a_request(number) for number in range(30)], COUNT)
    assert all(len(ids) == COUNT for ids, _ in found)
    assert any(set(ids) & set(ENDS) for ids, _ in found)


def test_any_part_of_the_key_makes_another_answer(model):
    prompt = (17, 4, 30)
    keys = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4), (3, 2, 1, 0)]
    found = answer(model, [Request(prompt, key, 1.0) for key in keys], COUNT)
    assert len({tuple(ids) for ids, _ in found}) == len(keys)
    again = answer(model, [Request(prompt, key, 1.0) for key in keys], COUNT)
    assert [ids for ids, _ in again] == [ids for ids, _ in found]


def test_at_temperature_0_the_key_is_nothing(model, exact):
    requests = [Request((17, 4, 30), (0, step, 0, 0), 0.0) for step in range(5)]
    wanted, log_probs = by_hand(exact, requests[0])
    for ids, found in answer(model, requests, COUNT):
        assert ids == wanted
        np.testing.assert_allclose(found, log_probs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_token_is_as_frequent_as_the_softmax_says(model, exact, temperature):
    prompt, count = (17, 4, 30, 8), 4000
    requests = [Request(prompt, (3, 1, n, 0), temperature) for n in range(count)]
    drawn = [ids[0] for ids, _ in answer(model, requests, 1)]
    with torch.no_grad():
        logits = exact(torch.tensor([prompt])).logits[0, -1]
    wanted = count * (logits / temperature).softmax(-1).numpy()
    seen = np.bincount(drawn, minlength=VOCAB)
    often = wanted >= 5  # the others together
    assert often.sum() > 20
    groups = [np.append(it[often], it[~often].sum()) for it in (seen, wanted)]
    assert chisquare(*groups).pvalue > 1e-3
    assert chisquare(groups[0], np.full(len(groups[0]), count / len(groups[0]))).pvalue < 1e-6


def test_nothing_of_the_models_own_taste_changes_an_answer(expected):
    """A directory's generation_config.json may ask for penalties, or for less than all tokens."""
    model = ending(tiny_model("llama"))
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=2, repetition_penalty=3.0, no_repeat_ngram_size=1
    )
    assert_answers(answer(model, REQUESTS, COUNT), REQUESTS, expected)


# The server.


@pytest.fixture
def server(tmp_path, exact):
    exact.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return GenerateServer({"path": str(tmp_path), "trust_remote_code": False}, COUNT)


async def ask(server, requests):
    return await asyncio.gather(
        *(
            server.generate(
                str(number),
                list(request.prompt_ids),
                {"key": list(request.key), "temperature": request.temperature, "top_p": 1.0},
            )
            for number, request in enumerate(requests)
        )
    )


def test_the_server_answers_with_the_weights_that_it_was_sent(server, model, expected):
    ending(server.model)
    asyncio.run(server.load_weights(model.state_dict(), 5))
    found = asyncio.run(ask(server, REQUESTS))
    assert_answers([(it.token_ids, it.log_probs) for it in found], REQUESTS, expected)
    assert all(it.extra_fields["global_steps"] == 5 for it in found)


def test_the_server_batches_what_arrives_together(server, model, expected, monkeypatch):
    sizes = []

    def counted(model, requests, count):
        sizes.append(len(requests))
        return answer(model, requests, count)

    monkeypatch.setattr("bupo.cpu.rollout.answer", counted)
    monkeypatch.setattr("bupo.cpu.rollout._BATCH", 7)
    ending(server.model)

    async def talk():
        await server.load_weights(model.state_dict(), 1)
        return await ask(server, REQUESTS)

    found = asyncio.run(talk())
    assert sizes == [7, 7, 4]
    assert_answers([(it.token_ids, it.log_probs) for it in found], REQUESTS, expected)


def test_a_failing_batch_fails_its_requests_alone(server, model, expected, monkeypatch):
    def fail(*_):
        raise MemoryError("too long")

    ending(server.model)

    async def talk():
        await server.load_weights(model.state_dict(), 1)
        with monkeypatch.context() as patch:
            patch.setattr("bupo.cpu.rollout.answer", fail)
            with pytest.raises(MemoryError, match="too long"):
                await ask(server, REQUESTS[:2])
        return await ask(server, REQUESTS)

    found = asyncio.run(talk())
    assert_answers([(it.token_ids, it.log_probs) for it in found], REQUESTS, expected)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_refused(server, model, change):
    weights = dict(model.state_dict())
    if change == "missing":
        del weights["lm_head.weight"]  # not tied: nothing else would fill it
    else:
        weights["lm_head.bias"] = torch.zeros(VOCAB)
    with pytest.raises(ValueError, match=rf"{change} \['lm_head"):
        asyncio.run(server.load_weights(weights, 1))


def test_a_tied_lm_head_need_not_be_sent(tmp_path):
    tiny_model("qwen3-tied").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    server = GenerateServer({"path": str(tmp_path), "trust_remote_code": False}, COUNT)
    other = tiny_model("qwen3-tied", seed=4)
    weights = dict(other.state_dict())
    del weights["lm_head.weight"]
    asyncio.run(server.load_weights(weights, 1))
    assert torch.equal(server.model.lm_head.weight, other.lm_head.weight)
