"""One arm in this process: answer, update, look, step after step; all draws are keyed."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from bupo.fixed_set import FixedSet, choose
from bupo.lab.answering import Answered, ask
from bupo.lab.arms import Arm
from bupo.lab.learner import Learner, Rates
from bupo.lab.task import Split, draw_sums
from bupo.phase import Phase
from bupo.records import MetricsFile
from bupo.settings import Settings
from entropylens.errors import EntropyLensError
from entropylens.files import make_directory, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["CONFIG", "HELD_OUT", "PHASE", "ROLLOUTS", "Course", "config_of", "evaluate", "train"]

logger = logging.getLogger(__name__)

#: Tell the draws of rollouts, and of looks and examinations, from those of demonstrations.
ROLLOUTS, _LOOKS = 2, 3
CONFIG, PHASE = "config.yaml", "phase.json"
#: The metric of looks at the development split: Avg@1.
HELD_OUT = "lab/held_out"


@dataclass(frozen=True)
class Course:
    """What all arms have in common.

    Args:
        steps: rollouts with their updates.
        prompts: of a rollout.
        samples: answers to each, a group.
        rates: of the updates.
        look_every: steps between two looks at the fixed set and the development split.
        fixed: responses of the first rollout in the fixed set.
        held_out: development problems of a look, each answered once.
        kl_bound: of `auto`, nats a token.
    """

    steps: int = 100
    prompts: int = 32
    samples: int = 8
    rates: Rates = field(default_factory=Rates)
    look_every: int = 5
    fixed: int = 32
    held_out: int = 256
    kl_bound: float = 0.1


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arm: Arm,
    course: Course,
    seed: int,
    directory: Path,
    *,
    watched: int,
    progress: bool = True,
) -> None:
    """Train the model in place; the directory can be drawn as any training run.

    It gets config.yaml, metrics.jsonl (a line a step, and one of step 0) and fixed_set/.

    Args:
        model: a start, float32.
        tokenizer: its tokenizer.
        arm: how.
        course: how long, and with what.
        seed: of prompts and samples: the same for all arms that are compared.
        directory: new.
        watched: the layer that is looked at where the arm has none.
        progress: show a progress bar.
    """
    # Adapters and dropout apart, training mode changes nothing: what samples is what is trained.
    model.eval()
    layer = arm.layer or watched
    settings = Settings(
        layer=layer, internal_steps=arm.internal_steps, max_internal_steps=course.steps,
        kl_bound=course.kl_bound, analyze_every=course.look_every,
        freeze_unembedding=arm.freeze_unembedding,
        reset_optimizer_at_switch=arm.reset_optimizer,
    )  # fmt: skip
    make_directory(directory)
    write_text(directory / CONFIG, config_of(arm, course, seed, watched))
    learner = Learner(model, arm, course.rates, layer, seed)
    phase = Phase(settings, directory / PHASE)
    watch = _Watch(model, tokenizer, course, seed, layer, directory / "fixed_set")
    log = MetricsFile(directory / "metrics.jsonl", step=0)
    steps = course.steps - arm.skipped
    for step in tqdm(range(1, steps + 1), desc=arm.name, unit="step", disable=not progress):
        place = (step - 1) * course.prompts
        asked = draw_sums("train", course.prompts, ROLLOUTS, seed, step)
        answered = ask(model, tokenizer, asked, course.samples, (seed, step), first=place)
        if step == 1:
            log.log(watch.start(answered), 0)
        found = learner.learn(answered, step, in_phase=phase.is_internal(step))
        if step % course.look_every == 0 or step == steps:
            found |= watch.look(step)
        of_prompts = answered.rewards.mean(1).tolist()
        phase.saw(step, of_prompts, found.get("fixed_set/kl"))
        log.log(found, step)


def config_of(arm: Arm, course: Course, seed: int, watched: int) -> str:
    """Everything that a run depends on but its start, as its config.yaml holds it.

    The `bupo` node is what figures read: no layer where no policy of one is trained.
    """
    steps = arm.internal_steps if arm.internal else 0
    told = {
        "bupo": {"layer": arm.layer if arm.internal else None, "internal_steps": steps},
        "lab": {"arm": asdict(arm), "course": asdict(course), "seed": seed, "watched": watched},
    }
    return json.dumps(told, indent=1) + "\n"


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    problems: int,
    samples: int,
    seed: int,
) -> list[int]:
    """Right answers to each of some problems; the same seed asks and draws the same."""
    asked = draw_sums(split, problems, _LOOKS, seed)
    return ask(model, tokenizer, asked, samples, (seed, 0)).rewards.sum(1).int().tolist()


class _Watch:
    """Looks at the weights of some steps: over the first rollout, and on the development split."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        course: Course,
        seed: int,
        layer: int,
        directory: Path,
    ) -> None:
        self.model, self.tokenizer, self.course = model, tokenizer, course
        self.seed, self.layer, self.directory = seed, layer, directory

    def start(self, answered: Answered) -> dict[str, float]:
        chosen = choose(len(answered.responses), self.course.fixed)
        FixedSet.start(self.directory, [answered.responses[it] for it in chosen])
        return self.look(0)

    def look(self, step: int) -> dict[str, float]:
        """At the weights of a step; those of a collapsed model, which are NaN, say nothing."""
        right = evaluate(
            self.model, self.tokenizer, "development", self.course.held_out, 1, self.seed
        )
        found = {HELD_OUT: sum(right) / len(right)}
        try:
            look = FixedSet.open(self.directory).look(self.model, step=step, layer=self.layer)
        except EntropyLensError as error:
            logger.warning("no look at step %d: %s", step, error)
            return found
        return found | look.to_metrics()
