"""Checkpoints: what a run has finished lies on the disk whole and with hashes, or not at all.

    RUN/checkpoints/PHASE            a finished phase: state.safetensors, facts.json; manifest.json has their hashes
    RUN/checkpoints/PHASE.epoch-N    an unfinished one after N epochs; the newest two are kept

A file or folder is called .NAME.part-PID until it is complete, then renamed. A signal waits until the epoch is finished
and saved; a kill costs at most one epoch (or 2 % of the time, where epochs are shorter than saving them).
PHASE: item-vectors, semantic-ids, base, LoRA-stage-1 (D_1), METHOD-stage-T. Of several processes the first writes."""
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minipeso import parallel
from minipeso.runs.log import Log
from minipeso.state import Epochs, Progress

PART = re.compile(r"\..+\.part-\d+")
SHARE = 0.02  # of the time, at most, goes into saving epochs
KEPT = 2  # states of an unfinished phase, finished stages of a method


class CheckpointError(Exception):
    """A checkpoint cannot be used: exit code 3. Three lines: what, found, what to do."""


# -- files and folders that are there whole or not at all ----------------------------------------------

@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """The name that `path` has while it is written; nothing stays under it after an OSError, told in three lines."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        yield part
    except OSError as error:
        delete(part)
        raise OSError(f"cannot write {path}\n{error.strerror or error}\nfree some space or name another --out; "
                      "what was written before is intact, --resume goes on from it") from error


def write_file(path: Path, text: str) -> None:
    """A crash at any point leaves the old file or the new one."""
    if not parallel.rank():
        with unfinished(path) as part:
            part.write_bytes(text.encode())
            flush(part)
            os.replace(part, path)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which then gets a manifest and its name: a crash leaves the old one, this or none."""
    with unfinished(folder) as part:
        part.mkdir(parents=True)
        yield part
        hashes = {path.name: hash_of(path.read_bytes()) for path in sorted(part.iterdir())}
        (part / "manifest.json").write_text(json.dumps(hashes, indent=1))
        for path in part.iterdir():
            flush(path)
        if parallel.rank():
            return delete(part)
        remove(folder)
        os.rename(part, folder)


def read(folder: Path) -> dict[str, bytes]:
    """The files of such a folder, each held against the manifest; CheckpointError says what differs."""
    try:
        hashes = json.loads((folder / "manifest.json").read_bytes())
        files = {name: (folder / name).read_bytes() for name in hashes if Path(name).name == name}
        wrong = [f"{name} has the hash {hash_of(data)[:12]}, in the manifest {hashes[name][:12]}"
                 for name, data in files.items() if hash_of(data) != hashes[name]]
    except (OSError, ValueError, TypeError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise CheckpointError(f"{folder} is not an intact checkpoint\n{wrong[0]}\n"
                              "delete it and run again with --resume")
    return files


def flush(path: Path) -> None:
    """On the disk when this returns: a power cut must not leave the name without the bytes."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def delete(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove(folder: Path) -> None:
    """By name at once, then its content: what is left of it is never taken for a whole one."""
    if folder.is_dir() and not parallel.rank():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.part-{os.getpid()}0")))


def sweep(folder: Path) -> None:
    """Removes what writing left unfinished anywhere in `folder` when it was killed."""
    for path in sorted(folder.rglob(".*.part-*")) if not parallel.rank() else ():
        if PART.fullmatch(path.name):
            delete(path)


# -- one process, and how it ends ----------------------------------------------------------------------

@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process alone (of torchrun's, the first) works in `folder`; the lock falls with it, however it ends."""
    if parallel.rank():
        yield
        return
    with unfinished(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another process works in {folder}\nit holds the folder's lock\n"
                         "wait until it ends, or name another --out") from None
    try:
        yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()  # while nobody else has the lock
        os.close(handle)


class Stop:
    """SIGTERM and Ctrl-C end the process with 143 and 130, at once or after what it `waits` for; a second at once."""
    signum, waits = 0, False

    @classmethod
    @contextmanager
    def heard(cls) -> Iterator[None]:
        cls.signum, cls.waits = 0, False
        before = {signum: signal.signal(signum, cls.note) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @classmethod
    def note(cls, signum: int, frame) -> None:
        if cls.signum:
            os._exit(128 + signum)
        cls.signum = signum
        cls.leave()

    @classmethod
    def leave(cls) -> None:
        """If a signal has come, and nothing has to be saved before."""
        if cls.signum and cls.waits:
            os.write(2, b"\nthe epoch is finished and saved first; a second signal does not wait\n")
        elif cls.signum:
            name = signal.Signals(cls.signum).name
            os.write(2, f"\nstopped by {name}; the same command with --resume goes on\n".encode())
            raise SystemExit(128 + cls.signum)


# -- phases --------------------------------------------------------------------------------------------

class Checkpoints:
    """The phases of a run whose settings have the hash `settings`. With each goes what its log has said so far."""
    def __init__(self, folder: Path, settings: str, log_of: Callable[[str], Log]):
        self.folder, self.settings, self.log_of, self.due = folder, settings, log_of, 0.0

    def epochs(self, phase: str) -> Epochs:
        """The epochs of a training that no earlier start has finished, each saved when it is done."""
        def left(progress: Progress, all_epochs: range) -> Iterator[int]:
            for newest in self.numbered(f"{phase}.epoch-")[-1:]:
                progress.load_state(*self.load(newest, phase))
            for epoch in progress.left(all_epochs):
                Stop.waits, began = True, time.monotonic()
                yield epoch
                progress.epoch += 1
                self.log_of(phase).seconds += time.monotonic() - began
                self.save(phase, progress)
                Stop.waits = False
                Stop.leave()
        return left

    def save(self, phase: str, progress: Progress) -> None:
        """After an epoch, unless saving would take too much of the time."""
        began = time.monotonic()
        if began >= self.due or Stop.signum:
            self.write(f"{phase}.epoch-{progress.epoch}", phase, *progress.state())
            for old in self.numbered(f"{phase}.epoch-")[:-KEPT]:
                remove(old)
            self.due = time.monotonic() + (time.monotonic() - began) / SHARE

    def finish(self, phase: str, tensors: dict[str, Tensor], facts: dict) -> None:
        """The phase is done: its result takes the place of its epochs."""
        self.write(phase, phase, tensors, facts)
        for old in [*self.numbered(f"{phase}.epoch-"), *self.folder.glob(f"{phase}@*")]:  # @: a lambda that was tried
            remove(old)

    def finished(self, phase: str) -> tuple[dict[str, Tensor], dict] | None:
        return self.load(self.folder / phase, phase) if (self.folder / phase).is_dir() else None

    def numbered(self, prefix: str) -> list[Path]:
        """The checkpoints prefix1, prefix2, ... in the order of their numbers."""
        ends = {path.name.removeprefix(prefix): path for path in self.folder.glob(f"{prefix}*")}
        return [ends[n] for n in sorted((n for n in ends if n.isdigit()), key=int)]

    def write(self, name: str, phase: str, tensors: dict[str, Tensor], facts: dict) -> None:
        if parallel.rank():
            return
        log, own = self.log_of(phase), {key: t.detach().cpu().contiguous() for key, t in sorted(tensors.items())}
        facts = facts | {"log": log.text, "seconds": log.seconds, "settings": self.settings}
        with whole(self.folder / name) as folder:
            (folder / "state.safetensors").write_bytes(save(own))
            (folder / "facts.json").write_text(json.dumps(facts, allow_nan=False))

    def load(self, place: Path, phase: str) -> tuple[dict[str, Tensor], dict]:
        """A checkpoint of this very run; the log says again what it had said until then."""
        tensors, facts = load_checkpoint(place)
        if facts["settings"] != self.settings:
            raise CheckpointError(f"{place} was made with other settings\nthey have the hash {facts['settings']}, this "
                                  f"run's {self.settings}\ndelete it, or start anew without --resume")
        self.log_of(phase).replay(facts["log"], facts["seconds"])
        return tensors, facts


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, facts) of an intact checkpoint; safetensors alone would not notice a flipped bit."""
    files = read(folder)
    try:
        return load(files["state.safetensors"]), json.loads(files["facts.json"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of minipeso\n{type(error).__name__}: {error}\n"
                              "delete it and run again with --resume") from error
