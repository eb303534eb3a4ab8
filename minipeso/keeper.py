"""Checkpoints while a phase trains: killed at any step, it goes on from the last one, bit for bit.

    RUN/checkpoints/PHASE           the phase is finished: its result. PHASE: base, first, METHOD-stage-T
    RUN/checkpoints/PHASE.step-N    it is not: the state after N steps; the newest two are kept

The order of the data and the rate are functions of the position, so the state is: parameters, AdamW's
moments, the best epoch's parameters, dropout's random state, the position, and what the log said so far.
"""
from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeso import checkpoint, disk, parallel, signals
from minipeso.disk import CheckpointError
from minipeso.journal import Journal

SHARE = 0.02  # of the time, at most, goes into saving steps: the cost of a save decides when the next is due
KEPT = 2  # unfinished states of a phase, results of a method's stages


@dataclass
class Progress:
    """How far training has come, and all that decides how it goes on."""

    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    epoch: int = 0
    done: int = 0  # steps of this epoch
    step: int = 0  # of all epochs
    lowest: float = math.inf  # validation loss
    best: dict[str, Tensor] = field(default_factory=dict)  # the parameters that had it
    random: dict[str, Tensor] = field(default_factory=dict)  # dropout's state, where an epoch is to be gone on with

    def end_epoch(self, loss: float) -> None:
        if loss < self.lowest:
            self.lowest, self.best = loss, {name: p.detach().clone() for name, p in self.parameters.items()}
        self.epoch, self.done = self.epoch + 1, 0

    def take_best(self) -> None:
        for name, kept in self.best.items():
            self.parameters[name].data.copy_(kept)

    def packed(self) -> tuple[dict[str, Tensor], dict]:
        tensors = {f"parameter/{name}": p for name, p in self.parameters.items()}
        tensors |= {f"best/{name}": p for name, p in self.best.items()}
        tensors |= {f"adam/{key}/{name}": t for name, p in self.parameters.items()
                    for key, t in self.optimiser.state[p].items()}
        tensors |= {f"random/{device}": t for device, t in random_state().items()}
        return tensors, {"epoch": self.epoch, "done": self.done, "step": self.step,
                         "lowest": self.lowest if self.best else None}

    @torch.no_grad()
    def unpack(self, tensors: dict[str, Tensor], facts: dict) -> None:
        for name, p in self.parameters.items():
            p.copy_(tensors[f"parameter/{name}"])
            self.optimiser.state[p] = {key: tensors[f"adam/{key}/{name}"].to(p.device)
                                       for key in ("step", "exp_avg", "exp_avg_sq")}
        self.epoch, self.done, self.step = facts["epoch"], facts["done"], facts["step"]
        if facts["lowest"] is not None:
            self.lowest = facts["lowest"]
            self.best = {name: tensors[f"best/{name}"].to(p.device) for name, p in self.parameters.items()}
        self.random = {device: tensors[f"random/{device}"] for device in random_state()}


def random_state() -> dict[str, Tensor]:
    """torch's, of every device that dropout may draw from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class Keeper:
    """Saves one phase, and finds what an earlier start saved of it. Without a folder it does neither."""

    due = 0.0  # when the next step may be saved, for all phases together

    def __init__(self, folder: Path | None = None, phase: str = "", settings: str = "", journal: Journal | None = None):
        self.folder, self.phase, self.settings, self.journal = folder, phase, settings, journal

    def begin(self, at: Progress) -> Progress:
        """`at`, or where an earlier start had come to."""
        saved = self.states()
        if saved:
            at.unpack(*self.read(saved[-1]))
        return at

    def steps(self, at: Progress, batches: Iterable) -> Iterator:
        """What is left of an epoch's batches, each counted when its step is done. Dropout's random state is
        restored as the last thing before the first."""
        left = islice(batches, at.done, None)
        if at.done:
            set_random_state(at.random)
        for batch in left:
            with signals.step():
                yield batch
                at.done, at.step = at.done + 1, at.step + 1
                self.save(at)
            signals.leave()

    def end_epoch(self, at: Progress, loss: float) -> None:
        with signals.step():
            at.end_epoch(loss)
            self.save(at)
        signals.leave()

    def save(self, at: Progress) -> None:
        """If it is due, or the process is about to end. With several processes only finished phases are
        kept: each has a random state of its own."""
        began = time.monotonic()
        if self.folder is None or parallel.size() > 1 or began < Keeper.due and not signals.Request.signum:
            return
        self.write(f"{self.phase}.step-{at.step}", *at.packed())
        for old in self.states()[:-KEPT]:
            disk.remove(old)
        now = time.monotonic()
        Keeper.due = now + (now - began) / SHARE

    def finish(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """The phase is done: its result takes the place of its steps."""
        self.write(self.phase, tensors, facts)
        for old in self.states():
            disk.remove(old)

    def finished(self) -> tuple[dict[str, Tensor], dict] | None:
        """The result of a finished phase."""
        place = self.folder / self.phase
        return self.read(place) if place.is_dir() else None

    def states(self) -> list[Path]:
        """Unfinished states of the phase, the newest last."""
        return numbered(self.folder, f"{self.phase}.step-") if self.folder else []

    def write(self, name: str, tensors: dict[str, Tensor], facts: dict) -> None:
        said = {"log": self.journal.text, "seconds": self.journal.seconds()}
        checkpoint.write(self.folder / name, tensors, facts | said | {"settings": self.settings})

    def read(self, place: Path) -> tuple[dict[str, Tensor], dict]:
        """A checkpoint of this very run; the log says again what it had said until then."""
        tensors, facts = checkpoint.read(place)
        if facts["settings"] != self.settings:
            raise CheckpointError(f"{place} was made with other settings\nthey have the hash {facts['settings']}, this "
                                  f"run's {self.settings}\ndelete it, or start anew without --resume")
        self.journal.replay(facts["log"], facts["seconds"])
        return tensors, facts


def numbered(folder: Path, prefix: str) -> list[Path]:
    """The checkpoints prefix1, prefix2, ... in `folder`, in the order of their numbers."""
    found = {path.name.removeprefix(prefix): path for path in folder.glob(f"{prefix}*")}
    return [found[n] for n in sorted((n for n in found if n.isdigit()), key=int)]
