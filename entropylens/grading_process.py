"""A worker process of a grader as its parent sees it: asked, ended in time, and replaced."""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from entropylens.errors import EntropyLensError, SettingError
from entropylens.grading_worker import UnusableGold

__all__ = ["Worker"]

_SCRIPT = Path(__file__).with_name("grading_worker.py")
_PACKAGES = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}
_START_LIMIT = 120.0  # seconds: a cold import of SymPy on a busy machine


class Worker:
    """One process, started when first asked, and anew after its end.

    Args:
        mode: a judge of `entropylens.grading_worker`.
        time_limit: seconds an answer may take it.
    """

    def __init__(self, mode: str, time_limit: float) -> None:
        self._mode, self._time_limit = mode, time_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, answer: str | None, gold: str) -> bool:
        """Whether the answer is right; of None, whether the gold answers itself.

        Raises:
            UnusableGold: the judge can do nothing with the gold.
            TimeoutError: it took too long, and the process was ended.
            EOFError, BrokenPipeError: the process ended.
            SettingError, EntropyLensError: as `Grader.grade`.
        """
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._end()
                    self._start()
                mark = secrets.token_hex(16)  # an answer that is code may write replies of its own
                task = json.dumps({"answer": answer, "gold": gold, "mark": mark})
                reply = self._exchange(task.encode() + b"\n", self._time_limit)
                if reply.get("mark") != mark:
                    raise EOFError("no reply to this task")
            except BaseException:  # an interrupt too: a late reply must not meet the next task
                self._end()
                raise
        if "error" in reply:
            raise UnusableGold(reply["error"])
        return bool(reply["correct"])

    def stop(self) -> None:
        """End the process, under whatever it is doing."""
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def forget(self) -> None:
        """Leave the process to the parent of this forked one."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            _close_pipes(process)
            process.returncode = 0  # or it would be waited for, and missed, when collected

    def _start(self) -> None:
        command = [sys.executable, "-P", str(_SCRIPT), self._mode, str(self._time_limit)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                # Each thread of a numerical library reserves memory that counts for the limit.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
            )
            hello = self._exchange(b"", _START_LIMIT)
        except (OSError, EOFError) as error:
            raise EntropyLensError(
                f"a grading worker does not start ({str(error) or 'it ended at once'})",
                f"run {' '.join(command)!r} to see why",
            ) from error
        if "error" in hello:
            package = _PACKAGES[self._mode]
            raise SettingError(
                f"grading in mode {self._mode} needs {package} ({hello['error']})",
                f"pip install {package}",
            )

    def _exchange(self, message: bytes, seconds: float) -> dict[str, Any]:
        """Send a line, if any, and take one."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        target, source = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(target, False)  # a process that stands still fills its pipe
        while message:
            _wait_for(target, select.POLLOUT, deadline)
            message = message[os.write(target, message) :]
        line = b""
        while not line.endswith(b"\n"):
            _wait_for(source, select.POLLIN, deadline)
            part = os.read(source, 65536)
            if not part:
                raise EOFError
            line += part
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise EOFError("no reply") from error

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            _close_pipes(process)


def _wait_for(file: int, event: int, deadline: float) -> None:
    poll = select.poll()  # select() itself ends at file 1024, and Ray's processes hold many
    poll.register(file, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("it took too long")


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
