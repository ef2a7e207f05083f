"""SIGTERM as launchers send it: often twice, to the whole group and then by the launcher to each of its ranks."""

import signal
import time
from typing import Any

PASSED_ON = 35.0
"""Seconds after the first one in which others count as that one; launchers send SIGKILL after 30."""


def expect_it_again() -> None:
    """Local, when one has been taken note of: from now on another one ends the process if it is one of its own."""
    first = time.monotonic()

    def again(number: int, frame: Any) -> None:
        if time.monotonic() - first > PASSED_ON:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, again)
