"""SIGTERM and SIGINT as a request to finish the step, save and leave."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(SystemExit):
    """SIGTERM or SIGINT ended the run early; the exit code is 128 + the signal's number.

    >>> Preempted("stopped after step 3", signal.SIGTERM).code
    143
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.message = f"{message} ({signal.Signals(signal_number).name})"

    def __str__(self) -> str:
        return self.message


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGTERM or SIGINT; the handlers that were there take a second signal.

    Python runs handlers in the main thread alone: in any other nothing is installed.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def receive(number: int, _: Any) -> None:
        received.append(number)
        restore()
        # Not logging: a handler may interrupt a write that holds the logging lock.
        os.write(2, b"\nstopping: this step is finished and saved first; again to abort at once\n")

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
