"""How the code that reads an nnsight model travels to the server: as text.

nnsight_trace.py and the modules that it imports are sent as strings, and not by cloudpickle's
by-value pickling, since that ships the methods of dataclasses and named tuples as bytecode, which
another Python version on the server could not run.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["traced", "unpack"]

_TRACE = "entropylens.sources.nnsight_trace"

#: What `_TRACE` imports, and what these import.
_PARCEL = (
    *(
        "errors",
        "transform",
        "unembedding",
        "products",
        "policy",
        "anatomy",
        "quantities",
        "capture",
    ),
    *("readings", "control", "verification", "sources.nnsight_trace"),
)


def traced(
    model: Any, remote: bool | str, inputs: dict[str, Any], arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """Run a function of `_TRACE` in a trace.

    Every name that the block below reads is pickled with it, so that it reads text and builtin
    types only.
    """
    nnsight = importlib.import_module("nnsight")
    loader, sources, trace = _loader(), _sources(), _TRACE
    server: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with model.trace(remote=remote, **inputs):
        exec(loader, server)
        found = nnsight.save(server["unpack"](sources)(trace, *arguments))
    return found  # noqa: RET504 (nnsight binds it in this frame after the block)


def unpack(sources: Mapping[str, str]) -> Callable[..., Any]:
    """Make modules from their text, and return what calls a function of one of them.

    It travels as text itself, so that it uses builtins only. The modules go nowhere but into what
    is returned: a server's own modules stay as they are.
    """
    import builtins

    class Module:
        """A namespace to run a module's text in."""

    class Absent:
        """Stands for all of a library that is not there."""

        def __getattr__(self, name: str) -> Any:
            return Absent()

        def __getitem__(self, name: Any) -> Any:
            return Absent()

        def __call__(self, *_given: Any, **_named: Any) -> Any:
            return Absent()

    made: dict[str, Any] = {}

    def find(name: str, *where: Any) -> Any:
        if name in sources:
            return make(name)
        root = name.partition(".")[0]
        if root == "entropylens":  # a dry run must not find what a server has not
            raise ImportError(f"{name} is not among the modules that travel")
        if root in ("jaxtyping", "pandas", "scipy"):
            return Absent()
        return __import__(name, *where)

    def make(name: str) -> Any:
        if name not in made:
            made[name] = Module()
            scope = vars(made[name])
            scope["__builtins__"] = vars(builtins) | {"__import__": find}
            # dataclasses look a class's module up in sys.modules; this one is always there.
            scope["__name__"] = "builtins"
            exec(compile(sources[name], f"<{name}>", "exec"), scope)
        return made[name]

    def call(name: str, function: str, *arguments: Any) -> Any:
        return getattr(make(name), function)(*arguments)

    return call


@functools.cache
def _loader() -> str:
    return f"from __future__ import annotations\n{inspect.getsource(unpack)}"


@functools.cache
def _sources() -> dict[str, str]:
    names = [f"entropylens.{name}" for name in _PARCEL]
    return {name: inspect.getsource(importlib.import_module(name)) for name in names}
