"""Servers that experiments start as processes of their own."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence


def free_port() -> int:
    """Returns a port of loopback that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_up(process: subprocess.Popen[bytes], url: str, name: str, limit_s: float = 60.0) -> None:
    """Returns when the server of a process answers at ``url``.

    Raises:
      AssertionError: the process has ended.
      TimeoutError: it does not answer within ``limit_s``.
    """
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        assert process.poll() is None, f"{name} has ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{name} does not answer")


class EngineProcess:
    """A server of one model on a port of its own; it can be killed and started again."""

    def __init__(
        self, name: str, port: int, command: Sequence[str], environment: Mapping[str, str], limit_s: float = 60.0
    ) -> None:
        """Starts nothing yet.

        Args:
          name: of the model.
          port: that the command listens to.
          command: to run in the root of the repository.
          environment: variables that it has besides those of this process.
          limit_s: s that it may take until /health answers.
        """
        self.name, self.port = name, port
        self._command, self._environment, self._limit_s = command, environment, limit_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        self._process = subprocess.Popen(
            self._command,
            cwd=pathlib.Path(__file__).parents[1],
            env=os.environ | self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until_up(self._process, f"{self.url}/health", self.name, self._limit_s)

    def kill(self) -> None:
        """Kills it with all that it has started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
