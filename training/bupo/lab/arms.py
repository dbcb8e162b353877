"""What the laboratory compares: BuPO, its baselines, and controls that differ in one thing each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bupo.settings import AUTO
from entropylens.errors import SettingError

__all__ = [
    "AUTOMATIC",
    "BASELINES",
    "BUPO",
    "GRPO",
    "INTER_GRPO",
    "START",
    "Arm",
    "arms",
    "at_layer",
]

#: The two arms of the primary contrast, the one that the paper says collapses, and one beyond it.
GRPO, BUPO, INTER_GRPO = "GRPO", "BuPO", "InterGRPO throughout"
AUTOMATIC = "BuPO, s_inter auto"
#: Beside GRPO, with their estimators of advantages.
BASELINES = {"PPO": "gae", "RLOO": "rloo", "REINFORCE++": "reinforce_plus_plus"}
#: What all of them set out from.
START = "no training"
#: Of the entropy bonus in its arm.
ENTROPY_COEFF = 0.01


@dataclass(frozen=True)
class Arm:
    """One way of training, from step 1 to the last.

    Args:
        name: what the tables call it.
        estimator: of advantages: grpo, rloo, reinforce_plus_plus, or gae (PPO, with a critic).
        layer: l: of pi_l, or of the highest layer that `only_lower` trains.
        internal_steps: the first steps, in which what differs from plain training is done; or
            auto (see `bupo.phase`).
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
    internal_steps: int | str = 0
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

    @property
    def slug(self) -> str:
        """The name as a directory's."""
        return re.sub(r"[^a-z0-9+_]+", "-", self.name.replace("<=", "to").lower()).strip("-")


def at_layer(layer: int, recommended: int) -> str:
    """The name of BuPO at a layer."""
    return BUPO if layer == recommended else f"{BUPO}, layer {layer}"


def _throughout(layer: int, recommended: int) -> str:
    """The name of InterGRPO without an end at a layer."""
    return INTER_GRPO if layer == recommended else f"{INTER_GRPO}, layer {layer}"


def arms(layer: int, num_layers: int, internal_steps: int, steps: int) -> tuple[Arm, ...]:
    """All arms; the first two make the primary contrast.

    Args:
        layer: that BuPO trains first, fixed beforehand.
        num_layers: L; BuPO at each other inner layer is a control.
        internal_steps: s_inter, fixed beforehand.
        steps: of a whole run.
    """
    grpo = Arm(GRPO)
    bupo = Arm(BUPO, layer=layer, internal_steps=internal_steps, internal=True)
    others = [other for other in range(1, num_layers) if other != layer]
    return (
        grpo,
        bupo,
        *(replace(grpo, name=name, estimator=it) for name, it in BASELINES.items()),
        *(replace(bupo, name=at_layer(other, layer), layer=other) for other in others),
        *(
            replace(bupo, name=_throughout(it, layer), layer=it, internal_steps=steps)
            for it in dict.fromkeys((layer, num_layers - 1))
        ),
        replace(bupo, name=AUTOMATIC, internal_steps=AUTO),
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
        replace(grpo, name=START, skipped=steps),
    )
