"""SIGTERM and Ctrl-C: a training step is finished and saved first, anything else ends at once.

Exit codes 143 and 130. A second signal leaves at once, wherever the process is.
"""
from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Request:
    """What has been asked of the process."""

    signum = 0  # the signal that came; 0: none
    in_step = False  # whether the loop that is running looks at `signum` itself, after its step


@contextmanager
def heard() -> Iterator[None]:
    """Inside, signals are answered as above."""
    before = {signum: signal.signal(signum, _note) for signum in (signal.SIGTERM, signal.SIGINT)}
    Request.signum, Request.in_step = 0, False
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def step() -> Iterator[None]:
    """What runs inside is finished before a signal ends the process."""
    Request.in_step = True
    try:
        yield
    finally:
        Request.in_step = False


def leave() -> None:
    """Ends the process if a signal asked for it."""
    if Request.signum:
        name = signal.Signals(Request.signum).name
        os.write(2, f"\nstopped by {name}; the same command with --resume goes on\n".encode())  # print may be at work itself
        raise SystemExit(128 + Request.signum)


def _note(signum: int, frame) -> None:
    if Request.signum:
        os._exit(128 + signum)
    Request.signum = signum
    if not Request.in_step:
        leave()
