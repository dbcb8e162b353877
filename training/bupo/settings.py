"""The settings of BuPO: one `bupo` node beside veRL's own, validated before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from entropylens.errors import SettingError

__all__ = ["AUTO", "Settings"]

AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """What the `bupo` node says.

    Args:
        layer: l of the internal policy pi_l, from 1 to L-1; None where no phase is internal.
        internal_steps: s_inter of Eq. 11: the steps 1..s_inter train pi_l, those after it pi_theta.
            Or `auto`: see `bupo.phase`.
        max_internal_steps: where it is `auto`, the most steps that the internal phase takes.
        kl_bound: where it is `auto`, nats a token that pi_theta may move on the fixed set.
        skip_upper_layers: do not run layers l+1..L where pi_theta is not needed.
        log_both_policies: entropy and NLL of the policy that is not trained, too, at up to 2,048
            response positions a step.
        freeze_unembedding: keep E_u as it is during the internal phase (a tied embedding with it).
        reset_optimizer_at_switch: forget AdamW's moments when pi_theta's turn comes.
        analyze_every: steps between two looks at the fixed set; 0 for none.
        analyze_responses: responses of step 0 in the fixed set.
        kl_in_internal_phase: let a KL penalty compare pi_l with the reference's pi_theta.
        keep_rollouts: rollouts that are kept a step, with prompt, response and reward; 0 for none.
        run_dir: where metrics, rollouts and looks go; by default beside the checkpoints.
    """

    layer: int | None = None
    internal_steps: int | str = 0
    max_internal_steps: int | None = None
    kl_bound: float = 0.1
    skip_upper_layers: bool = True
    log_both_policies: bool = True
    freeze_unembedding: bool = False
    reset_optimizer_at_switch: bool = False
    analyze_every: int = 0
    analyze_responses: int = 32
    kl_in_internal_phase: bool = False
    keep_rollouts: int = 32
    run_dir: str | None = None

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Read them from veRL's configuration, a mapping with or without a `bupo` node.

        Raises:
            SettingError: an unknown name, or a value that makes no sense.
        """
        node = dict(config.get("bupo") or {})
        known = {field.name for field in fields(cls)}
        for name in node.keys() - known:
            raise SettingError(f"there is no setting bupo.{name}", f"choose of {sorted(known)}")
        settings = cls(**node)
        settings._check()
        return settings

    @property
    def trains_inner(self) -> bool:
        """Whether any step trains pi_l."""
        return self.internal_steps == AUTO or int(self.internal_steps) > 0

    def directory(self, config: Any) -> Path:
        """The run's directory."""
        beside = Path(config.trainer.default_local_dir).parent
        return Path(self.run_dir) if self.run_dir is not None else beside

    def _check(self) -> None:
        for name in ("skip_upper_layers", "log_both_policies", "freeze_unembedding",
                     "reset_optimizer_at_switch", "kl_in_internal_phase"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "true or false")
        for name in ("analyze_every", "analyze_responses", "keep_rollouts"):
            value = getattr(self, name)
            if not _is_count(value):
                raise _wrong(name, value, "a number, 0 or more")
        if self.internal_steps != AUTO and not _is_count(self.internal_steps):
            raise _wrong("internal_steps", self.internal_steps, "a number, 0 or more, or auto")
        if self.layer is not None and (not _is_count(self.layer) or self.layer < 1):
            raise _wrong("layer", self.layer, "a number, 1 or more (layers count from 1)")
        if self.trains_inner and self.layer is None:
            raise SettingError(
                f"bupo.internal_steps={self.internal_steps} trains an inner policy, and no layer "
                "is given",
                "pass bupo.layer=N, or --layer auto to let the analyzer choose it",
            )
        if self.analyze_every and not self.analyze_responses:
            raise _wrong("analyze_responses", 0, "1 or more, since analyze_every is set")
        if self.internal_steps == AUTO:
            if not _is_count(self.max_internal_steps) or not self.max_internal_steps:
                raise _wrong(
                    "max_internal_steps", self.max_internal_steps,
                    "the most steps that the internal phase may take (1 or more)",
                )  # fmt: skip
            if not isinstance(self.kl_bound, int | float) or not self.kl_bound > 0:
                raise _wrong("kl_bound", self.kl_bound, "nats a token, more than 0")
            if not self.analyze_every:
                raise SettingError(
                    "bupo.internal_steps=auto decides by the fixed set, and bupo.analyze_every=0",
                    "set bupo.analyze_every=1, or give bupo.internal_steps as a number",
                )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong(name: str, value: object, wanted: str) -> SettingError:
    return SettingError(f"bupo.{name} is {value!r}", f"give {wanted}")
