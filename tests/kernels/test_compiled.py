import logging

import pytest
import torch

from entropylens.kernels import compiled
from entropylens.transform import IDENTITY


def test_small_work_is_not_worth_compiling():
    assert compiled.select_body("auto", torch.device("cpu"), 1e6).name == "eager"


def test_without_a_compiler_the_eager_body_runs_and_says_so(monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(compiled.CompiledBody, "__call__", broken)
    compiled._compiled.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            body = compiled.select_body("auto", torch.device("cpu"), 1e15)
    finally:
        compiled._compiled.cache_clear()
    assert body.name == "eager"
    assert "no C++ compiler" in caplog.text
    assert "apt install g++" in caplog.text


@pytest.mark.parametrize("positions", [1, 2, 65])
def test_bodies_leave_their_arguments_alone(positions):
    for kernel in ("eager", "compiled"):
        body = compiled.select_body(kernel, torch.device("cpu"), 1e15)
        linear, probs = torch.randn(positions, 33), torch.rand(positions, 33)
        copies = linear.clone(), probs.clone()
        body(linear, None, IDENTITY, probs)
        assert torch.equal(linear, copies[0])
        assert torch.equal(probs, copies[1])
