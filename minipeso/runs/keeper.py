"""Checkpoints while a phase trains: killed at any step, it goes on from the last one, bit for bit.

    RUN/checkpoints/PHASE           the phase is finished: its result
    RUN/checkpoints/PHASE.step-N    it is not: the state after N steps (progress.py), and what the log said so far; the
                                    newest two are kept

PHASE: item-vectors (of a Llama, until the IDs are there), semantic-ids, base, first, METHOD-stage-T.
"""
from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from minipeso import parallel
from minipeso.runs import checkpoint, disk, signals
from minipeso.runs.disk import CheckpointError
from minipeso.runs.journal import Journal
from minipeso.progress import Progress

SHARE = 0.02  # of the time, at most, goes into saving steps: the cost of a save decides when the next is due
KEPT = 2  # unfinished states of a phase, results of a method's stages


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
        """at.steps(batches), each finished, and saved if that is due, before a signal ends the process."""
        for batch in at.left(batches):
            with signals.step():
                yield batch
                at.count()
                self.save(at)
            signals.leave()

    def end_epoch(self, at: Progress, loss: float) -> None:
        with signals.step():
            at.end_epoch(loss)
            self.save(at)
        signals.leave()

    def save(self, at: Progress) -> None:
        """If it is due, or the process is about to end. What several processes do together is kept when it is
        finished: each has a random state of its own."""
        began = time.monotonic()
        if self.folder is None or parallel.size() > 1 and at.generator is None or began < Keeper.due and not signals.Request.signum:
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
