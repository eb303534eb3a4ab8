"""How benchmarks measure: contenders take turns, in this process or each in one of its own, and ratios are of pairs."""
from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

RAN = "python exited with {code}\n{command}\nits message stands above"


class Child(NamedTuple):
    """What one process took, and what it said last: a line of JSON."""

    seconds: float
    peak: int  # bytes resident, at most; 0 if it does not say
    said: dict


def machine(*modules) -> str:
    """The line above every table: cores, Python, versions."""
    versions = [f"{module.__name__} {module.__version__}" for module in modules]
    return ", ".join([f"{os.cpu_count()} cores; Python {platform.python_version()}", *versions])


def refuse(verb: str, found: object) -> NoReturn:
    raise FloatingPointError(f"the contenders do not {verb} the same\n{found}\ntimings of different work mean nothing")


def compare(runs: dict[str, Callable], rounds: int, wait: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Seconds of every contender in every round: they take turns, in alternating order, once to warm up."""
    seconds = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in list(runs)[::-1 if turn % 2 else 1]:
            wait()
            began = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


def child(module: str, *arguments: str) -> Child:
    """`python -m module arguments` to its end; RuntimeError if that is not a good one. Its last line of
    output is JSON; "seconds" and "peak" there are its own account of the work alone."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(RAN.format(code=done.returncode, command=" ".join(command)))
    said = json.loads(done.stdout.splitlines()[-1])
    return Child(said.get("seconds", time.perf_counter() - began), said.get("peak", 0), said)


def compare_children(module: str, contenders: dict[str, tuple], rounds: int) -> dict[str, list[Child]]:
    """Every contender (its arguments) in every round, each in a new process, in alternating order."""
    found = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[::-1 if turn % 2 else 1]:
            found[name].append(child(module, *contenders[name]))
    return found


def peak() -> int:
    """The most bytes that this process has had resident (Linux; getrusage would count its parent's too)."""
    return _resident("VmHWM")


def peak_of(run: Callable) -> int:
    """The bytes that run() needs above what is resident before it (Linux: the high-water mark is reset)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(mark: str) -> int:
    return int(re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def lines(seconds: dict[str, list[float]], count: float, unit: str) -> list[str]:
    """A line for every contender: median time, rate, and the ratio to the first one in each round."""
    first, shown = next(iter(seconds.values())), []
    for name, times in seconds.items():
        ratio = [theirs / ours for theirs, ours in zip(times, first)]
        shown.append(f"{name:29}{np.median(times) * 1e3:10.1f} ms {count / np.median(times):10,.1f} {unit}/s   "
                     f"{np.median(ratio):6.2f} x ours [{min(ratio):.2f}, {max(ratio):.2f}]")
    return shown
