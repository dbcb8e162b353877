"""nnsight models: unwrapped, and read inside a trace as a server would do it."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_tokenizer

import entropylens
from entropylens.anatomy import Family
from entropylens.errors import (
    DecompositionError,
    ModelAccessError,
    SettingError,
    UnknownArchitectureError,
)
from entropylens.quantities import quantities_of
from entropylens.recognition import anatomy_of
from entropylens.responses import Response
from entropylens.sources import hf, nnsight_trace
from entropylens.sources import nnsight as front
from entropylens.verification import trial_ids, verify

nnsight = pytest.importorskip("nnsight")

D_MODEL = 32
FAMILIES = (
    *("llama", "qwen3", "gemma2", "gptj", "phi", "qwen3_moe", "granite", "gpt2"),
    # An inner projection, flattened positions, two FFNs a layer, no FFN.
    *("bloom", "opt", "granitemoehybrid", "mamba"),
)


def nnsight_model(model):
    return nnsight.TransformersModel(model, task="text-generation", tokenizer=tiny_tokenizer())


@pytest.fixture
def directory(tmp_path):
    """A model as a server and its client both know it."""
    path = tmp_path / "gemma2"
    tiny_model("gemma2").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def batch_of(responses):
    """What `RemoteReader.read` takes, and the response that each position belongs to."""
    width = max(response.length for response in responses)
    input_ids = torch.zeros(len(responses), width, dtype=torch.long)
    positions, tokens, owner = [], [], []
    for row, response in enumerate(responses):
        ids = (*response.prompt_ids, *response.response_ids)[:-1]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        start = row * width + len(response.prompt_ids) - 1
        positions += range(start, start + response.num_tokens)
        tokens += response.response_ids
        owner += [row] * response.num_tokens
    batch = (input_ids, torch.tensor(positions), torch.tensor(tokens))
    return batch, torch.tensor(owner)


def assert_same(found, owner, analysis, tolerance=1e-5):
    """A reader's answer, averaged over each response, is the analysis of the local model."""
    quantities, head = found
    names = quantities_of(analysis.reading)
    assert set(quantities) == set(names)
    frame = analysis.responses
    for index in owner.unique().tolist():
        rows = frame[frame["response_id"] == index]
        for name in names:
            mean = quantities[name].double()[:, owner == index].mean(-1)
            np.testing.assert_allclose(
                mean, rows[name], atol=tolerance, rtol=tolerance, err_msg=name
            )
        policy = head.double()[owner == index].mean(0)
        expected = rows[["policy_entropy", "policy_nll"]].iloc[0]
        np.testing.assert_allclose(policy, expected, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_reads_what_hooks_read(family, responses):
    model = tiny_model(family)
    local = entropylens.analyze(model, responses, reading="both", progress=False)
    reader = front.RemoteReader(nnsight_model(model), "local")
    batch, owner = batch_of(responses)
    assert_same(reader.read(*batch, reading="both"), owner, local)
    found, expected = reader.verify(), verify(model, anatomy_of(model))
    assert found.holds
    assert found.stream_bound == expected.stream_bound
    np.testing.assert_allclose(found.stream_errors, expected.stream_errors, atol=1e-6)
    np.testing.assert_allclose(found.logits_error, expected.logits_error, atol=1e-6)


@pytest.mark.parametrize("reading", ["raw", "normed"])
def test_a_reading_is_read_alone_and_without_padding(reading, responses):
    model = tiny_model("llama")
    local = entropylens.analyze(model, responses[:1], reading=reading, seed=7, progress=False)
    (input_ids, *chosen), owner = batch_of(responses[:1])
    reader = front.RemoteReader(nnsight_model(model), "local")
    for _ in range(2):  # the second time with the control's curve of the first
        found = reader.read(input_ids, *chosen, reading=reading, seed=7)
        assert_same(found, owner, local)


def test_a_server_is_asked_no_more_often_for_samples_of_a_prompt(monkeypatch):
    """It has no cache to go on from, so prompts share its batches."""
    asked = []
    read = front.RemoteReader.read
    monkeypatch.setattr(
        front.RemoteReader, "read", lambda *args: asked.append(len(args[1])) or read(*args)
    )
    items = [Response((prompt,) * 130, (1, 2, sample)) for prompt in (3, 4) for sample in (5, 6)]
    model = tiny_model("llama")
    found = entropylens.analyze(nnsight_model(model), items, remote="local", progress=False)
    assert asked == [4]
    local = entropylens.analyze(model, items, progress=False)
    np.testing.assert_allclose(
        found.layers["entropy_layer"], local.layers["entropy_layer"], atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_bf16_model_has_the_bounds_of_its_type(family, responses):
    model = tiny_model(family, torch.bfloat16)
    local = entropylens.analyze(model, responses, reading="both", progress=False)
    reader = front.RemoteReader(nnsight_model(model), "local")
    batch, owner = batch_of(responses)
    assert_same(reader.read(*batch, reading="both"), owner, local)
    assert reader.verify().holds
    assert reader.verify().stream_bound == verify(model, anatomy_of(model)).stream_bound


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def test_no_state_comes_back(responses, monkeypatch):
    saved = []
    save = nnsight.save
    monkeypatch.setattr(nnsight, "save", lambda value: saved.append(value) or save(value))
    reader = front.RemoteReader(nnsight_model(tiny_model("llama")), "local")
    batch, _ = batch_of(responses)
    reader.read(*batch, reading="both")
    assert {tuple(tensor.shape) for tensor in tensors_in(saved)} == {(4, 47), (47, 2), (72,)}
    reader.read(*batch, reading="both")
    reader.verify()
    shapes = [tensor.shape for tensor in tensors_in(saved)]
    assert not any({D_MODEL, VOCAB} & set(shape) for shape in shapes)
    assert sum(shape == (72,) for shape in shapes) == 2  # the curve, once
    assert not list(tensors_in(saved[-1]))  # verify: plain numbers


#: NDIF's model actor, as far as a request goes, on a machine that has never seen entropylens.
SERVER = """
import sys
from pathlib import Path
import torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import _saves, dec, inc

directory, request, answer = sys.argv[1:]
torch.set_num_threads(1)
model = TransformersModel(directory, task="text-generation", dispatch=True)

class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("entropylens", "jaxtyping", "scipy", "pandas"):
            raise ImportError(f"{name} is not on the server")

sys.meta_path.insert(0, Missing())
assert not {"entropylens", "jaxtyping"} & set(sys.modules)
objects = model._remoteable_persistent_objects()
tracer = RequestModel.deserialize(Path(request).read_bytes(), objects)
inc()
try:
    tracer.execute(tracer.info.code)
    saves = _saves()
    found = {k: v for k, v in tracer.info.frame.f_locals.items() if id(v) in saves}
finally:
    dec()
torch.save(found, answer)
assert "entropylens" not in sys.modules
"""


@pytest.fixture
def elsewhere(directory, monkeypatch, tmp_path):
    """nnsight's remote backend, with a process of its own instead of the network."""
    from nnsight.intervention.backends.remote import RemoteBackend

    sizes = []

    class Elsewhere(RemoteBackend):
        def request(self, _request, tracer):
            self.compress = False
            request, answer = tmp_path / "request", tmp_path / "answer"
            request.write_bytes(self._serialize(tracer))
            sizes.append(request.stat().st_size)
            arguments = [sys.executable, "-c", SERVER, directory, request, answer]
            done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
            return torch.load(answer, weights_only=False)

    monkeypatch.setattr(
        nnsight.TransformersModel, "_remote_backend", lambda *_: Elsewhere("model:key")
    )
    return sizes


def test_a_server_needs_no_entropylens_and_a_client_no_weights(directory, elsewhere, responses):
    client = nnsight.TransformersModel(str(directory), task="text-generation")
    reader = front.RemoteReader(client, True)
    assert reader.anatomy.unembedding.weight.is_meta
    assert not hasattr(client._module.lm_head, "_hf_hook")
    batch, owner = batch_of(responses)
    found = reader.read(*batch, reading="both")
    model = hf.load(directory).model
    model.set_attn_implementation("sdpa")  # as that server runs it
    local = entropylens.analyze(model, responses, reading="both", progress=False)
    assert_same(found, owner, local)
    assert reader.verify().holds
    assert not client.dispatched
    assert max(elsewhere) < 1_000_000  # text, not weights


def test_the_local_dry_run_loads_the_weights(directory, responses):
    client = nnsight.TransformersModel(str(directory), task="text-generation")
    reader = front.RemoteReader(client, "local")
    assert client.dispatched
    assert reader.verify().holds


class Distant:
    """An envoy where NDIF runs a request apart from the model: values, but no module."""

    _module = None

    def __init__(self, envoy):
        self._envoy = envoy

    inputs = property(lambda self: self._envoy.inputs)
    output = property(
        lambda self: self._envoy.output,
        lambda self, value: setattr(self._envoy, "output", value),
    )

    def __call__(self, *args):
        return self._envoy(*args)


def distant(sites):
    if isinstance(sites, nnsight.Envoy):
        return Distant(sites)
    if isinstance(sites, dict):
        return {name: distant(value) for name, value in sites.items()}
    if isinstance(sites, list | tuple):
        return type(sites)(distant(value) for value in sites)
    return sites


@pytest.mark.parametrize("family", ["gemma2", "phi", "gptj"])
def test_a_process_without_weights_asks_the_model(family, responses):
    model = tiny_model(family)
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    outer = nnsight_model(model)
    reader = front.RemoteReader(outer, "local")
    (input_ids, positions, tokens), _ = batch_of(responses)
    expected, expected_head = reader.read(input_ids, positions, tokens, reading="both")
    sites = distant(reader._sites)
    request = {"positions": positions, "tokens": tokens, "reading": "both", "control": False}
    request["seed"] = 0
    with outer.trace(input_ids=input_ids, use_cache=False):
        found = nnsight.save(nnsight_trace.read(sites, request))
    for name, values in found["quantities"].items():
        there = ~expected[name].isnan()
        torch.testing.assert_close(values[there], expected[name][there], atol=1e-5, rtol=1e-5)
    # With a bias, (w + b) - b is w up to float32 rounding.
    torch.testing.assert_close(found["head"], expected_head, atol=1e-5, rtol=1e-5)
    ids = trial_ids(VOCAB, 16).repeat(2, 1)
    with outer.trace(input_ids=ids, use_cache=False):
        checked = nnsight.save(nnsight_trace.verify(sites, {"length": 16}))
    assert checked["logits_error"] < 1e-6
    assert max(checked["stream_errors"]) < 1e-6
    assert checked["ffn_reads_attention"] == (family == "gemma2")


def test_a_decomposition_that_does_not_hold_is_seen_in_the_trace(monkeypatch):
    model = tiny_model("llama")
    reader = front.RemoteReader(nnsight_model(model), "local")
    reader._sites["scale"] = 0.5
    with pytest.raises(DecompositionError, match="layer 1: stream_in"):
        reader.verify().raise_if_broken()


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_wrong_order_of_branches_is_seen_in_the_trace(family, monkeypatch):
    from dataclasses import replace

    model = tiny_model(family)
    right = anatomy_of(model)
    wrong = replace(right, parallel=not right.parallel)
    monkeypatch.setattr(front, "anatomy_of", lambda _model: wrong)
    found = front.RemoteReader(nnsight_model(model), "local").verify()
    assert not found.middle_as_said
    with pytest.raises(DecompositionError, match="run in parallel"):
        found.raise_if_broken()


def test_modules_out_of_order_are_a_clear_error(monkeypatch):
    from dataclasses import replace

    model = tiny_model("llama")
    right = anatomy_of(model)
    swapped = replace(right, attention=right.ffn, ffn=right.attention)
    monkeypatch.setattr(front, "anatomy_of", lambda _model: swapped)
    with pytest.raises(DecompositionError, match="was not called where"):
        front.RemoteReader(nnsight_model(model), "local").verify()


def test_unwrap_gives_the_model_as_it_came(responses):
    plain, wrapped = tiny_model("llama"), tiny_model("llama")
    outer = nnsight_model(wrapped)
    outer._module.train()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    modes = [module.training for module in wrapped.modules()]
    hooks = [len(module._forward_hooks) for module in wrapped.modules()]
    model, tokenizer = front.unwrap(outer)
    assert model is wrapped
    assert tokenizer is outer.tokenizer
    subject = hf.wrap(model, tokenizer)
    assert subject.verification.holds
    found = entropylens.analyze(model, responses, reading="both", progress=False)
    expected = entropylens.analyze(plain, responses, reading="both", progress=False)
    for name in quantities_of("both"):
        np.testing.assert_allclose(found.layers[name], expected.layers[name], atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in wrapped.state_dict().items())
    assert modes == [module.training for module in wrapped.modules()]
    assert hooks == [len(module._forward_hooks) for module in wrapped.modules()]
    with outer.trace(torch.tensor([[1, 2, 3]])):
        hidden = outer.model.layers[0].output.save()
    assert hidden.shape == (1, 3, D_MODEL)


def test_nnsight_models_are_known_by_their_type():
    model = tiny_model("llama")
    assert not front.is_nnsight(model)
    assert not front.is_nnsight("nnsight/model")
    assert front.is_nnsight(nnsight.NNsight(model))
    assert front.unwrap(nnsight.NNsight(model)) == (model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nnsight.LanguageModel(tiny_model("llama"), tokenizer=tiny_tokenizer())
    assert front.is_nnsight(old)
    model, tokenizer = front.unwrap(old)
    assert model is old._module
    assert tokenizer is old.tokenizer


def test_the_front_door_does_not_import_nnsight():
    code = "import sys, entropylens.sources.nnsight as front; front.is_nnsight(1); "
    code += "assert 'nnsight' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_without_weights_says_what_to_do(directory):
    client = nnsight.TransformersModel(str(directory), task="text-generation")
    with pytest.raises(SettingError, match="dispatch=True, or pass remote=True"):
        front.unwrap(client)
    assert not client.dispatched


def test_edits_are_refused_by_hooks_and_read_by_traces(responses):
    model = nnsight_model(tiny_model("llama"))
    reader = front.RemoteReader(model, "local")
    batch, _ = batch_of(responses)
    before, _ = reader.read(*batch)
    with model.edit(inplace=True):
        model.model.layers[1].mlp.output[:] = 0
    with pytest.raises(SettingError, match="clear_edits"):
        front.unwrap(model)
    after, _ = reader.read(*batch)
    assert (before["rms_ffn"][1] > 0).all()
    assert (after["rms_ffn"][1] == 0).all()


def test_what_is_no_language_model_of_nnsight_is_refused():
    with pytest.raises(SettingError, match="wrap it: nnsight"):
        front.RemoteReader(tiny_model("llama"), True)
    with pytest.raises(SettingError, match="wrap it: nnsight"):
        front.RemoteReader(nnsight.NNsight(tiny_model("llama")), True)
    with pytest.raises(SettingError, match="wraps a Linear"):
        front.unwrap(nnsight.NNsight(torch.nn.Linear(2, 2)))


def test_a_missing_nnsight_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(SettingError, match=r"pip install 'entropylens\[nnsight\]'"):
        front.RemoteReader(tiny_model("llama"), True)


def test_a_module_out_of_nnsights_reach_is_named(monkeypatch):
    model = nnsight_model(tiny_model("llama"))
    hidden = model._module.model.layers[2].mlp
    envoys = [envoy for envoy in model.modules() if envoy._module is not hidden]
    monkeypatch.setattr(type(model), "modules", lambda _self: envoys)
    with pytest.raises(SettingError, match=r"does not reach 'model\.layers\.2\.mlp'"):
        front.RemoteReader(model, "local")


def test_an_unknown_family_is_refused_with_the_call_to_paste(monkeypatch):
    model = nnsight_model(tiny_model("llama"))
    monkeypatch.setattr("entropylens.recognition.family_of", lambda _name: None)
    with pytest.raises(UnknownArchitectureError, match=Family.__name__):
        front.RemoteReader(model, "local")


def test_a_server_out_of_reach_is_a_clear_error(monkeypatch):
    model = nnsight_model(tiny_model("llama"))
    monkeypatch.setattr(type(model), "to_model_key", lambda _self: "model:key")
    reader = front.RemoteReader(model, "http://127.0.0.1:9")
    with pytest.raises(ModelAccessError, match="the server did not run the trace"):
        reader.verify()
