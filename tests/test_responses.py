import json
import sys

import pytest
from tiny import tiny_tokenizer

from entropylens.errors import ResponsesError
from entropylens.responses import Limits, Response, read_responses

LIMITS = Limits(vocab_size=97, context=20)
GOOD = {"prompt_ids": [1, 2], "response_ids": [3]}


@pytest.fixture
def write(tmp_path):
    def write(*lines, raw=None):
        path = tmp_path / "responses.jsonl"
        if raw is not None:
            path.write_bytes(raw)
        else:
            path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


def test_ids_and_text_are_read(write):
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "1+1"}]
    path = write(
        GOOD,
        "",
        {"prompt": "ab", "response": "c", "truncated": True, "task": "mine"},
        {"prompt": messages, "response": "2"},
    )
    found = read_responses(path, tokenizer, LIMITS).items
    assert found[0] == Response((1, 2), (3,), False, "responses")
    assert found[1] == Response(
        tuple(tokenizer.encode("ab")), tuple(tokenizer.encode("c")), True, "mine"
    )
    assert tokenizer.decode(found[2].prompt_ids) == "u:1+1\na:"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[" * 10_000, "not JSON"),
        ("[1, 2]", "a JSON object is needed"),
        ({}, "it needs prompt_ids and response_ids"),
        ({"prompt_ids": [1]}, "it needs prompt_ids and response_ids"),
        ({"prompt_ids": [1], "response_ids": []}, "the response is empty"),
        ({"prompt_ids": [], "response_ids": [1]}, "the prompt is empty"),
        ({"prompt_ids": [1], "response_ids": [97]}, "response id 97 is outside the vocabulary"),
        ({"prompt_ids": [-1], "response_ids": [1]}, "prompt id -1 is outside the vocabulary"),
        ({"prompt_ids": [10**30], "response_ids": [1]}, "outside the vocabulary"),
        ({"prompt_ids": [1.5], "response_ids": [1]}, "prompt_ids[0] is 1.5"),
        ({"prompt_ids": [True], "response_ids": [1]}, "prompt_ids[0] is True"),
        ({"prompt_ids": ["1"], "response_ids": [1]}, "prompt_ids[0] is '1'"),
        ({"prompt_ids": "12", "response_ids": [1]}, "no list of token ids"),
        ({"prompt_ids": [1] * 21, "response_ids": [1]}, "context has 20"),
        ({"prompt_ids": [1], "response_ids": [1], "truncated": "no"}, "truncated must be"),
        ({"prompt": "a", "response": 3}, "response is no string"),
        ({"prompt": 3, "response": "a"}, "neither a string nor messages"),
        ({"prompt": [{"role": "user"}], "response": "a"}, "neither a string nor messages"),
        ({"prompt": "", "response": "a"}, "the prompt is empty"),
        ({"prompt": "a", "response": ""}, "the response is empty"),
        ('{"prompt": "a", "response": "\\ud83d"}', "cannot be tokenized"),
    ],
)
def test_a_bad_line_is_named(write, line, says):
    path = write(*[GOOD] * 6, line)
    with pytest.raises(ResponsesError) as caught:
        read_responses(path, tiny_tokenizer(), LIMITS)
    assert f"{path}, line 7: " in str(caught.value)
    assert says in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    found = read_responses(path, tiny_tokenizer(), LIMITS, skip_bad=True)
    assert (len(found.items), found.skipped) == (6, 1)


def test_the_last_position_needs_no_room(write):
    path = write({"prompt_ids": [1] * 20, "response_ids": [1]})
    assert read_responses(path, None, LIMITS).items[0].length == 20


def test_text_without_a_tokenizer_or_template(write):
    with pytest.raises(ResponsesError, match="without a tokenizer"):
        read_responses(write({"prompt": "a", "response": "b"}), None, LIMITS)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    line = {"prompt": [{"role": "user", "content": "a"}], "response": "b"}
    with pytest.raises(ResponsesError, match="no chat template"):
        read_responses(write(line), tokenizer, LIMITS)
    tokenizer.chat_template = "{{ raise_exception('only the system may speak') }}"
    with pytest.raises(ResponsesError, match="only the system may speak"):
        read_responses(write(line), tokenizer, LIMITS)


def test_files_that_are_no_responses(write, tmp_path):
    for raw, says in [
        (b"", "holds no response"),
        (b"\n\n", "holds no response"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is not text"),
    ]:
        with pytest.raises(ResponsesError, match=says):
            read_responses(write(raw=raw), None, LIMITS)
    with pytest.raises(ResponsesError, match="does not exist"):
        read_responses(tmp_path / "nothing.jsonl", None, LIMITS)
    with pytest.raises(ResponsesError, match="all 2 lines are bad"):
        read_responses(write("x", "y"), None, LIMITS, skip_bad=True)


def test_keys_follow_the_content():
    first, second = Response((1, 2), (3,)), Response((1,), (2, 3))
    assert first.key != second.key
    assert first.key == Response((1, 2), (3,), True, "other").key
    assert first.prompt_key == Response((1, 2), (9, 9)).prompt_key
    assert sys.getsizeof(first.key) < 200
