"""How every race is measured: contenders take turns, in this process or each in a new one, and ratios are of rounds."""
from __future__ import annotations

import importlib
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from minipeso.config import UsageError


class Took(NamedTuple):
    """One contender in one round; memory and result are known of a process of its own."""
    seconds: float
    peak: int = 0  # bytes resident, at most
    above: int = 0  # of these, above what was resident before
    made: Any = None


def peers(*names: str) -> list:
    """The modules, which are test extras; UsageError if one is missing."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UsageError(f"the benchmark's peers are missing\n{error}\npip install -e '.[test]'") from error


def machine(*modules) -> str:
    """The line above every table: cores, Python, threads, versions."""
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, *modules))
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}"


def refuse(verb: str, difference: object) -> NoReturn:
    raise FloatingPointError(f"the contenders do not {verb} the same\n{difference}\n"
                             "timings of different work mean nothing")


def same(verb: str, took: dict[str, list[Took]]) -> object:
    """What all contenders made in every round; FloatingPointError if one made something else."""
    made = {name: {one.made for one in rounds} for name, rounds in took.items()}
    if len(set().union(*made.values())) != 1:
        refuse(verb, made)
    return made.popitem()[1].pop()


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def same_training(contenders: list[tuple[nn.Module, Callable]], data: list) -> list[float]:
    """The largest relative differences of losses and gradients; FloatingPointError if beyond rounding. A contender is
    (model, its loss on an element of data); all list what they train in the same order."""
    sides = []
    for model, loss_of in contenders:
        losses = [loss_of(some) for some in data]
        grads = [g.flatten() for loss in losses for g in torch.autograd.grad(loss, trainable(model))]
        sides.append((torch.stack(losses).detach(), torch.cat(grads)))
    apart = [torch.stack([(x - first).norm() / first.norm() for x in others]).max().item()
             for first, *others in zip(*sides)]
    if not (apart[0] <= 1e-5 and apart[1] <= 1e-4):
        refuse("train", "loss differs by {:.1e}, gradient by {:.1e}".format(*apart))
    return apart


def here(run: Callable) -> Took:
    """In this process; a GPU is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return Took(time.perf_counter() - began)


def child(job: tuple) -> Took:
    """In a new process, of a job (prepare, *arguments) with prepare(*arguments) -> (run, digest): the time and memory
    of run(), and digest(what it returned)."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measured, *job).result()


def measured(prepare: Callable, *arguments) -> Took:
    (run, digest), made = prepare(*arguments), []
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back (Linux)
    before = _resident("VmRSS")
    seconds = here(lambda: made.append(run())).seconds
    peak = _resident("VmHWM")  # getrusage would count the parent's too
    return Took(seconds, peak, peak - before, digest(*made))


def _resident(mark: str) -> int:
    return int(re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def compare(runs: dict[str, Any], rounds: int, measure: Callable[[Any], Took] = here) -> dict[str, list[Took]]:
    """Every contender in every round, in alternating order; in this process one round more, to warm up."""
    warm = measure is here
    took = {name: [] for name in runs}
    for turn in range(rounds + warm):
        for name in list(runs)[::-1 if turn % 2 else 1]:
            took[name].append(measure(runs[name]))
    return {name: some[warm:] for name, some in took.items()}


def table(took: dict[str, list[Took]], count: float, unit: str,
          note: Callable[[list[Took]], str] = lambda rounds: "") -> str:
    """A line per contender: median time, rate, the ratio to the first one in each round, and a note."""
    leader, lines = next(iter(took)), []
    for name, rounds in took.items():
        seconds = np.median([one.seconds for one in rounds])
        ratio = [one.seconds / its.seconds for one, its in zip(rounds, took[leader])]
        lines.append(f"{name:29}{seconds * 1e3:12,.3f} ms {count / seconds:12,.1f} {unit}/s   "
                     f"{np.median(ratio):6.2f} x {leader} [{min(ratio):.2f}, {max(ratio):.2f}]{note(rounds)}")
    return "\n".join(lines)
