import re

import pytest
from bupo.lab.task import MAX_ANSWER_TOKENS, Sum, draw_sums, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from entropylens.answers import last_boxed, strict_match

numbers = st.integers(1, 20)


@given(numbers, numbers, numbers)
def test_a_demonstration_is_right_at_every_step_and_fits(first, second, third):
    one = Sum((first, second, third))
    steps, tokenizer = one.demonstration.split(";"), make_tokenizer()
    for step in steps[:2]:
        left, right = step.split("=")
        assert sum(map(int, left.split("+"))) == int(right)
    assert last_boxed(one.demonstration) == one.gold == str(first + second + third)
    ids = tokenizer(one.demonstration)["input_ids"]
    assert len(ids) + 1 <= MAX_ANSWER_TOKENS
    assert tokenizer.decode(ids) == one.demonstration
    assert tokenizer.pad_token_id not in ids


def test_a_wrong_sum_earns_nothing():
    assert not strict_match(Sum((1, 2, 3)).demonstration, Sum((1, 2, 4)).gold)


def test_what_is_tested_was_never_trained_on():
    pairs = {}
    for split in ("train", "development", "test"):
        drawn = draw_sums(split, 3000, 1)
        pairs[split] = {frozenset(it.numbers[:2]) for it in drawn}
        assert any(it.numbers[0] > it.numbers[1] for it in drawn)
    assert not pairs["train"] & (pairs["development"] | pairs["test"])
    assert not pairs["development"] & pairs["test"]
    assert len(set().union(*pairs.values())) == 210
    second = {frozenset((sum(it.numbers[:2]), it.numbers[2])) for it in draw_sums("train", 3000, 1)}
    assert not second & (pairs["development"] | pairs["test"])
    assert second & pairs["train"]
    assert len(pairs["test"]) == 42


def test_a_seed_draws_the_same_and_another_does_not():
    assert draw_sums("train", 9, 3) == draw_sums("train", 9, 3)
    assert draw_sums("train", 9, 3) != draw_sums("train", 9, 4)


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_a_prompt_is_rendered_as_it_is(generation_prompt):
    tokenizer = make_tokenizer()
    message = [{"role": "user", "content": Sum((7, 12, 5)).prompt}]
    text = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=generation_prompt
    )
    assert re.fullmatch(r"7\+12\+5=", text)
