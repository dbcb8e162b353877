"""The estimate against counts of its own: built models, peft, saved files, tracked memory."""

import weakref
from pathlib import Path

import pytest
import torch
import verl
from bupo.estimate import DEFAULTS, GIB, Estimate, estimate, free_disk
from bupo.footprint import EXTRA, Engine, measure
from bupo.names import WATCHED
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tiny import FAMILIES, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Qwen3Config
from verl.utils import torch_functional

from entropylens.errors import SettingError

CASES = (*FAMILIES, "llama3-rope", "qwen3-tied", "qwen3_moe", "gemma2", "phi", "deepseek_v3")


def qwen3(**changes):
    sizes = {
        "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4000,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return Qwen3Config(**sizes | changes)


def config(**changes):
    """Dotted names have __ for the dot."""
    made = OmegaConf.create({})
    plain = {
        "trainer__n_gpus_per_node": 2,
        "algorithm__adv_estimator": "grpo",
        "actor_rollout_ref__actor__use_dynamic_bsz": True,
    }
    for name, value in (plain | changes).items():
        OmegaConf.update(made, name.replace("__", "."), value)
    return made


ACTOR = "actor_rollout_ref__actor__"
FSDP = ACTOR + "fsdp_config__"
MODEL = "actor_rollout_ref__model__"
ROLLOUT = "actor_rollout_ref__rollout__"


def engine(hf_config, **changes):
    full = OmegaConf.merge(DEFAULTS, config(**changes)).actor_rollout_ref
    return Engine(measure(hf_config, full.model), full.actor.fsdp_config, gpus=1), full


def test_the_defaults_are_verls():
    path = Path(verl.__file__).parent / "trainer/config/_generated_ppo_trainer.yaml"
    theirs = OmegaConf.load(path)
    ours = {"bupo", "mixed_precision", "save_lora_only", "override_config"}

    def compare(mine, place):
        for name in mine:
            where = f"{place}.{name}" if place else name
            if name in ours:
                assert OmegaConf.select(theirs, where) in (None, {})
            elif OmegaConf.is_dict(mine[name]):
                compare(mine[name], where)
            else:
                assert mine[name] == OmegaConf.select(theirs, where, throw_on_missing=True), where

    compare(DEFAULTS, "")


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_built_model(name):
    built = {it.data_ptr(): it.numel() for it in tiny_model(name).parameters()}
    found = estimate(config(), tiny_config(name))
    assert found.parameters == found.trainable == sum(built.values())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3-tied", "gemma2", "phi", "gpt2"])
def test_the_critic_has_a_value_head_in_place_of_lm_head(name):
    wanted = tiny_config(name)
    wanted.num_labels = 1
    critic = AutoModelForTokenClassification.from_config(wanted)
    found = measure(tiny_config(name), DEFAULTS.critic.model, values=True)
    assert found.total == sum(it.numel() for it in critic.parameters())


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        ("all-linear", None),
        ("all-linear", ["o_proj", "c_attn"]),
        (["q_proj", "down_proj", "c_attn", "lm_head"], None),
        (r".*\.[012]\..*_proj|.*c_proj", ".*o_proj"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_adapters_are_pefts(name, targets, excluded):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=3, target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM")
    expected, everything = get_peft_model(tiny_model(name), lora).get_nb_trainable_parameters()
    settings = {"lora_rank": 3, "target_modules": targets, "exclude_modules": excluded}
    found = estimate(config(**{MODEL + key: it for key, it in settings.items()}), tiny_config(name))
    assert (found.trainable, found.parameters) == (expected, everything - expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_has_the_size_of_the_files(tmp_path, tied, dtype):
    hf_config = qwen3(tie_word_embeddings=tied)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_config(hf_config, dtype=kind)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_pretrained(tmp_path / "hf_model")
    size = {it.parent.name + "/" + it.name: it.stat().st_size for it in tmp_path.rglob("*.*")}
    contents = {
        ("model",): f"{tmp_path.name}/model.pt",
        ("optimizer",): f"{tmp_path.name}/optimizer.pt",
        ("hf_model",): "hf_model/model.safetensors",
    }
    for wanted, file in contents.items():
        changes = {FSDP + "model_dtype": dtype, ACTOR + "checkpoint__save_contents": list(wanted)}
        found = estimate(config(**changes), hf_config).checkpoint
        assert found * GIB == pytest.approx(size[file], rel=0.05)


def test_what_a_checkpoint_holds():
    def size(**changes):
        found = estimate(config(**changes), qwen3())
        return round(found.checkpoint * GIB), found.parameters, found.trainable

    plain, everything, _ = size()
    extra = 2 * EXTRA
    assert plain == 12 * everything + extra
    lm_head, value_head = 0, 65  # tied; weight and bias
    critic = 12 * (everything - lm_head + value_head) + extra
    assert size(algorithm__adv_estimator="gae")[0] == plain + critic
    # Replicas of a hybrid-sharded model write the same shards twice.
    assert size(**{FSDP + "fsdp_size": 1})[0] == 24 * everything + extra
    lora = {MODEL + "lora_rank": 4}
    found, _, adapters = size(**lora)
    assert found == 4 * everything + 12 * adapters + extra
    only = lora | {ACTOR + "checkpoint__save_lora_only": True}
    assert size(**only)[0] == 12 * adapters + extra


class Tracked(TorchDispatchMode):
    """The bytes of live storages, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return made

    def add(self, storage):
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key, size):
        self.known.remove(key)
        self.now -= size


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_a_logit_are_what_verls_functions_hold(
    monkeypatch, dtype, entropy, temperature, update
):
    if dtype == torch.bfloat16:  # CUDA's autocast runs both in float32
        for name in ("softmax", "log_softmax"):
            plain = getattr(torch.nn.functional, name)
            monkeypatch.setattr(
                torch.nn.functional, name, lambda it, dim, plain=plain: plain(it.float(), dim=dim)
            )
    rows, vocab, width = 64, 3000, 4
    entropy = entropy or not update  # always asked for with old_log_probs
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)

    def pass_through():
        plain = hidden @ weight.T
        logits = plain if temperature == 1 else plain / torch.full((rows, 1), 0.7, dtype=dtype)
        spread = torch_functional.entropy_from_logits(logits) if entropy else 0
        return torch_functional.logprobs_from_logits_v2(logits, labels) + spread

    labels = torch.zeros(rows, dtype=torch.long)
    with Tracked() as tracked, torch.set_grad_enabled(update):
        out = pass_through()
        if update:
            out.sum().backward()
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    made, full = engine(
        qwen3(vocab_size=vocab),
        **{
            MODEL + "override_config__attn_implementation": "sdpa",
            FSDP + "mixed_precision": {"param_dtype": name},
            FSDP + "use_torch_compile": False,
            ACTOR + "calculate_entropy": entropy,
            ROLLOUT + "temperature": temperature,
        },
    )
    found = made.logits(full, rows, update=update)
    assert tracked.peak == pytest.approx(found, rel=0.08)


def test_an_update_takes_about_what_is_tracked():
    hf_config = qwen3(hidden_size=128, intermediate_size=384, num_hidden_layers=6, head_dim=32)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids = torch.zeros(1, 512, dtype=torch.long)
    tracked = Tracked()
    for parameter in model.parameters():
        tracked.add(parameter.untyped_storage())
    with tracked:
        for _ in range(2):
            for _ in range(2):
                logits = model(input_ids=ids, use_cache=False).logits[0]
                torch_functional.logprobs_from_logits_v2(logits, ids[0]).sum().backward()
                del logits
            optimizer.step()
            optimizer.zero_grad()
    changes = {
        "trainer__n_gpus_per_node": 1,
        MODEL + "override_config__attn_implementation": "sdpa",
        FSDP + "mixed_precision": {"param_dtype": "fp32"},
        ACTOR + "ppo_max_token_len_per_gpu": 512,
        "data__max_response_length": 0,
    }
    found = estimate(config(**changes), hf_config, gpu_memory=0.0)
    # Without FSDP nothing is gathered.
    parts = [it for name, it in found.parts.items() if name not in ("runtime", "unsharded layers")]
    assert 0.9 < sum(parts) * GIB / tracked.peak < 1.3


def total(found: Estimate):
    return sum(found.parts.values())


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1100, 40_000),
    more=st.integers(1, 40_000),
    name=st.sampled_from(["tokens", "vocabulary"]),
    gpus=st.sampled_from([1, 2, 4, 8]),
    rank=st.sampled_from([0, 4]),
    compiled=st.booleans(),
)
def test_more_tokens_or_vocabulary_need_more_and_more_gpus_less(
    tokens, more, name, gpus, rank, compiled
):
    changes = {
        "trainer__n_gpus_per_node": gpus,
        ACTOR + "ppo_max_token_len_per_gpu": tokens,
        MODEL + "lora_rank": rank,
        FSDP + "use_torch_compile": compiled,
    }
    before = estimate(config(**changes), qwen3(), gpu_memory=0.0)
    wider = changes | (
        {ACTOR + "ppo_max_token_len_per_gpu": tokens + more} if name == "tokens" else {}
    )
    vocabulary = 4000 + (more if name == "vocabulary" else 0)
    after = estimate(config(**wider), qwen3(vocab_size=vocabulary), gpu_memory=0.0)
    assert total(after) > total(before)
    spread = estimate(config(**changes | {"trainer__nnodes": 2}), qwen3(), gpu_memory=0.0)
    assert total(spread) < total(before)
    assert spread.peak < before.peak


def test_offloading_frees_the_rollout_but_not_the_update():
    plain = estimate(config(), qwen3())
    changes = {FSDP + "param_offload": True, FSDP + "optimizer_offload": True}
    offloaded = estimate(config(**changes), qwen3())
    assert "training state" in plain.rollout
    assert "training state" not in offloaded.rollout
    one = {"trainer__n_gpus_per_node": 1, ACTOR + "ppo_max_token_len_per_gpu": 1}
    assert estimate(config(**changes, **one), qwen3(vocab_size=50)).moment == "actor update"
    policy = estimate(config(**{FSDP + "offload_policy": True}), qwen3())
    assert not {"weights", "optimizer"} & set(policy.parts)
    assert "training state" not in policy.rollout


@pytest.mark.parametrize(
    ("changes", "grows"),
    [
        ({MODEL + "enable_gradient_checkpointing": False}, True),
        ({FSDP + "reshard_after_forward": False}, True),
        ({FSDP + "use_no_sync_for_gradient_accumulation": True}, True),
        ({FSDP + "mixed_precision": {"param_dtype": "fp32"}}, True),
        ({FSDP + "fsdp_size": 1}, True),
        ({ACTOR + "calculate_entropy": True}, True),
        ({ACTOR + "entropy_coeff": 0.1, FSDP + "use_torch_compile": False}, True),
        ({ROLLOUT + "temperature": 0.6}, True),
        ({ROLLOUT + "free_cache_engine": False}, True),
        ({"bupo__log_both_policies": True}, True),
        ({"algorithm__adv_estimator": "gae"}, True),
        ({"bupo__layer": 2, "bupo__skip_upper_layers": True}, None),
        ({"critic__enable": False, "algorithm__adv_estimator": "gae"}, None),
        ({MODEL + "use_fused_kernels": True}, False),
        ({MODEL + "lora_rank": 2}, False),
        ({FSDP + "model_dtype": "bf16"}, False),
    ],
)
def test_settings_that_matter(changes, grows):
    # In the update: the pass for old_log_probs is short.
    short = {
        ROLLOUT + "log_prob_max_token_len_per_gpu": 1 if "bupo" not in str(changes) else 16384,
        MODEL + "override_config__attn_implementation": "sdpa",
    }
    before = total(estimate(config(**short), qwen3()))
    after = total(estimate(config(**short | changes), qwen3()))
    assert after == before if grows is None else (after > before) == grows
    assert after != before or grows is None


def test_chunks_shorten_the_pass_for_old_log_probs():
    long = {ROLLOUT + "log_prob_max_token_len_per_gpu": 100_000}
    plain = estimate(config(**long), qwen3())
    chunked = estimate(
        config(**long, **{ACTOR + "entropy_from_logits_with_chunking": True}), qwen3()
    )
    assert plain.moment == chunked.moment == "old log-probs"
    assert chunked.parts["logits"] * GIB == 4000 * (2 * 100_000 + 12 * 2048)
    both = estimate(config(**long, bupo__log_both_policies=True), qwen3())
    watched = 1 + WATCHED / 100_000
    assert both.parts["logits"] == pytest.approx(watched * plain.parts["logits"])


def test_a_cpu_reserves_nothing_and_has_no_runtime():
    one = {ROLLOUT + "tensor_model_parallel_size": 1}
    found = estimate(config(trainer__device="cpu", **one), qwen3())
    assert not {"KV cache", "runtime"} & (found.parts.keys() | found.rollout.keys())
    assert found.rollout["inference weights"] * GIB == pytest.approx(4 * found.parameters)
    assert not any("KV cache" in line for line in found.lines())


def test_the_reference_waits_on_the_cpu_and_passes_with_its_own_budget():
    changes = {ACTOR + "use_kl_loss": True}
    assert estimate(config(**changes), qwen3()) == estimate(config(), qwen3())
    changes |= {"actor_rollout_ref__ref__log_prob_max_token_len_per_gpu": 100_000}
    found = estimate(config(**changes), qwen3())
    assert found.moment == "reference"
    assert {"reference", "actor"} < set(found.parts)
    # With LoRA it is the actor without its adapters.
    assert estimate(config(**changes, **{MODEL + "lora_rank": 2}), qwen3()).moment != "reference"


def test_the_critic_waits_while_the_actor_updates_and_the_other_way_round():
    gae = {"algorithm__adv_estimator": "gae", "critic__ppo_max_token_len_per_gpu": 1}
    found = estimate(config(**gae), qwen3())
    assert (found.moment, "critic" in found.parts) == ("old log-probs", True)
    gae["critic__ppo_max_token_len_per_gpu"] = 500_000
    found = estimate(config(**gae), qwen3())
    assert (found.moment, "actor" in found.parts) == ("critic update", True)
    assert "logits" not in found.parts


def test_a_micro_batch_has_a_size():
    fixed = {
        ACTOR + "use_dynamic_bsz": False,
        ACTOR + "ppo_micro_batch_size_per_gpu": 4,
        ROLLOUT + "log_prob_micro_batch_size_per_gpu": 4,
    }
    lengths = {"data__max_prompt_length": 1000, "data__max_response_length": 3096}
    budget = {ACTOR + "ppo_max_token_len_per_gpu": 4 * 4096}
    assert estimate(config(**fixed, **lengths), qwen3()) == estimate(config(**budget), qwen3())
    # One response may be longer than the budget.
    longest = lengths | {ACTOR + "ppo_max_token_len_per_gpu": 7}
    assert estimate(config(**longest), qwen3()) == estimate(
        config(**{ACTOR + "ppo_max_token_len_per_gpu": 4096}), qwen3()
    )
    for name in (ACTOR + "ppo", ROLLOUT + "log_prob"):
        key = f"{name}_micro_batch_size_per_gpu"
        with pytest.raises(SettingError, match=key.replace("__", r"\.")):
            estimate(config(**fixed | {key: None}), qwen3())


def test_the_rollout_engine_takes_its_share():
    changes = {ROLLOUT + "gpu_memory_utilization": 0.25, ROLLOUT + "tensor_model_parallel_size": 1}
    found = estimate(config(**changes), qwen3(), gpu_memory=40.0)
    assert found.rollout["inference weights"] * GIB == 2 * found.parameters
    assert found.rollout["inference weights"] + found.rollout["KV cache"] == pytest.approx(10.0)
    assert found.peak == pytest.approx(sum(found.rollout.values()))
    cramped = estimate(config(**changes), qwen3(), gpu_memory=0.0)
    assert any("no room for a KV cache" in line for line in cramped.lines())


def test_lines_say_that_it_is_an_estimate_and_name_the_largest():
    found = estimate(config(), qwen3())
    text = "\n".join(found.lines())
    assert "estimate" in text
    largest = sorted(found.parts.items(), key=lambda it: it[1])[:-4:-1]
    assert found.lines()[-1].endswith(", ".join(name for name, _ in largest))
    assert f"{found.peak:.2f}" in text
    assert f"{found.parameters:,}" in text


def test_a_plain_mapping_will_do():
    plain = OmegaConf.to_container(config())
    assert estimate(plain, qwen3()) == estimate(config(), qwen3())


def test_free_disk_asks_the_nearest_folder(tmp_path):
    found = free_disk(tmp_path / "not" / "yet")
    assert found == pytest.approx(free_disk(tmp_path), rel=0.01)
    assert 0 < found < 1e6
