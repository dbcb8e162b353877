"""Will a run fit? Memory of a GPU and size of a checkpoint, before veRL loads anything.

An estimate, from the settings and the model's configuration alone; footprint.py has the formulas.
BuPO's internal phase needs no more than GRPO, whatever bupo.layer and bupo.skip_upper_layers, so
GRPO is estimated; bupo.log_both_policies adds the logits of up to WATCHED positions to the pass for
old_log_probs. On a CPU a rank takes what a GPU would; generation has a second copy of the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from bupo.footprint import Engine, bytes_of, measure
from bupo.names import WATCHED
from entropylens.errors import SettingError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["DEFAULTS", "Estimate", "estimate", "free_disk"]

GIB = 2**30
#: GiB: CUDA contexts of trainer and rollout, NCCL's buffers, workspaces of cuBLAS.
RUNTIME = 2.0

#: All settings that count, with veRL 0.9.1's values (trainer/config/_generated_ppo_trainer.yaml).
DEFAULTS: DictConfig | ListConfig = OmegaConf.create(
    """
    trainer: {device: cuda, nnodes: 1, n_gpus_per_node: 8}
    data: {max_prompt_length: 512, max_response_length: 512}
    algorithm: {adv_estimator: gae, use_kl_in_reward: false}
    bupo: {log_both_policies: false}
    actor_rollout_ref:
      model: &model
        {lora_rank: 0, target_modules: all-linear, exclude_modules: null, use_fused_kernels: false,
         enable_gradient_checkpointing: true, trust_remote_code: false,
         override_config: {attn_implementation: flash_attention_2}}
      actor:
        {use_dynamic_bsz: false, ppo_max_token_len_per_gpu: 16384, use_kl_loss: false,
         ppo_micro_batch_size_per_gpu: null, calculate_entropy: false, entropy_coeff: 0,
         entropy_from_logits_with_chunking: false, entropy_from_logits_chunk_size: 2048,
         checkpoint: &saved {save_contents: [model, optimizer, extra], save_lora_only: false},
         fsdp_config: &engine {
           model_dtype: fp32, mixed_precision: null, fsdp_size: -1, param_offload: false,
           optimizer_offload: false, offload_policy: false, reshard_after_forward: true,
           use_no_sync_for_gradient_accumulation: false, use_torch_compile: true,
           entropy_from_logits_with_chunking:
             "${actor_rollout_ref.actor.entropy_from_logits_with_chunking}",
           entropy_from_logits_chunk_size:
             "${actor_rollout_ref.actor.entropy_from_logits_chunk_size}"}}
      rollout:
        {<<: &scoring {
           log_prob_use_dynamic_bsz: "${actor_rollout_ref.actor.use_dynamic_bsz}",
           log_prob_max_token_len_per_gpu: "${actor_rollout_ref.actor.ppo_max_token_len_per_gpu}",
           log_prob_micro_batch_size_per_gpu: null},
         tensor_model_parallel_size: 2, gpu_memory_utilization: 0.5, free_cache_engine: true,
         dtype: bfloat16, temperature: 1.0}
      ref: {<<: *scoring, fsdp_config: *engine}
    critic:
      {enable: null, model: *model, fsdp: *engine, checkpoint: *saved,
       use_dynamic_bsz: "${actor_rollout_ref.actor.use_dynamic_bsz}",
       ppo_max_token_len_per_gpu: 32768, ppo_micro_batch_size_per_gpu: null}
    """
)


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to need.

    Args:
        parameters: of the model, tied ones once, without adapters.
        trainable: of them, or the adapters' with LoRA.
        parts: GiB on one GPU at the largest moment of training, by what takes it.
        rollout: the same while responses are generated.
        peak: GiB on one GPU, the larger of both.
        checkpoint: GiB on disk of one checkpoint, all ranks.
        moment: when `parts` is: actor update | critic update | old log-probs | reference.
        reserves: whether the rollout engine reserves memory for a KV cache.
    """

    parameters: int
    trainable: int
    parts: Mapping[str, float]
    rollout: Mapping[str, float]
    peak: float
    checkpoint: float
    moment: str = "actor update"
    reserves: bool = True

    def lines(self) -> list[str]:
        """A table in GiB; it says that it is an estimate and names the three largest parts."""
        largest = sorted(self.parts, key=lambda name: -self.parts[name])[:3]
        rows: list[tuple[str, float]] = []
        for moment, parts in ((self.moment, self.parts), ("rollout", self.rollout)):
            rows += [(f"{moment}, a rank", sum(parts.values()))]
            rows += [(f"  {name}", size) for name, size in parts.items()]
        rows += [("peak, a rank", self.peak), ("one checkpoint, on disk", self.checkpoint)]
        room = ["no room for a KV cache: raise gpu_memory_utilization"]
        return [
            f"{self.parameters:,} parameters, {self.trainable:,} of them or of adapters trained",
            "an estimate, in GiB:",
            *(f"{name:<28}{size:>9.2f}" for name, size in rows),
            *(room if self.reserves and "KV cache" not in self.rollout else []),
            f"largest in the {self.moment}: {', '.join(largest)}",
        ]


def estimate(
    config: DictConfig | Mapping[str, Any],
    hf_config: PretrainedConfig,
    *,
    gpu_memory: float = 80.0,
) -> Estimate:
    """Estimate a veRL run; the formulas stand at the head of footprint.py.

    Args:
        config: the resolved settings; what is missing has veRL's default (`DEFAULTS`).
        hf_config: of the policy; the critic is taken to be the same model with a value head.
        gpu_memory: GiB of one GPU, of which the rollout engine takes gpu_memory_utilization.

    Raises:
        SettingError: a micro-batch has neither a token budget nor a size.
    """
    settings: Any = OmegaConf.merge(DEFAULTS, config)
    arr, critic = settings.actor_rollout_ref, settings.critic
    gpus = settings.trainer.nnodes * settings.trainer.n_gpus_per_node
    shape = measure(hf_config, arr.model)
    policy = Engine(shape, arr.actor.fsdp_config, gpus, arr.model.enable_gradient_checkpointing)
    left, checkpoint = sum(policy.states().values()), policy.checkpoint(arr.actor.checkpoint)

    tokens = _tokens(settings, "actor_rollout_ref.actor", "ppo_")
    updates = policy.update(tokens, policy.logits(arr, tokens, update=True))
    moments = [("actor update", it) for it in updates]
    tokens = _tokens(settings, "actor_rollout_ref.rollout", "log_prob_")
    rows = tokens + (min(tokens, WATCHED) if settings.bupo.log_both_policies else 0)
    scored = policy.scoring(tokens, policy.logits(arr, rows, update=False))
    moments.append(("old log-probs", policy.states(weights=True) | scored))
    if (arr.actor.use_kl_loss or settings.algorithm.use_kl_in_reward) and not shape.adapters:
        # It waits on the CPU (CPUOffloadPolicy); with LoRA it is the actor without adapters.
        reference = Engine(shape, arr.ref.fsdp_config, gpus)
        tokens = _tokens(settings, "actor_rollout_ref.ref", "log_prob_")
        scored = reference.scoring(tokens, reference.logits(arr, tokens, update=False))
        scored["reference"] = scored.pop("unsharded layers")
        moments.append(("reference", scored | {"actor": left}))
    wanted = critic.enable
    if settings.algorithm.adv_estimator == "gae" if wanted is None else wanted:
        values = measure(hf_config, critic.model, values=True)
        valuing = Engine(values, critic.fsdp, gpus, critic.model.enable_gradient_checkpointing)
        waiting = sum(valuing.states().values())
        updates = valuing.update(_tokens(settings, "critic", "ppo_"), logits=0.0)
        moments = [(name, it | {"critic": waiting}) for name, it in moments]
        moments += [("critic update", it | {"actor": left}) for it in updates]
        left += waiting
        checkpoint += valuing.checkpoint(critic.checkpoint)

    on_cpu = settings.trainer.device == "cpu"
    weights = (shape.total + shape.adapters) * bytes_of("fp32" if on_cpu else arr.rollout.dtype)
    weights /= arr.rollout.tensor_model_parallel_size
    share = 0.0 if on_cpu else arr.rollout.gpu_memory_utilization
    engine = max(weights, share * gpu_memory * GIB)
    generating = {"inference weights": weights, "KV cache": engine - weights}
    if not arr.rollout.free_cache_engine:
        moments = [(name, it | {"rollout engine": engine}) for name, it in moments]
    moment, largest = max(moments, key=lambda it: sum(it[1].values()))
    runtime = 0.0 if on_cpu else RUNTIME
    parts, rollout = (
        _in_gib(it | {"runtime": runtime * GIB})
        for it in (largest, generating | {"training state": left})
    )
    peak = max(sum(parts.values()), sum(rollout.values()))
    return Estimate(
        shape.total, shape.trained, parts, rollout, peak, checkpoint / GIB, moment, not on_cpu
    )


def free_disk(path: str | Path) -> float:
    """GiB free where `path` is, or would be made."""
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / GIB


def _in_gib(parts: Mapping[str, float]) -> dict[str, float]:
    sizes = {name: size / GIB for name, size in parts.items() if size}
    return dict(sorted(sizes.items(), key=lambda it: -it[1]))


def _tokens(settings: Any, section: str, prefix: str) -> int:
    """The most tokens that a micro-batch holds on one GPU."""
    own = OmegaConf.select(settings, section)
    longest = settings.data.max_prompt_length + settings.data.max_response_length
    if own[f"{prefix}use_dynamic_bsz".removeprefix("ppo_")]:
        return int(max(longest, own[f"{prefix}max_token_len_per_gpu"]))
    name = f"{prefix}micro_batch_size_per_gpu"
    if own[name] is None:
        raise SettingError(
            f"{section}.{name} is not set, nor are batches dynamic",
            "set it, or actor_rollout_ref.actor.use_dynamic_bsz=True",
        )
    return int(own[name] * longest)
