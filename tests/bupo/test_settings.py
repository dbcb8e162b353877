from pathlib import Path
from types import SimpleNamespace

import pytest
from bupo.settings import AUTO, Settings
from omegaconf import OmegaConf

from entropylens.errors import SettingError

AUTOMATIC = {"layer": 2, "internal_steps": AUTO, "max_internal_steps": 9, "analyze_every": 1}


def test_the_configuration_of_a_run_says_them_all():
    """No setting is forgotten in _run.yaml, and its defaults are those of the class."""
    file = Path(__file__).parents[2] / "training" / "configs" / "_run.yaml"
    config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert config["bupo"].keys() == vars(Settings()).keys()
    assert Settings.of(config) == Settings()


@pytest.mark.parametrize("config", [{}, {"bupo": None}, {"bupo": {}}])
def test_nothing_said_is_plain_verl(config):
    assert Settings.of(config) == Settings()
    assert not Settings.of(config).trains_inner


def test_what_is_said_is_kept():
    node = {"layer": 6, "internal_steps": 20, "freeze_unembedding": True, "keep_rollouts": 0}
    found = Settings.of({"bupo": node, "trainer": {"unrelated": 1}})
    assert found == Settings(6, 20, freeze_unembedding=True, keep_rollouts=0)
    assert found.trains_inner
    assert not Settings.of({"bupo": {"layer": 6}}).trains_inner
    assert Settings.of({"bupo": AUTOMATIC}).trains_inner


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(SettingError, match=r"no setting bupo\.layers") as refused:
        Settings.of({"bupo": {"layers": 6}})
    for name in ("layer", "internal_steps", "run_dir"):
        assert repr(name) in refused.value.line


def refusals():
    flags = ("skip_upper_layers", "log_both_policies", "freeze_unembedding",
             "reset_optimizer_at_switch", "kl_in_internal_phase")  # fmt: skip
    for name in flags:
        for value in (1, "true", None):
            yield {name: value}, f"bupo.{name} is {value!r}: give true or false"
    for name in ("analyze_every", "analyze_responses", "keep_rollouts"):
        for value in (-1, 1.5, True, "3", None):
            yield {name: value}, f"bupo.{name} is {value!r}: give a number, 0 or more"
    for value in (-1, 2.0, "Auto", None, True):
        yield (
            {"layer": 2, "internal_steps": value},
            f"bupo.internal_steps is {value!r}: give a number, 0 or more, or auto",
        )
    for value in (-1, 0, 2.5, "6", True):
        yield {"layer": value}, f"bupo.layer is {value!r}: give a number, 1 or more"
    for value in (1, AUTO):
        yield (
            {"internal_steps": value},
            f"bupo.internal_steps={value} trains an inner policy, and no layer is given",
        )
    yield {"analyze_every": 2, "analyze_responses": 0}, "since analyze_every is set"
    for value in (None, 0, -3, 2.5, True):
        yield (
            AUTOMATIC | {"max_internal_steps": value},
            f"bupo.max_internal_steps is {value!r}: give the most steps",
        )
    for value in (0, -0.1, "0.1", None, float("nan")):
        yield AUTOMATIC | {"kl_bound": value}, f"bupo.kl_bound is {value!r}: give nats a token"
    yield AUTOMATIC | {"analyze_every": 0}, "auto decides by the fixed set"


@pytest.mark.parametrize(("node", "says"), refusals())
def test_what_makes_no_sense_is_refused(node, says):
    with pytest.raises(SettingError) as refused:
        Settings.of({"bupo": node})
    assert says in refused.value.line


def test_what_only_auto_needs_is_not_asked_of_a_number():
    node = {"layer": 2, "internal_steps": 3, "max_internal_steps": None, "kl_bound": 0}
    assert Settings.of({"bupo": node}).trains_inner


def test_the_run_lies_beside_its_checkpoints_unless_told_otherwise(tmp_path):
    config = SimpleNamespace(
        trainer=SimpleNamespace(default_local_dir=str(tmp_path / "run" / "checkpoints"))
    )
    assert Settings().directory(config) == tmp_path / "run"
    assert Settings(run_dir="elsewhere").directory(config) == Path("elsewhere")
