import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from entropylens import files
from entropylens.errors import DatasetError, OutputDirectoryError, SettingError
from entropylens.preparation import TRAINING_TEMPLATES, prepare
from entropylens.prompts import load_prompts
from entropylens.responses import Limits, encode_prompt
from entropylens.templates import TEMPLATES

SUMS = [{"problem": f"{a}+{b}", "answer": a + b} for a in range(6) for b in range(6)]


@pytest.fixture
def write(tmp_path):
    def write(records=SUMS, name="sums.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(record) for record in records))
        return path

    return write


def rows(path):
    return pd.read_parquet(path).to_dict("records")


def indices(path):
    return [row["extra_info"]["index"] for row in rows(path)]


def test_a_row_is_what_verl_reads(write, tmp_path):
    done = prepare(write(), tmp_path / "new" / "out.parquet")
    row = rows(done.path)[1]
    system, user = row["prompt"]
    assert row["data_source"] == "sums"
    assert row["ability"] == "math"
    assert row["reward_model"] == {"style": "rule", "ground_truth": "1"}
    assert row["extra_info"] == {"split": "train", "index": 1}
    assert system["role"] == "system"
    assert system["content"].endswith("final answer within \\boxed{}.")
    assert user == {"role": "user", "content": "0+1"}
    assert (done.kept, done.read, done.val_path) == (36, 36, None)
    assert "length not checked" in done.summary


def test_each_dropped_row_counts_once(write, tmp_path):
    path = write(
        [
            {"problem": "no answer yet", "answer": None},
            {"problem": "1 +  1", "answer": "2"},
            {"problem": " 1 +\n1", "answer": "two"},
            {"problem": "no answer yet", "answer": "x"},
            {"problem": "9" * 200, "answer": "9"},
            {"problem": "2 + 2", "answer": "4"},
        ]
    )
    tokenizer = tiny_tokenizer()
    done = prepare(path, tmp_path / "out.parquet", tokenizer=tokenizer, max_prompt_tokens=200)
    assert (done.without_answer, done.duplicates, done.too_long) == (1, 1, 1)
    assert (done.read, done.kept, done.not_drawn) == (6, 3, 0)
    assert indices(done.path) == [1, 3, 5]
    assert done.summary == (
        f"{path}: of 6 rows 3 in {done.path}; "
        "duplicates 1, without answer 1, over 200 tokens 1, not drawn 0"
    )


@pytest.mark.parametrize("template", TRAINING_TEMPLATES)
def test_the_limit_is_met_to_the_token(write, tmp_path, template):
    tokenizer = tiny_tokenizer()
    (prompt,) = load_prompts(
        str(write(SUMS[:1])), tokenizer, Limits(97, None), template=template, thinking=None
    )
    # load_prompts leaves a plain prompt bare; veRL renders it with the chat template.
    count = len(prompt.ids) + (len("u:\na:") if template == "plain" else 0)
    common = {"tokenizer": tokenizer, "template": template}
    prepare(write(), tmp_path / "out.parquet", **common, max_prompt_tokens=count)
    with pytest.raises(DatasetError, match=r"0 usable rows of 36 .*too long 36"):
        prepare(write(), tmp_path / "no.parquet", **common, max_prompt_tokens=count - 1)


def test_thinking_counts(write, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is false %}{{ 'x' * 500 }}{% endif %}"
    common = {"tokenizer": tokenizer, "max_prompt_tokens": 400}
    prepare(write(), tmp_path / "out.parquet", **common, thinking=True)
    with pytest.raises(DatasetError, match="0 usable"):
        prepare(write(), tmp_path / "no.parquet", **common, thinking=False)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(size=st.none() | st.integers(1, 50), val_size=st.integers(0, 35), seed=st.integers(0, 2**40))
def test_draws_are_disjoint_ordered_and_reproducible(write, tmp_path, size, val_size, seed):
    path = write()
    first, again, alone = (
        prepare(path, tmp_path / f"{name}.parquet", size=size, val_size=held, seed=seed, force=True)
        for name, held in (("first", val_size), ("again", val_size), ("alone", 0))
    )
    assert first.path.read_bytes() == again.path.read_bytes()
    training = indices(first.path)
    assert first.kept == len(training) == min(size or 36, 36 - val_size)
    assert training == sorted(set(training))
    if val_size:
        held_out = indices(first.val_path)
        assert first.val_path.read_bytes() == again.val_path.read_bytes()
        assert len(held_out) == val_size
        assert not set(held_out) & set(training)
        assert {row["extra_info"]["split"] for row in rows(first.val_path)} == {"val"}
    if size is not None and size <= 36 - val_size:  # a hold-out leaves the training rows alone
        assert training == indices(alone.path)


def test_another_seed_draws_other_rows(write, tmp_path):
    drawn = {
        tuple(indices(prepare(write(), tmp_path / f"{seed}.parquet", size=9, seed=seed).path))
        for seed in range(5)
    }
    assert len(drawn) == 5


def test_deepmath_is_5000_of_the_usable_rows(monkeypatch, tmp_path):
    import datasets

    numbers = [0, 0, *range(6000)]
    answers = ["", *map(str, numbers[1:])]
    table = datasets.Dataset.from_dict(
        {"question": list(map(str, numbers)), "final_answer": answers, "difficulty": numbers}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    done = prepare("deepmath", tmp_path / "out.parquet")
    assert (done.read, done.without_answer, done.duplicates, done.kept) == (6002, 1, 1, 5000)
    assert done.source == "zwhe99/DeepMath-103K"
    assert done.not_drawn == 1000
    assert {row["data_source"] for row in rows(done.path)} == {"deepmath"}


def test_plain_has_no_system_message(write, tmp_path):
    done = prepare(
        write([{"problem": "1+{1}", "answer": "2"}]), tmp_path / "o.parquet", template="plain"
    )
    assert list(rows(done.path)[0]["prompt"]) == [{"role": "user", "content": "1+{1}"}]


def test_a_base_models_prompt_is_as_long_as_the_papers_text(write, tmp_path):
    bare = tiny_tokenizer()
    bare.chat_template = None
    text = TEMPLATES["octothinker"].replace("{problem}", "0+0")
    count = len(encode_prompt(text, bare))
    prepare(write(SUMS[:1]), tmp_path / "o.parquet", tokenizer=bare, max_prompt_tokens=count)
    with pytest.raises(DatasetError, match="too long 1"):
        prepare(
            write(SUMS[:1]), tmp_path / "p.parquet", tokenizer=bare, max_prompt_tokens=count - 1
        )


def test_finished_messages_stay_under_chat_alone(write, tmp_path):
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    path = write([{"prompt": own, "reward_model": {"ground_truth": "2"}}])
    done = prepare(path, tmp_path / "out.parquet", tokenizer=tiny_tokenizer())
    assert list(rows(done.path)[0]["prompt"]) == own
    with pytest.raises(DatasetError, match="row 1: its prompt is finished chat messages"):
        prepare(path, tmp_path / "plain.parquet", template="plain")


def test_a_prepared_file_can_be_prepared_again(tmp_path):
    first = prepare("reasoning_gym:chain_sum", tmp_path / "first.parquet", size=5)
    again = prepare(first.path, tmp_path / "again.parquet")
    assert first.path.read_bytes() == again.path.read_bytes()
    done = prepare(first.path, tmp_path / "base.parquet", template="plain")
    assert [it["role"] for it in rows(done.path)[0]["prompt"]] == ["user"]


def test_generated_rows_score_with_their_own_answers(tmp_path):
    import reasoning_gym

    done = prepare("reasoning_gym:gcd", tmp_path / "gcd.parquet", size=20, val_size=5)
    found = rows(done.path) + rows(done.val_path)
    assert done.read == 25
    assert len({row["extra_info"]["index"] for row in found}) == len(found)
    for row in found:
        assert row["data_source"] == "reasoning_gym/gcd"
        score = reasoning_gym.get_score_answer_fn(row["extra_info"]["task"])
        entry = json.loads(row["extra_info"]["entry"])
        assert score(row["reward_model"]["ground_truth"], entry) == 1.0
        assert row["prompt"][1]["content"] == entry["question"]


def test_verl_reads_the_files_and_renders_the_same_prompts(write, tmp_path, monkeypatch):
    import datasets
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    limit = {"tokenizer": tokenizer, "max_prompt_tokens": 300}
    done = [
        prepare(write(), tmp_path / "a.parquet", **limit),
        prepare("reasoning_gym:gcd", tmp_path / "b.parquet", **limit, size=6),
    ]
    config = {"filter_overlong_prompts_workers": 1, "max_prompt_length": 300}
    found = RLHFDataset([str(one.path) for one in done], tokenizer, OmegaConf.create(config))
    assert len(found) == sum(one.kept for one in done)
    prompts = load_prompts(str(done[0].path), tokenizer, Limits(97, None))
    for place in range(len(found)):
        row = found[place]
        # As veRL's agent loop renders it.
        rendered = tokenizer.apply_chat_template(
            row["raw_prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert tuple(rendered) == encode_prompt(row["raw_prompt"], tokenizer)
        if place < len(prompts):
            assert tuple(rendered) == prompts[place].ids
    assert Counter(found[place]["data_source"] for place in range(len(found))) == {
        "sums": 36,
        "reasoning_gym/gcd": done[1].kept,
    }
    assert found[40]["index"] == found[40]["extra_info"]["index"] == 4
    assert found[40]["extra_info"]["task"] == "gcd"


def test_output_is_kept_unless_forced(write, tmp_path, monkeypatch):
    path, output = write(), tmp_path / "out.parquet"
    prepare(path, output, size=3)
    before = output.read_bytes()
    with pytest.raises(OutputDirectoryError, match=r"out.parquet' exists: .*--force"):
        prepare(path, output)
    (tmp_path / "next-val.parquet").touch()
    with pytest.raises(OutputDirectoryError, match=r"next-val.parquet' exists"):
        prepare(path, tmp_path / "next.parquet", val_size=1)
    assert not (tmp_path / "next.parquet").exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OutputDirectoryError, match="No space left"):
            prepare(path, output, force=True)
    assert output.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    prepare(path, output, force=True)
    assert len(rows(output)) == 36


def test_settings_are_checked(write, tmp_path):
    path, output = write(), tmp_path / "out.parquet"
    for options, says in [
        ({"template": "none"}, "no template 'none'.*chat, plain"),
        ({"template": "qwen-math"}, "choose chat"),
        ({"size": 0}, "size is 0: give at least 1"),
        ({"val_size": -1}, "val_size is -1: give at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"task_options": {"a": 1}}, "for generated problems"),
    ]:
        with pytest.raises(SettingError, match=says):
            prepare(path, output, **options)
    with pytest.raises(OutputDirectoryError, match=r"no .parquet file"):
        prepare(path, tmp_path / "out.json")
    with pytest.raises(DatasetError, match=r"36 usable rows of 36 .*hold out fewer than 36"):
        prepare(path, output, val_size=36)
    refusing = tiny_tokenizer()
    refusing.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DatasetError, match="row 1: the chat template refuses"):
        prepare(path, output, tokenizer=refusing)
    assert not output.exists()


def test_golds_that_no_answer_could_meet_are_dropped(write, tmp_path):
    golds = ["1", r"\$", r"\frac{1}{2}"]
    path = write([{"problem": f"p{place}", "answer": gold} for place, gold in enumerate(golds)])
    done = prepare(path, tmp_path / "train.parquet")
    assert (done.kept, done.without_answer) == (2, 1)
    kept = [row["reward_model"]["ground_truth"] for row in rows(done.path)]
    assert kept == ["1", r"\frac{1}{2}"]
