"""Ray as all parts use it: started here or joined, and what it says told in one line."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from entropylens.errors import EntropyLensError, SettingError

__all__ = ["RayCluster"]

REACH_SECONDS = 10.0


class RayCluster:
    """The cluster that this process works with: the one at an address, else one of its own.

    Args:
        flag: the setting that needs it, for messages.
        address: of a running cluster, "auto" for the one of this machine; None starts one on
            127.0.0.1, unless RAY_ADDRESS names one or this process has joined one already.

    Attributes:
        ray: the package.
        lost: what is raised where an actor, or what it made, is no more.

    Raises:
        SettingError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, flag: str, address: str | None = None) -> None:
        self.flag = flag
        address = address or os.environ.get("RAY_ADDRESS")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:  # without it Ray makes the machine's own address of 127.0.0.1
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
        except ImportError as error:
            raise SettingError(f"{flag} needs Ray", "pip install ray, or leave it out") from error
        self.ray = ray
        failures = ray.exceptions
        self.lost: tuple[type[Exception], ...] = (
            failures.RayActorError,
            failures.NodeDiedError,
            failures.ObjectLostError,
            failures.OutOfMemoryError,
        )
        if ray.is_initialized():
            return
        if address is None:
            ray.init(
                address="local",  # or it would join whatever else runs on this machine
                include_dashboard=False,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
            )
            return
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False)
        except (failures.RayError, OSError, RuntimeError, ValueError) as error:
            raise SettingError(
                f"no Ray cluster answers at {address!r} ({' '.join(str(error).split())[:200]})",
                "start one with `ray start --head`, or correct --ray-address or RAY_ADDRESS",
            ) from error

    @property
    def num_gpus(self) -> float:
        """GPUs of all its machines."""
        return float(self.ray.cluster_resources().get("GPU", 0))

    def require(self, copies: int, needs: Mapping[str, float], remedy: str) -> None:
        """Refuse more actors than it can ever hold.

        Args:
            copies: how many.
            needs: of each: num_cpus, num_gpus.
            remedy: what to do about it.

        Raises:
            SettingError: so many of them are not there.
        """
        every = self.ray.cluster_resources()
        for kind, number in needs.items():
            there = every.get(kind.removeprefix("num_").removesuffix("s").upper(), 0)
            if there < copies * number:
                raise SettingError(
                    f"{copies} copies need {copies * number:g} {kind.removeprefix('num_')}, and "
                    f"{there:g} are there",
                    remedy,
                )

    def get(self, reference: Any) -> Any:
        """What an actor returns, or what it raises.

        Raises:
            EntropyLensError: as the actor raised it.
            Exception: one of `lost`.
        """
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EntropyLensError):
                raise error.cause from None
            raise


def _reach(address: str) -> None:
    """See whether anybody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
