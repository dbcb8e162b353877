"""nnsight models: a local one is read with plain hooks, a remote one inside its trace.

From a server (NDIF) the states never come back: a trace reads them, reduces them to
[layers, positions] floats beside the model (nnsight_trace.py), and returns these.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entropylens.anatomy import Anatomy, Branch
from entropylens.capture import evaluating
from entropylens.control import NormControl
from entropylens.errors import DecompositionError, ModelAccessError, SettingError
from entropylens.readings import blank_absent
from entropylens.recognition import anatomy_of
from entropylens.sources.nnsight_parcel import traced
from entropylens.sources.subject import Subject
from entropylens.verification import TRIAL_TOKENS, Verification, bounds, trial_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RemoteReader", "connect", "is_nnsight", "unwrap"]


def is_nnsight(model: object) -> bool:
    """Whether a model is nnsight's, without importing it."""
    return any(kind.__module__.partition(".")[0] == "nnsight" for kind in type(model).__mro__)


def unwrap(model: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The Hugging Face model in a local nnsight model, and its tokenizer; nothing is changed.

    Raises:
        SettingError: it has no weights here, or edits that plain hooks would pass by, or wraps
            something else.
    """
    if not getattr(model, "dispatched", True):
        raise SettingError(
            f"the nnsight model {_name(model)!r} has no weights on this machine",
            "make it with dispatch=True, or pass remote=True to have a server run it",
        )
    if model._edits:
        raise SettingError(
            f"the nnsight model {_name(model)!r} has edits, which are not applied outside a trace",
            "clear them (model.clear_edits()), or pass remote='local' to read the edited model",
        )
    tokenizer: PreTrainedTokenizerBase | None = vars(model).get("tokenizer")
    return _hugging_face(model), tokenizer


def connect(
    model: Any, remote: bool | str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Subject:
    """Verify a model that a server runs, for reading it there; see `RemoteReader`.

    Raises:
        NonFiniteStatesError, DecompositionError: as `Verification.raise_if_broken`.
        SettingError, ModelAccessError, UnknownArchitectureError: as `RemoteReader`.
    """
    from entropylens.sources.hf import warn_of_missing_cap

    warn_of_missing_cap(_hugging_face(model).config)
    reader = RemoteReader(model, remote)
    verification = reader.verify()
    verification.raise_if_broken()
    return Subject(
        name=_name(model),
        revision=model.revision,
        model=_hugging_face(model),
        tokenizer=tokenizer or model.tokenizer,
        anatomy=reader.anatomy,
        verification=verification,
        remote=reader,
    )


class RemoteReader:
    """Reads an nnsight model inside its traces.

    Args:
        model: an `nnsight.TransformersModel`; it needs no weights where a server runs it.
        remote: True or a server's URL for NDIF; "local" for a dry run of the same on this machine.

    Attributes:
        anatomy: bound to the modules that are here; of a model without weights E_u is on the meta
            device.

    Raises:
        SettingError: no nnsight, no nnsight model, or one whose modules cannot be reached.
        NotADecoderError, UnknownArchitectureError: as `anatomy_of`.
    """

    def __init__(self, model: Any, remote: bool | str) -> None:
        _nnsight()
        if not is_nnsight(model) or not hasattr(type(model), "to_model_key"):
            raise SettingError(
                f"remote={remote!r} was passed with a {type(model).__name__}",
                "wrap it: nnsight.TransformersModel(repo_id, task='text-generation')",
            )
        if not remote:
            raise SettingError(f"remote is {remote!r}", "pass True, 'local' or a server's URL")
        if remote == "local":
            model.dispatch()
        self.model, self.remote = model, remote
        inner = _hugging_face(model)
        with _readable(inner):
            self.anatomy: Anatomy = anatomy_of(inner)
            self.anatomy.unembedding  # noqa: B018  (kept from now on, when it can be read)
        self._sites = _sites(model, inner, self.anatomy)
        self._controls: dict[int, NormControl] = {}
        takes = inspect.signature(type(inner).forward).parameters
        self._frugal = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def verify(self) -> Verification:
        """Do the states of the running model add up, on a trial input?

        Raises:
            ModelAccessError: the server did not run the trace.
            DecompositionError: its modules are not called in the order of the family's spec.
        """
        context, vocab_size = self.anatomy.context, self.anatomy.unembedding.vocab_size
        length = TRIAL_TOKENS if context is None else min(TRIAL_TOKENS, context)
        ids = trial_ids(vocab_size, length).repeat(2, 1)
        found = self._run("verify", {"length": length}, {"input_ids": ids})
        dtype: torch.dtype = getattr(torch, found["dtype"])
        stream_bound, logits_bound = bounds(dtype, self.anatomy.num_layers)
        return Verification(
            stream_errors=tuple(found["stream_errors"]),
            logits_error=found["logits_error"],
            stream_bound=stream_bound,
            logits_bound=logits_bound,
            middle_as_said=found["ffn_reads_attention"] in (None, not self.anatomy.parallel),
            dtype=dtype,
        )

    def read(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        positions: Int[Tensor, " positions"],
        tokens: Int[Tensor, " positions"],
        reading: str = "raw",
        seed: int = 0,
    ) -> tuple[dict[str, Float[Tensor, "layers positions"]], Float[Tensor, "positions 2"]]:
        """Every quantity of a reading at some positions of a batch, padded on the right.

        Args:
            input_ids: token ids.
            positions: indices into the flattened [batch * sequence].
            tokens: the token produced at each position.
            reading: raw | normed | both.
            seed: of the same-norm control.

        Returns:
            The quantities, and pi_theta's entropy and NLL.

        Raises:
            ModelAccessError, DecompositionError: as `verify`.
        """
        wants_control = reading != "normed"
        request = {
            "positions": positions,
            "tokens": tokens,
            "reading": reading,
            "seed": seed,
            "control": wants_control and seed not in self._controls,
        }
        found = self._run("read", request, {"input_ids": input_ids, **self._frugal})
        quantities = found["quantities"]
        if found["curve"] is not None:
            log_norms, entropies = found["curve"]
            d_model = self.anatomy.unembedding.d_model
            self._controls[seed] = _Joined(log_norms, entropies, d_model)
        if wants_control:
            quantities |= self._controls[seed].deltas(quantities)
        blank_absent(quantities, self.anatomy)
        return quantities, found["head"]

    def _run(
        self, function: str, request: dict[str, Any], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        inputs["use_cache"] = False
        arguments = (function, self._sites, request)
        with torch.no_grad(), evaluating(self.model._module), _explained(self.remote):
            return traced(self.model, self.remote, inputs, arguments)


class _Joined(NormControl):
    """A control whose curve was computed on the server."""

    def __init__(
        self,
        log_norms: Float[Tensor, " points"],
        entropies: Float[Tensor, " points"],
        d_model: int,
    ) -> None:
        self._root_width = math.sqrt(d_model)
        self._nodes, self._entropies = log_norms.numpy(), entropies.numpy()
        self._known = range(len(log_norms))


def _sites(model: Any, inner: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """The envoys of an anatomy's modules, as nnsight_trace.py takes them."""
    envoys = {id(envoy._module): envoy for envoy in model.modules()}
    paths = {id(module): path for path, module in inner.named_modules()}
    order = {key: number for number, key in enumerate(paths)}

    def envoy_of(module: Any) -> Any:
        if id(module) not in envoys:
            raise SettingError(
                f"nnsight does not reach {paths.get(id(module), type(module).__name__)!r}",
                "read the model without it: pass the Hugging Face model itself",
            )
        return envoys[id(module)]

    def branch_of(branch: Branch | None) -> tuple[Any, list[Any]] | None:
        if branch is None:
            return None
        # Several modules read the same. The one called first is registered first, and what the
        # model has passed cannot be read any more.
        adds = sorted(branch.adds, key=lambda module: order[id(module)])
        reads = adds[0] if branch.reads in adds else branch.reads
        return envoy_of(reads), [envoy_of(module) for module in adds]

    transform = anatomy.unembedding.transform
    unembedding: Any = inner
    return {
        "model": envoy_of(inner),
        "layers": [envoy_of(layer) for layer in anatomy.layers],
        "attn": [branch_of(branch) for branch in anatomy.attention],
        "ffn": [branch_of(branch) for branch in anatomy.ffn],
        "final_norm": envoy_of(anatomy.final_norm),
        "unembedding": envoy_of(unembedding.get_output_embeddings()),
        "scale": anatomy.residual_scale,
        "parallel": anatomy.parallel,
        "transform": (transform.scale, transform.softcap),
        "vocab_size": anatomy.unembedding.vocab_size,
    }


def _hugging_face(model: Any) -> PreTrainedModel:
    inner = model._module
    if hasattr(inner, "get_base_model"):  # a PeftModel; its layers stand in the base model
        inner = inner.get_base_model()
    if not hasattr(inner, "get_output_embeddings"):
        raise SettingError(
            f"nnsight wraps a {type(inner).__name__} here, no Hugging Face language model",
            "wrap one: nnsight.TransformersModel(repo_id, task='text-generation')",
        )
    return inner


@contextmanager
def _readable(model: PreTrainedModel) -> Iterator[None]:
    """Let a model without weights have its unembedding's shape read, as an offloaded one has."""
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_meta or hasattr(head, "_hf_hook"):
        yield
        return
    parameters = dict(head.named_parameters())
    head._hf_hook = SimpleNamespace(weights_map=parameters, execution_device="meta")
    try:
        yield
    finally:
        del head._hf_hook


def _nnsight() -> Any:
    try:
        return importlib.import_module("nnsight")
    except ModuleNotFoundError as error:
        raise SettingError(
            "remote= needs nnsight, which is not installed", "pip install 'entropylens[nnsight]'"
        ) from error


@contextmanager
def _explained(remote: bool | str) -> Iterator[None]:
    """Turn what nnsight raises into what the user can do about it."""
    out_of_order = importlib.import_module("nnsight.intervention.interleaver").OutOfOrderError
    try:
        yield
    except out_of_order as error:
        raise DecompositionError(
            f"a module was not called where the family's spec has it ({error})",
            "name the modules that are, with entropylens.register(), in the order of their calls",
        ) from error
    except Exception as error:  # the Hub's, httpx's, websocket's or what the server says
        if remote == "local":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelAccessError(
            f"the server did not run the trace ({lines[-1][:300]})",
            "check the model's Hub id, the API key (nnsight.login()) and that the model is up "
            "(nnsight.status())",
        ) from error


def _name(model: Any) -> str:
    return vars(model).get("repo_id") or type(model._module).__name__
