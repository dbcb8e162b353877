"""What the laboratory compares: BuPO, its baselines, and controls that differ in one thing each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from entropylens.errors import SettingError

__all__ = ["Arm", "arms"]

#: Of the entropy bonus in its arm.
ENTROPY_COEFF = 0.01


@dataclass(frozen=True)
class Arm:
    """One way of training, from step 1 to the last.

    Args:
        name: what the tables call it.
        estimator: of advantages: grpo, rloo or reinforce_plus_plus.
        layer: l: of pi_l, or of the highest layer that `only_lower` trains.
        internal_steps: the first steps, in which what differs from plain training is done.
        internal: pi_l is trained in them (Eq. 10); pi_theta else.
        only_lower: layers 1..l and E_u alone are trained in them.
        shuffled: advantages are dealt anew within each group in them.
        entropy_coeff: of an entropy bonus in them.
        freeze_unembedding: E_u is left as it is in them.
        reset_optimizer: AdamW's moments are forgotten after them.
        skipped: steps fewer than the others make.
    """

    name: str
    estimator: str = "grpo"
    layer: int | None = None
    internal_steps: int = 0
    internal: bool = False
    only_lower: bool = False
    shuffled: bool = False
    entropy_coeff: float = 0.0
    freeze_unembedding: bool = False
    reset_optimizer: bool = False
    skipped: int = 0

    def __post_init__(self) -> None:
        if (self.internal or self.only_lower) and self.layer is None:
            raise SettingError(f"arm {self.name!r} needs a layer", "give one")


def arms(layer: int, other: int, internal_steps: int, steps: int) -> tuple[Arm, ...]:
    """All arms; the first two make the primary contrast.

    Args:
        layer: that BuPO trains first, fixed beforehand.
        other: of the control at another layer.
        internal_steps: s_inter, fixed beforehand.
        steps: of a whole run.
    """
    grpo = Arm("GRPO")
    bupo = Arm("BuPO", layer=layer, internal_steps=internal_steps, internal=True)
    return (
        grpo,
        bupo,
        replace(grpo, name="RLOO", estimator="rloo"),
        replace(grpo, name="REINFORCE++", estimator="reinforce_plus_plus"),
        replace(bupo, name="BuPO, another layer", layer=other),
        replace(bupo, name="InterGRPO throughout", internal_steps=steps),
        replace(grpo, name="GRPO, s_inter steps fewer", skipped=internal_steps),
        replace(bupo, name="GRPO on layers <= l first", internal=False, only_lower=True),
        replace(bupo, name="BuPO, shuffled advantages", shuffled=True),
        replace(
            grpo,
            name="GRPO, entropy bonus first",
            internal_steps=internal_steps,
            entropy_coeff=ENTROPY_COEFF,
        ),
        replace(bupo, name="BuPO, E_u frozen first", freeze_unembedding=True),
        replace(bupo, name="BuPO, optimizer reset", reset_optimizer=True),
    )
