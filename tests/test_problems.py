import json
from types import SimpleNamespace

import pandas as pd
import pytest

from entropylens.errors import DatasetError, SettingError
from entropylens.problems import Problem, Source, load_problems
from entropylens.templates import INSTRUCTION


@pytest.fixture
def write(tmp_path):
    def write(*records, name="set.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(record) for record in records))
        return str(path)

    return write


@pytest.fixture
def hub(monkeypatch):
    """The Hub, with one dataset of these columns; `asked` is what was asked for."""
    import datasets
    import huggingface_hub

    asked = []

    def dataset_info(_, name, revision):
        return SimpleNamespace(sha=f"commit of {name}@{revision}")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)

    def stock(**columns):
        def load_dataset(*names, **options):
            asked.append((*names, options))
            return datasets.Dataset.from_dict(columns)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return stock


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"problem": "p", "answer": "a", "solution": "b"}, "a"),
        ({"question": "p", "final_answer": 27.0}, "27"),
        ({"prompt": "p", "answer": 0.5}, "0.5"),
        (
            {"problem": "p", "solution": "half of \\boxed{3}: \\boxed{\\frac{3}{2}}."},
            "\\frac{3}{2}",
        ),
        ({"problem": "p", "solution": "no box"}, "no box"),
        ({"problem": "p", "solution": "#### Step 1\nIt is \\boxed{5}."}, "5"),
        ({"problem": "p", "solution": "1+4\n#### 5"}, "5"),
        ({"problem": "p", "reward_model": {"ground_truth": 4}}, "4"),
        ({"prompt": "p", "answer": "raw", "reward_model": {"ground_truth": "4"}}, "4"),
        ({"problem": "p", "answer": None}, None),
        ({"problem": "p", "answer": "  "}, None),
    ],
)
def test_columns_of_a_file(write, record, answer):
    (found,) = load_problems(write(record)).items
    assert found == Problem(0, "p", answer)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
def test_a_file_is_read_as_it_was_written(tmp_path, kind):
    path = tmp_path / f"set.{kind}"
    answers = ["12345678901234567890123", "007", "27.0", "1e3", "0.30000000000000004"]
    frame = pd.DataFrame(
        {"problem": ["123", "007", "1.50", "1e3", "2020-01-01"], "answer": answers}
    )
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    found = load_problems(str(path)).items
    assert [one.content for one in found] == frame["problem"].tolist()
    assert [one.answer for one in found] == answers


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
def test_numbers_of_json_keep_their_digits(tmp_path, name):
    path = tmp_path / name
    numbers = [0.8414, 0.1 + 0.2, 123456.789]
    records = [json.dumps({"problem": "p", "answer": number}) for number in numbers]
    text = "\n".join(records) if name.endswith("l") else f"[{','.join(records)}]"
    path.write_text(text)
    assert [one.answer for one in load_problems(str(path)).items] == list(map(str, numbers))


def test_the_authors_two_messages_are_text_again_and_others_stay(write):
    paper = {"role": "system", "content": INSTRUCTION}
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    path = write(
        *(
            {"question": "raw", "prompt": messages, "reward_model": {"ground_truth": "2"}}
            for messages in ([paper, own[1]], own, own[1:])
        )
    )
    found = load_problems(path).items
    assert [one.content for one in found] == ["1+1", own, own[1:]]
    assert found[1].key == "Be brief. 1+1"


def test_the_hub_is_asked_for_names_and_only_needed_columns_are_read(hub):
    asked = hub(question=["1+1"], final_answer=["2"], r1_solution_1=["long"])
    found = load_problems("deepmath", source=Source(revision="abc"))
    commit = "commit of zwhe99/DeepMath-103K@abc"
    assert asked == [("zwhe99/DeepMath-103K", None, {"split": "train", "revision": commit})]
    assert (found.name, found.source) == ("deepmath", "zwhe99/DeepMath-103K")
    assert found.revision == commit
    assert found.items == (Problem(0, "1+1", "2"),)
    assert load_problems("some-one/set.v2").name == "some-one/set.v2"
    assert asked[-1][2]["split"] == "train"
    commit = "0123456789" * 4
    load_problems("some-one/set.v2", purpose="test", source=Source(revision=commit))
    assert asked[-1][2] == {"split": "test", "revision": commit}  # a commit is taken as it is
    load_problems("gsm8k", purpose="test", source=Source(split="train[:9]"))
    assert asked[-1][2]["split"] == "train[:9]"


@pytest.mark.parametrize(("name", "purpose"), [("aime24", "train"), ("deepmath", "test")])
def test_nobody_trains_on_a_benchmark(name, purpose, hub):
    asked = hub(question=["1+1"], answer=["2"])
    with pytest.raises(DatasetError, match="only"):
        load_problems(name, purpose=purpose)
    assert not asked


def test_columns_by_name(write):
    path = write({"Frage": "1+1", "Antwort": 2, "problem": "x", "answer": "y"})
    (found,) = load_problems(path, source=Source("Frage", "Antwort")).items
    assert found == Problem(0, "1+1", "2")
    with pytest.raises(DatasetError, match=r"no column 'Fragen': its columns: Frage, Antwort"):
        load_problems(path, source=Source("Fragen"))


def test_integers_that_were_kept_as_floats(write):
    path = write(*({"problem": "p", "answer": it} for it in ("27.0", "-3.0")))
    assert [one.answer for one in load_problems(path).items] == ["27", "-3"]
    path = write(*({"problem": "p", "answer": it} for it in ("27.0", "2.50")))
    assert [one.answer for one in load_problems(path).items] == ["27.0", "2.50"]


def test_gsm8k(hub, tmp_path):
    columns = {
        "question": ["a", "b", "c"],
        "answer": ["6*200=1200\n#### 1,200", "no mark", "6*200=1200\n####"],
    }
    asked = hub(**columns)
    downloaded = tmp_path / "train.parquet"
    pd.DataFrame(columns).to_parquet(downloaded)
    for name in ("gsm8k", "openai/gsm8k", str(downloaded)):
        answers = [one.answer for one in load_problems(name).items]
        assert answers == ["1200", "no mark", None]
    assert {names[:2] for names in asked} == {("openai/gsm8k", "main")}


@pytest.mark.parametrize("name", ["owner/set.parquet", "./owner/set", "~/set.json", "set", "a/b/c"])
def test_no_network_for_paths(name, hub):
    asked = hub(question=["1+1"], answer=["2"])
    with pytest.raises(DatasetError, match=r"here|no dataset"):
        load_problems(name)
    assert not asked


def test_an_unreachable_hub_is_named(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DatasetError, match=r"'openai/gsm8k' cannot be had.*reach.*name the .parq"
    ) as (caught):
        load_problems("gsm8k")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(
        "entropylens.problems.import_module", lambda _: __import__("no_such_library")
    )
    with pytest.raises(DatasetError, match="pip install datasets"):
        load_problems("gsm8k")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"problem": None, "answer": "2"}, "row 2: the problem is no text but"),
        ({"problem": " ", "answer": "2"}, "row 2: the problem is empty"),
        (
            {"problem": [{"role": "user", "content": "\ud83d"}], "answer": "2"},
            "row 2: .*surrogates",
        ),
        ({"problem": "p", "answer": [1, 2]}, "row 2: the answer is no text or number but list"),
        ({"problem": [{"role": "user"}], "answer": "2"}, "row 2: a message"),
        ({"problem": [], "answer": "2"}, "row 2: the problem is no text"),
    ],
)
def test_a_bad_row_is_named(write, record, says):
    with pytest.raises(DatasetError, match=says):
        load_problems(write({"problem": "p", "answer": "2"}, record))


def test_a_file_without_answers_is_refused(write):
    with pytest.raises(DatasetError, match="its columns: problem, score"):
        load_problems(write({"problem": "p", "score": 1}))


def test_generated_problems_score_with_their_own_answers():
    import reasoning_gym

    options = {"min_digits": 1, "max_digits": 2}
    found = load_problems("reasoning_gym:chain_sum", size=9, seed=4, task_options=options)
    expected = reasoning_gym.create_dataset("chain_sum", size=9, seed=4, **options)
    assert [one.content for one in found.items] == [it["question"] for it in expected]
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    assert all(score(one.answer, json.loads(one.entry)) == 1.0 for one in found.items)
    assert [one.index for one in found.items] == list(range(9))


def test_answers_that_can_never_score_are_none():
    for task in ("rearc", "graph_color"):  # tuples that JSON does not keep; no answer at all
        found = load_problems(f"reasoning_gym:{task}", size=2).items
        assert [one.answer for one in found] == [None, None]


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("reasoning_gym:chain_sums", {}, DatasetError, "no task 'chain_sums'.*chain_sum"),
        ("reasoning_gym:chain_sum", {"digits": 3}, SettingError, "no option digits.*min_digits"),
        ("reasoning_gym:chain_sum", {"seed": 3}, SettingError, "no option seed"),
        ("reasoning_gym:chain_sum", {"min_digits": 0}, SettingError, "must be positive"),
        ("reasoning_gym:chain_sum", {"min_digits": "x"}, SettingError, "'min_digits': 'x'"),
        ("bundled", {"min_digits": 1}, SettingError, "not for 'bundled'"),
    ],
)
def test_tasks_and_options_are_checked(name, options, error, says):
    with pytest.raises(error, match=says):
        load_problems(name, size=2, task_options=options)
