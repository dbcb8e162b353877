import json

import pandas as pd
import pytest
from tiny import tiny_tokenizer

from entropylens.errors import DatasetError, SettingError
from entropylens.prompts import load_prompts
from entropylens.responses import Limits
from entropylens.templates import TEMPLATES

LIMITS = Limits(97, 5000)


def test_the_bundled_prompts_have_answers():
    prompts = load_prompts("bundled", tiny_tokenizer(), LIMITS)
    assert len(prompts) == 24
    assert len({prompt.ids for prompt in prompts}) == 24
    assert all(prompt.answer for prompt in prompts)
    assert {prompt.task for prompt in prompts} == {"bundled"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "json"])
def test_local_files(tmp_path, kind):
    path = tmp_path / f"sums.{kind}"
    frame = pd.DataFrame({"question": ["1+1", "2+2", "3+3"], "answer": [2, 4, 6]})
    if kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        writer = getattr(frame, f"to_{kind}")
        writer(path, index=False) if kind != "json" else writer(path)
    tokenizer = tiny_tokenizer()
    found = load_prompts(str(path), tokenizer, LIMITS, num_prompts=2)
    assert [prompt.answer for prompt in found] == ["2", "4"]
    assert found[0].task == "sums"
    text = tokenizer.decode(found[0].ids)
    assert text.endswith("u:1+1\na:")
    assert "\\boxed{}" in text


def test_messages_are_taken_as_they_are(tmp_path):
    path = tmp_path / "set.parquet"
    messages = [{"role": "user", "content": "1+1"}]
    pd.DataFrame(
        {
            "question": ["raw"],
            "answer": ["1+1\n= 2"],
            "prompt": [messages],
            "reward_model": [{"ground_truth": "2"}],
        }
    ).to_parquet(path)
    (prompt,) = load_prompts(str(path), tiny_tokenizer(), LIMITS)
    assert tiny_tokenizer().decode(prompt.ids) == "u:1+1\na:"
    assert prompt.answer == "2"


@pytest.mark.parametrize(
    ("column", "values", "answers"),
    [
        ("answer", [3.0, None], ["3", None]),
        ("answer", ["6*200=1200\n#### 1,200", " "], ["1200", None]),
        ("solution", ["It is \\boxed{\\frac{3}{2}}.", "6"], ["\\frac{3}{2}", "6"]),
        ("score", [1, 2], [None, None]),
    ],
)
def test_gold_answers(tmp_path, column, values, answers):
    path = tmp_path / "set.jsonl"
    lines = [json.dumps({"problem": "1+1", column: value}) for value in values]
    path.write_text("\n".join(lines))
    found = load_prompts(str(path), tiny_tokenizer(), LIMITS)
    assert [prompt.answer for prompt in found] == answers


def test_templates_of_the_paper(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"problem": "1+{1}"}))
    tokenizer = tiny_tokenizer()
    for name, text in TEMPLATES.items():
        (prompt,) = load_prompts(str(path), tokenizer, LIMITS, template=name)
        if text is not None:
            assert tokenizer.decode(prompt.ids) == text.replace("{problem}", "1+{1}")
    tokenizer.chat_template = None
    (prompt,) = load_prompts(str(path), tokenizer, LIMITS)
    assert tokenizer.decode(prompt.ids).endswith("1+{1}\nAssistant:")


def test_thinking_reaches_the_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    texts = {
        thinking: tokenizer.decode(
            load_prompts("bundled", tokenizer, LIMITS, num_prompts=1, thinking=thinking)[0].ids
        )
        for thinking in (None, True, False)
    }
    assert texts[True].endswith("a:True")
    assert texts[False].endswith("a:False")
    assert texts[None].endswith("a:")


def test_what_cannot_be_used_is_refused(tmp_path):
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("text,label\na,1\n")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"problem": "a"}\n{"prob')
    number = tmp_path / "number.jsonl"
    number.write_text('{"problem": 7}')
    listed = tmp_path / "listed.jsonl"
    listed.write_text('{"problem": "a", "answer": 1}\n{"problem": "b", "answer": [1, 2]}')
    for name, says in [
        ("nowhere", "no dataset 'nowhere': name a .parquet"),
        (str(wrong), "text, label"),
        (str(broken), "cannot be read"),
        (str(torn), "cannot be read"),
        (str(number), "row 1: the problem is no text"),
        (str(listed), "row 2: the answer is no text or number but list"),
    ]:
        with pytest.raises(DatasetError, match=says):
            load_prompts(name, tiny_tokenizer(), LIMITS)
    with pytest.raises(DatasetError, match="context has 10"):
        load_prompts("bundled", tiny_tokenizer(), Limits(97, 10))
    for options in ({"template": "none"}, {"num_prompts": 0}):
        with pytest.raises(SettingError):
            load_prompts("bundled", tiny_tokenizer(), LIMITS, **options)
    with pytest.raises(SettingError, match="without a tokenizer"):
        load_prompts("bundled", None, LIMITS)
