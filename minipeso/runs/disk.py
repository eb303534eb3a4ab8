"""What a run writes is there whole or not at all, and one process at a time writes it (the first of torchrun's).

A file or folder gets its name when it is complete and on the disk; until then it is called
.NAME.part-PID, which the next start removes. A committed folder carries a manifest:

    FOLDER/manifest.json       bytes and SHA-256 of every other file
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minipeso import parallel

PART = re.compile(r"\..+\.part-\d+")


class CheckpointError(Exception):
    """A checkpoint cannot be used: exit code 3. Three lines: what, found, what to do."""


def write_file(path: Path, data: bytes | str) -> None:
    """A crash at any point leaves the old file or the new one."""
    if parallel.rank():
        return
    with _part(path) as part:
        _flush(part, data.encode() if isinstance(data, str) else data)
        os.replace(part, path)
        _sync(path.parent)


def commit(folder: Path, files: dict[str, bytes]) -> None:
    """A folder of these files and their manifest. A crash at any point leaves the old folder, the new
    one, or none; never half of one."""
    if parallel.rank():
        return
    with _part(folder) as part:
        remove(part)
        part.mkdir(parents=True)
        for name, data in {**files, "manifest.json": manifest(files)}.items():
            _flush(part / name, data)
        _sync(part)
        remove(folder)
        os.rename(part, folder)
        _sync(folder.parent)


def manifest(files: dict[str, bytes]) -> bytes:
    rows = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return json.dumps(rows, indent=1).encode()


def seal(folder: Path) -> None:
    """The manifest of a folder that another has filled: from then on `read` knows whether it is whole."""
    if not parallel.rank():
        write_file(folder / "manifest.json", manifest({path.name: path.read_bytes() for path in sorted(folder.iterdir())
                                                       if path.name != "manifest.json"}))


def read(folder: Path) -> dict[str, bytes]:
    """The files of a committed folder, each held against the manifest; CheckpointError says what differs."""
    try:
        rows = json.loads((folder / "manifest.json").read_bytes())
        files = {name: (folder / name).read_bytes() for name in rows if Path(name).name == name}
        wrong = [f"{name}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}, the manifest has "
                 f"{rows[name]['bytes']:,}, {rows[name]['sha256'][:12]}" for name, data in files.items()
                 if rows[name] != {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise CheckpointError(f"{folder} is not an intact checkpoint\n{wrong[0]}\ndelete it and run again")
    return files


def read_json(path: Path, remedy: str) -> dict:
    """The JSON object in a file; ValueError in three lines."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON\n{error}\n{remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object\nit holds a {type(value).__name__}\n{remedy}")
    return value


def remove(path: Path) -> None:
    """A folder goes at once, by name, then its content: what is left of it is never taken for a whole one."""
    if path.is_dir() and not parallel.rank():
        if not PART.fullmatch(path.name):
            path = path.rename(path.with_name(f".{path.name}.part-{os.getpid()}0"))
        shutil.rmtree(path)


def sweep(folder: Path) -> None:
    """Removes what writing left unfinished in `folder` when it was killed."""
    for path in folder.iterdir() if folder.is_dir() and not parallel.rank() else ():
        if PART.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds folder/run.lock; ValueError names the process that has it. The lock falls with the process,
    however it ends: a file that a dead one left is taken over."""
    if parallel.rank():  # the first has it for all
        yield
        return
    with refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / "run.lock")
    try:
        yield
    finally:
        (folder / "run.lock").unlink(missing_ok=True)
        file.close()
        if not any(folder.iterdir()):
            folder.rmdir()


def _locked(path: Path):
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"another process works in {path.parent}\n{path.name} is locked by pid "
                             f"{path.read_text().strip()}\nwait until it ends, or name another --out") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()  # its owner removed it in between
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """An OSError inside is told in three lines."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}\n{error.strerror or error}\nfree some space or name another --out; "
                      "what was written before is intact, --resume goes on from it") from error


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """The unfinished name of `path`; nothing stays under it if writing fails."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    with refused(path):
        try:
            yield part
        except OSError:
            remove(part)
            part.unlink(missing_ok=True)
            raise


def _flush(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """The names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
