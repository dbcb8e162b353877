"""What a model's configuration tells before its weights are loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from bupo.probe import Probe
from bupo.settings import Settings
from entropylens.errors import SettingError
from entropylens.sources import hf

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["check_model", "model_config", "skeleton"]

logger = logging.getLogger(__name__)


def model_config(config: DictConfig) -> PretrainedConfig:
    """The Hugging Face configuration of the model that a run trains.

    Raises:
        EntropyLensError: it is not there, or no decoder.
    """
    model = config.actor_rollout_ref.model
    options = {"trust_remote_code": bool(model.trust_remote_code)}
    with hf.explained(str(model.path)):
        found = hf.load_config(str(model.path), options)
    hf.check_decoder(found, str(model.path), bool(model.trust_remote_code))
    return found


def skeleton(hf_config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust_remote_code)


def check_model(config: DictConfig, hf_config: PretrainedConfig) -> None:
    """Refuse a layer, or a way of computing, that this model does not have.

    Raises:
        SettingError: with the setting to change.
        UnknownArchitectureError: no family describes the model.
    """
    settings = Settings.of(config)
    model = config.actor_rollout_ref.model
    tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
    if model.use_fused_kernels and not tied:
        raise SettingError(
            "actor_rollout_ref.model.use_fused_kernels=True reads lm_head's weight where FSDP2 "
            "has sharded it, unless it is tied to the embedding; this model's is not",
            "set it to False",
        )
    if settings.layer is None:
        return
    empty = skeleton(hf_config, trust_remote_code=bool(model.trust_remote_code))
    probe = Probe(empty, settings.layer)
    if settings.skip_upper_layers and settings.trains_inner:
        _check_skipping(empty, probe)


def _check_skipping(model: PreTrainedModel, probe: Probe) -> None:
    """Run the empty model: shapes suffice to see which layers take part.

    Where some layer computes with values, which there are none of here, the first update refuses.
    """
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="meta")
    ready: dict[str, Any] = {"attention_mask": mask, "position_ids": torch.zeros_like(ids)}
    for masks in (ready, {}):  # most families look into a mask of their own making
        try:
            with torch.no_grad(), probe.internal(skip_upper_layers=True):
                model(ids, use_cache=False, **masks)
        except SettingError:
            raise
        except Exception as error:
            logger.debug("skipping cannot be tried without weights: %s", error)
        else:
            return
