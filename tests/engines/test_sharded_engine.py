"""Two copies in Ray actors give the answers of one."""

import pytest

from entropylens.engines import open_engine
from entropylens.errors import SettingError, WeightsError
from entropylens.generation import generate
from entropylens.prompts import Prompt
from entropylens.sampling import Sampling

PROMPTS = [Prompt((5 + place,) * (1 + place % 4), "t", None, place) for place in range(9)]


@pytest.fixture(scope="module", autouse=True)
def ray():
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


def test_what_a_copy_raises_is_raised_here(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        open_engine(tmp_path, engine="hf", data_parallel=2)


def test_more_copies_than_cores_are_refused(model_directory):
    with pytest.raises(SettingError, match="1000 copies need 1000 cpus"):
        open_engine(model_directory, engine="hf", data_parallel=1000)


def test_sharding_never_changes_a_sample(model_directory):
    one = open_engine(model_directory, engine="hf")
    copies = open_engine(model_directory, engine="hf", data_parallel=2)
    assert (copies.fingerprint, copies.ends, copies.limits) == (
        one.fingerprint, one.ends, one.limits,
    )  # fmt: skip
    assert copies.settings == one.settings
    assert copies.suggested == one.suggested
    sampling = Sampling(3, 8)
    expected = generate(one, PROMPTS, sampling, progress=False)
    assert generate(copies, PROMPTS, sampling, progress=False) == expected
    copies.close()
