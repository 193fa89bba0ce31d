"""Servers that experiments start as processes of their own."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request


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
