"""Checkpoints written by real FSDP2 over gloo, as veRL's checkpoint manager does."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tiny import FAMILIES, VOCAB, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from entropylens.errors import NotADecoderError, WeightsError
from entropylens.sources import hf, verl, verl_shards

#: Case -> (world size, mesh, tied embeddings, sharded dimension); VOCAB and 47 are odd.
CASES = {
    "one": (1, (1,), False, 0),
    "one-tied": (1, (1,), True, 0),
    "two": (2, (2,), False, 0),
    "two-tied": (2, (2,), True, 0),
    "second-dimension": (2, (2,), False, 1),
    "hybrid": (2, (2, 1), False, 0),
}


def a_model(tied):
    torch.manual_seed(5)
    config = tiny_config("llama", 2)
    config.intermediate_size, config.tie_word_embeddings = 47, tied
    model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = ["LlamaForCausalLM"]
    return model


def save(case, rank, root):
    """What FSDPCheckpointManager.save_checkpoint does, with huggingface/ on rank 0."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    world, shape, tied, dim = CASES[case]
    model = a_model(tied)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ddp", "fsdp")[-len(shape) :])

    def placement(parameter):
        return Shard(dim if parameter.ndim > dim and parameter.shape[dim] % 2 == 0 else 0)

    parts = list(model.model.layers) + ([] if tied else [model.model.embed_tokens, model.lm_head])
    for part in [*parts, model]:
        fully_shard(part, mesh=mesh, shard_placement_fn=placement)
    actor = Path(root) / case / "actor"
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), actor / f"model_world_size_{world}_rank_{rank}.pt")
    if case == "two":
        single = distribute_tensor(torch.tensor([[3.0, 4.0]]), mesh, [Shard(0)])
        whole = distribute_tensor(torch.arange(3.0), mesh, [Replicate()])
        partial = DTensor.from_local(torch.arange(3.0), mesh, [Partial()])
        odd = {"single": single, "whole": whole, "partial": partial}
        torch.save(odd, actor / f"odd_{rank}.pt")
    torch.save({"step": 1}, actor / f"optim_world_size_{world}_rank_{rank}.pt")
    torch.save({"rng": 1}, actor / f"extra_state_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        model.config.save_pretrained(actor / "huggingface")
        tiny_tokenizer().save_pretrained(actor / "huggingface")
        (actor / "fsdp_config.json").write_text(
            json.dumps({"FSDP_version": 2, "world_size": world})
        )


def train(rank, root):
    """One rank of two; then rank 0 again, alone."""
    torch.set_num_threads(1)
    for world in (2, 1):
        if rank < world:
            store = torch.distributed.FileStore(f"{root}/store-{world}", world)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
            for case in CASES:
                if CASES[case][0] == world:
                    save(case, rank, root)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Every case of CASES, written once."""
    root = tmp_path_factory.mktemp("verl")
    mp.spawn(train, (str(root),), nprocs=2)
    return root


@pytest.fixture
def actor(written, tmp_path):
    """A copy of a case to spoil."""
    return lambda case="two", step=5: copy(written, case, tmp_path / f"global_step_{step}")


def copy(written, case, step):
    shutil.copytree(written / case, step)
    return step / "actor"


def rewrite(actor, rank, change):
    """Change one shard as a dict of its tensors."""
    file = next(actor.glob(f"model_*_rank_{rank}.pt"))
    content = dict(torch.load(file, weights_only=True))
    change(content)
    torch.save(content, file)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_comes_back_bit_for_bit(case, written):
    world, _, tied, dim = CASES[case]
    model, tokenizer = verl.load(written / case / "actor")
    saved = a_model(tied)
    parts = torch.load(
        written / case / "actor" / f"model_world_size_{world}_rank_0.pt", weights_only=True
    )
    up = parts["model.layers.0.mlp.up_proj.weight"]
    assert up.placements[-1].dim == dim
    expected = saved.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training
    assert tokenizer.encode("ab") == tiny_tokenizer().encode("ab")
    ids = torch.arange(20)[None]
    with torch.no_grad():  # buffers that no checkpoint holds, such as rotary frequencies, too
        assert torch.equal(model(ids).logits, saved.eval()(ids).logits)


def test_uneven_parts_hold_no_padding(written):
    files = sorted((written / "two" / "actor").glob("model_*.pt"))
    rows = [
        torch.load(file, weights_only=True)["lm_head.weight"].to_local().shape[0] for file in files
    ]
    assert rows == [VOCAB - VOCAB // 2, VOCAB // 2]


def test_parts_may_be_empty_whole_or_repeated(written):
    actor = written / "two" / "actor"
    odd = [verl_shards.read_shard(actor / f"odd_{rank}.pt") for rank in (0, 1)]
    parts = {name: [shard[name] for shard in odd] for name in odd[0]}
    assert parts["single"][1].to_local().numel() == 0
    assert verl_shards.merge("single", parts["single"], actor).tolist() == [[3.0, 4.0]]
    assert verl_shards.merge("whole", parts["whole"], actor).tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(WeightsError, match="shards partial in a way that is not read"):
        verl_shards.merge("partial", parts["partial"], actor)
    with pytest.raises(WeightsError, match=r"parts of single make up \(0, 2\), not \(1, 2\)"):
        verl_shards.merge("single", parts["single"][1:], actor)
    files = sorted(actor.glob("model_*.pt"))
    twice = [verl_shards.read_shard(file)["lm_head.weight"] for file in files * 2]
    assert torch.equal(
        verl_shards.merge("lm_head", twice, actor), a_model(tied=False).lm_head.weight
    )


def test_a_checkpoint_is_understood_as_a_subject(written):
    model, tokenizer = verl.load(written / "two-tied" / "actor")
    subject = hf.wrap(model, tokenizer)
    assert subject.dtype == "float32"
    assert subject.fingerprint == hf.wrap(a_model(tied=True)).fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_rounded_to_as_transformers_does(dtype, written):
    model, _ = verl.load(written / "two" / "actor", dtype=dtype)
    expected = a_model(tied=False).to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_families_load_as_from_their_safetensors(family, dtype, tmp_path):
    model = tiny_model(family)
    plain, actor = tmp_path / "plain", tmp_path / "actor"
    model.save_pretrained(plain)
    model.config.save_pretrained(actor / "huggingface")
    torch.save(model.state_dict(), actor / "model_world_size_1_rank_0.pt")
    expected = dict(hf.load_unverified(plain, dtype=dtype)[0].state_dict())
    for name, tensor in verl.load(actor, dtype=dtype)[0].state_dict().items():
        assert tensor.dtype == expected[name].dtype  # some routers stay in float32
        assert torch.equal(tensor, expected[name])


def test_the_shards_own_dtype_is_that_of_most_numbers():
    shard = {"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(3), "n": torch.arange(50)}
    assert verl_shards.own_dtype(shard) is torch.bfloat16


def test_end_tokens_come_from_the_generation_config(actor):
    one = actor()
    (one / "huggingface" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert verl.load(one)[0].generation_config.eos_token_id == [1, 7]


def test_a_run_is_a_series_in_the_order_of_its_steps(actor, tmp_path):
    late, early = actor(step=40), actor(step=5)
    (tmp_path / "global_step_1").mkdir()  # veRL removed its actor to make room
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    assert verl.steps(tmp_path) == [(5, early), (40, late)]
    for path in (early, early.parent, early / "huggingface"):
        assert verl.steps(path) == [(5, early)]


def test_a_training_run_is_found_by_its_own_directory(actor, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.move(actor(step=5).parent, checkpoints)
    assert verl.steps(tmp_path / "run") == [(5, checkpoints / "global_step_5" / "actor")]


def test_a_step_is_known_from_inside_its_directory(actor, monkeypatch):
    monkeypatch.chdir(actor(step=12))
    assert verl.steps(Path()) == [(12, Path())]


def test_what_is_no_checkpoint(model_directory, tmp_path):
    for path in (model_directory, tmp_path, tmp_path / "none", model_directory / "config.json"):
        assert verl.steps(path) == []


def test_safetensors_are_taken_where_they_are(actor):
    one = actor()
    tiny_model("qwen3").save_pretrained(one / "huggingface")
    assert verl.steps(one / "huggingface") == []  # a plain directory
    next(one.glob("model_*_rank_1.pt")).unlink()  # and the shards are not needed
    assert verl.steps(one) == [(5, one)]
    model, tokenizer = verl.load(one)
    assert model.config.model_type == "qwen3"
    assert tokenizer.encode("a")


def test_a_missing_shard_is_named(actor, tmp_path):
    next(actor(step=7).glob("model_*_rank_1.pt")).unlink()
    actor(step=5)
    for call in (lambda: verl.steps(tmp_path), lambda: verl.load(tmp_path / "global_step_7/actor")):
        with pytest.raises(WeightsError, match=r"global_step_7.*world_size_2_rank_1\.pt") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_world_size_is_told_by_the_names_where_no_file_tells_it(actor):
    one = actor()
    (one / "fsdp_config.json").unlink()
    verl.load(one)
    (one / "model_world_size_4_rank_0.pt").touch()
    with pytest.raises(WeightsError, match="world sizes 2, 4"):
        verl.steps(one)
    (one / "fsdp_config.json").write_text('{"world_size": "2"}')
    with pytest.raises(WeightsError, match=r"fsdp_config\.json' is corrupt"):
        verl.steps(one)


class Malice:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("force", [None, "1"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(force, actor, tmp_path, monkeypatch):
    if force:  # torch's own switch for the careless
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    one, mark = actor(), tmp_path / "executed"
    file = one / "model_world_size_2_rank_1.pt"
    torch.save({"lm_head.weight": Malice(str(mark))}, file)
    with pytest.raises(WeightsError, match=r"rank_1\.pt.* holds more than tensors .*mkdir"):
        verl.load(one)
    file.write_bytes(pickle.dumps(Malice(str(mark))))
    with pytest.raises(WeightsError, match=r"rank_1\.pt"):
        verl.load(one)
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()  # so it would have been


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_a_truncated_shard_is_named(length, actor):
    one = actor()
    file = one / "model_world_size_2_rank_0.pt"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"rank_0\.pt' is truncated or corrupt"):
        verl.load(one)


def test_more_than_tensors_is_no_state_dict(actor):
    one = actor()
    torch.save([1, 2], one / "model_world_size_2_rank_0.pt")
    with pytest.raises(WeightsError, match="no state dict"):
        verl.load(one)


def replicated(content):
    from torch.distributed.tensor import DTensor

    for name, tensor in content.items():
        whole = dict(a_model(tied=False).state_dict())[name]
        assert isinstance(tensor, DTensor)
        content[name] = whole


def test_tensors_that_are_not_sharded_are_taken_once(actor):
    one = actor()
    for rank in (0, 1):
        rewrite(one, rank, replicated)
    model, _ = verl.load(one)
    expected = a_model(tied=False).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    rewrite(one, 1, lambda content: content["model.norm.weight"].add_(1))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight .* differs between ranks"):
        verl.load(one)


UP = "model.layers.1.mlp.up_proj.weight"


def rename(to):
    def change(content):
        for name in list(content):
            content[to + name] = content.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.pop(UP), f"1 tensors are missing, such as {UP}"),
        (lambda content: content.update(odd=content[UP]), "1 tensors are unknown, such as odd"),
        (lambda content: content.update({UP: content["model.norm.weight"]}), f"{UP} is"),
        (rename("module."), "inside a wrapper.*verl.model_merger"),
        (rename("base_model.model."), "LoRA"),
    ],
)
def test_what_does_not_fit_the_model_is_named(change, says, actor):
    one = actor()
    for rank in (0, 1):
        rewrite(one, rank, change)
    with pytest.raises(WeightsError, match=says):
        verl.load(one)


def test_ranks_that_differ_are_refused(actor):
    one = actor()
    rewrite(one, 1, lambda content: content.pop(UP))
    with pytest.raises(WeightsError, match=f"ranks 0 and 1 differ in {UP}"):
        verl.load(one)
    rewrite(one, 1, lambda content: content.update({UP: torch.zeros(47, 32)}))
    with pytest.raises(WeightsError, match=f"differ in how {UP}"):
        verl.load(one)


def test_a_tie_that_the_shards_do_not_have_is_refused(actor):
    one = actor("two")
    config = one / "huggingface" / "config.json"
    config.write_text(config.read_text().replace('embeddings": false', 'embeddings": true'))
    with pytest.raises(WeightsError, match=r"lm_head\.weight to model\.embed_tokens\.weight, but"):
        verl.load(one)


def test_an_adapter_is_refused_with_the_way_to_merge_it(actor):
    one = actor()
    (one / "lora_train_meta.json").write_text('{"r": 8, "lora_alpha": 16}')
    with pytest.raises(WeightsError, match=r"LoRA.*verl\.model_merger merge.*merge_and_unload"):
        verl.load(one)


def test_a_critic_and_a_missing_configuration_are_refused(actor):
    one = actor()
    config = one / "huggingface" / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForTokenClassification"))
    with pytest.raises(NotADecoderError):
        verl.load(one)
    config.unlink()
    with pytest.raises(WeightsError, match=r"no huggingface/config\.json"):
        verl.load(one)
