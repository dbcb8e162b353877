import json

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from tiny import tiny_model

from entropylens.errors import (
    AllocationError,
    ModelAccessError,
    ModelNotFoundError,
    WeightsError,
)
from entropylens.sources import hf
from entropylens.sources.subject import model_fingerprint


@pytest.mark.parametrize(
    ("cause", "outer", "expected", "says"),
    [
        (
            GatedRepoError,
            "You are trying to access a gated repo.",
            ModelAccessError,
            "hf auth login",
        ),
        (
            RepositoryNotFoundError,
            "not a valid model",
            ModelNotFoundError,
            "nor a model on the Hub",
        ),
        (RevisionNotFoundError, "not a valid git id", ModelNotFoundError, "no such revision"),
        (
            ConnectionError,
            "We couldn't connect to the Hub",
            ModelNotFoundError,
            "cannot be reached",
        ),
        (ValueError, "odd config", WeightsError, "odd config"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory", AllocationError, "bfloat16"),
    ],
)
def test_what_the_hub_says_becomes_a_remedy(cause, outer, expected, says, monkeypatch):
    def fail(*_args):
        try:
            raise cause.__new__(cause)
        except cause as error:
            raise OSError(outer) from error

    monkeypatch.setattr(hf, "load_config", fail)
    with pytest.raises(expected, match=says) as caught:
        hf.load("org/model")
    assert "'org/model'" in caught.value.line


@pytest.mark.parametrize("name", ["./x", "/x/y", "~/x", "a/b/c", "model.gguf", ""])
def test_a_path_never_goes_to_the_network(name, monkeypatch):
    monkeypatch.setattr(hf, "load_config", lambda *_args: pytest.fail("asked the Hub"))
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        hf.load(name)


def test_a_directory_is_loaded_as_it_was_saved(model_directory):
    subject = hf.load(model_directory)
    assert subject.dtype == "float32"
    assert subject.tokenizer.encode("ab")
    assert subject.fingerprint == hf.load(model_directory).fingerprint
    assert hf.load(model_directory, dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_directory_without_a_tokenizer_can_read_ids(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    assert hf.load(tmp_path).tokenizer is None


def test_a_checkpoint_of_the_decoder_with_tied_weights_is_whole(tmp_path):
    """As openai-community/gpt2 ships: no lm_head, no prefix."""
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight = hf.load(tmp_path).anatomy.unembedding.weight
    assert torch.equal(weight, model.lm_head.weight)


def test_shards_are_checked_one_by_one(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    hf.load(tmp_path)
    shards[1].unlink()
    with pytest.raises(WeightsError, match=shards[1].name):
        hf.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_is_the_models_alone(dtype):
    """Not the number of threads that add its weights up; and it sees a change of one weight."""
    model = tiny_model("llama", dtype)
    with torch.no_grad():  # large enough that torch divides the sum among threads
        model.lm_head.weight = torch.nn.Parameter(torch.randn(4096, 64).to(dtype))
    threads = torch.get_num_threads()
    found = set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.add(model_fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    with torch.no_grad():
        model.lm_head.weight[4095, 1] += 1
    assert model_fingerprint(model) not in found
