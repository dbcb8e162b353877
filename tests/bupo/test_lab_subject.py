import dataclasses
import json

import pytest
import torch
from bupo.lab.subject import Lesson, accuracy, make_model, start, teach
from bupo.lab.task import Sum, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropylens.errors import SettingError
from entropylens.sources import open_model

QUICK = Lesson(
    seed=1, layers=2, width=32, enough=0.0, bounds=(0.0, 1.0), batch=32, look_every=4, look_at=8
)


def test_the_same_lesson_teaches_the_same(tmp_path):
    model, looks = teach(QUICK, progress=False)
    again = AutoModelForCausalLM.from_pretrained(start(QUICK, tmp_path, progress=False))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)
    assert json.loads((tmp_path / "lesson.json").read_text())["looks"] == looks


def test_a_start_is_made_once_and_no_other_is_taken_for_it(tmp_path):
    start(QUICK, tmp_path, progress=False)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert start(QUICK, tmp_path) == tmp_path
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(SettingError, match="made otherwise"):
        start(dataclasses.replace(QUICK, seed=2), tmp_path)


def test_demonstrations_are_learned():
    lesson = dataclasses.replace(QUICK, enough=2.0, bounds=(0.0, 2.0), most_steps=80)
    _, looks = teach(lesson, progress=False)
    assert looks[-1]["step"] == 80
    assert looks[-1]["loss"] < 0.6 * looks[0]["loss"]


def test_teaching_that_gets_nowhere_says_so():
    lesson = dataclasses.replace(QUICK, enough=0.9, bounds=(0.9, 1.0), most_steps=4)
    with pytest.raises(SettingError, match="after 4 steps 0% of the answers are right"):
        teach(lesson, progress=False)


def test_a_start_opens_as_any_model(tmp_path):
    subject = open_model(str(start(QUICK, tmp_path, progress=False)), None)
    assert subject.anatomy.num_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("7+12=")["input_ids"] == make_tokenizer()("7+12=")["input_ids"]


def test_accuracy_counts_right_answers():
    """A model that has learned one problem by heart, and knows no other."""
    model, tokenizer = make_model(QUICK), make_tokenizer()
    known, unknown = Sum((7, 12, 5)), Sum((9, 9, 9))
    ids = tokenizer(known.prompt + known.demonstration + tokenizer.eos_token)["input_ids"]
    ids = torch.tensor([ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    alone = accuracy(model, tokenizer, [known], samples=32, seed=0)
    assert alone > 0.8
    assert accuracy(model, tokenizer, [known, unknown], samples=32, seed=0) == alone / 2
