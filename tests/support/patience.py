"""Waiting for other processes and threads on a machine that may be slow or busy: only what hangs is given up."""

import subprocess
import time
from collections.abc import Callable

SECONDS = 600.0


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Until the condition holds, or the process that is to bring it about has ended."""
    deadline = time.monotonic() + SECONDS
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline, f"nothing has come of it in {SECONDS:.0f} seconds"
        time.sleep(0.005)
