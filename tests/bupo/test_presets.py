"""The presets against the paper's Table 5 and the authors' scripts."""

import pytest
from bupo.launch import compose, presets
from transformers import PreTrainedTokenizerFast

from entropylens.errors import SettingError
from entropylens.templates import TEMPLATES

MODELS = {
    "qwen3-4b": ("Qwen/Qwen3-4B", 6, 30, 7168),
    "qwen3-8b": ("Qwen/Qwen3-8B", 6, 20, 7168),
    "octothinker-3b": ("OctoThinker/OctoThinker-3B-Long-Base", 27, 20, 3072),
    "octothinker-8b": ("OctoThinker/OctoThinker-8B-Long-Base", 31, 20, 3072),
}


def of(name, *overrides):
    return compose(name, overrides)[0]


@pytest.mark.parametrize("name", MODELS)
def test_paper(name):
    path, layer, internal_steps, response = MODELS[name]
    config = of(f"{name}-paper")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.model.path == path
    assert (config.bupo.layer, config.bupo.internal_steps) == (layer, internal_steps)
    assert (config.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size) == (128, 8, 32)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (1024, response)
    assert (actor.optim.lr, config.critic.optim.lr) == (1e-6, 1e-5)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.2)
    assert actor.clip_ratio_c > 1e6
    assert actor.loss_agg_mode == "seq-mean-token-mean"
    assert (rollout.temperature, actor.grad_clip, actor.entropy_coeff) == (1.0, 1.0, 0)
    assert not actor.use_kl_loss
    assert not config.algorithm.use_kl_in_reward
    assert config.trainer.total_training_steps == 300
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (1, 8)


@pytest.mark.parametrize("name", MODELS)
def test_script(name):
    config = of(f"{name}-script")
    actor = config.actor_rollout_ref.actor
    assert config.bupo.internal_steps == 30
    assert config.data.max_response_length == 8192
    assert (actor.loss_agg_mode, actor.clip_ratio_c) == ("token-mean", 10)
    assert config.reward.custom_reward_function.reward_kwargs.mode == "strict"


def test_intergrpo_is_internal_throughout():
    config = of("qwen3-4b-intergrpo")
    assert config.bupo.internal_steps == config.trainer.total_training_steps


def test_thinking_is_off_and_octothinker_has_the_papers_text():
    assert of("qwen3-4b-paper").data.apply_chat_template_kwargs.enable_thinking is False
    template = of("octothinker-3b-paper").actor_rollout_ref.model.custom_chat_template
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    messages = [{"role": "system", "content": "no"}, {"role": "user", "content": "1 + {1}?"}]
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert text == TEMPLATES["octothinker"].replace("{problem}", "1 + {1}?")


@pytest.mark.parametrize("estimator", ["grpo", "gae", "reinforce_plus_plus", "rloo"])
def test_a_baseline_is_one_key(estimator):
    config = of("qwen3-4b-paper", f"algorithm.adv_estimator={estimator}", "bupo.internal_steps=0")
    assert config.algorithm.adv_estimator == estimator
    assert config.critic.model.path == "Qwen/Qwen3-4B"


def test_every_preset_composes_and_a_file_may_build_on_one(tmp_path):
    for name in presets():
        assert of(name).trainer.v1.trainer_mode == "bupo"
    own = tmp_path / "mine.yaml"
    own.write_text("defaults: [qwen3-4b-paper, _self_]\nbupo:\n  layer: 9\n")
    assert of(str(own)).bupo.layer == 9
    assert of(str(own), "bupo.layer=10").bupo.layer == 10


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(SettingError, match=r"'qwen9'.*qwen3-4b-paper"):
        of("qwen9")
    with pytest.raises(SettingError, match=r"bupo\.layr"):
        of("qwen3-4b-paper", "bupo.layr=3")
