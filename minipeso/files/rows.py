"""Lines of a file, packed with gzip or not, one by one or in blocks of bytes; those that cannot be read are counted."""
from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from minipeso import parallel

MAX_BAD = 0.01                       # share of unreadable rows above which a file is refused
YEAR_2100 = 4_102_444_800_000        # ms
SECONDS_RANGE = (10**8, 10**10)      # 1973 .. 2286 in seconds; read as ms: the spring of 1970
SECONDS = "timestamps in seconds"
BLOCK = 1 << 24                      # bytes


class BadRow(Exception):
    """One row that cannot be used; the text is the reason it is counted under."""


class Tally:
    """How many rows a file had, and which were refused: `bad` by reason, 1 % at most."""

    def __init__(self, path: Path, bad: dict[str, int]):
        self.path, self.bad, self.rows, self.first = path, bad, 0, []

    def parsed(self, lines: Iterable[tuple[int, str]], parse: Callable) -> Iterator:
        """parse(line) of every line that it does not refuse."""
        for number, line in lines:
            self.rows += 1
            try:
                row = parse(line)
            except BadRow as fault:
                if str(fault) == SECONDS:
                    raise ValueError(f"{SECONDS}, not in milliseconds\n{self.path}, line {number}\n"
                                     "multiply the timestamps by 1000") from None
                self.bad[str(fault)] = self.bad.get(str(fault), 0) + 1
                self.first = (self.first + [number])[:5]
            else:
                yield row

    def close(self) -> None:
        refused = sum(self.bad.values())
        if refused > MAX_BAD * self.rows:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(self.bad.items()))
            raise ValueError(f"{refused} of {self.rows} rows cannot be read (limit 1 %)\n{self.path}, "
                             f"first on lines {', '.join(map(str, self.first))} ({reasons})\n"
                             "repair the file or fetch it again")


class Counted(io.RawIOBase):
    """A file whose reader's way through it a bar shows."""

    def __init__(self, path: Path):
        self.raw = open(path, "rb", buffering=0)
        self.bar = tqdm(total=path.stat().st_size, desc=f"reading {path.name}", unit="B", unit_scale=True, leave=False, delay=2,
                        disable=parallel.rank() > 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self.raw.readinto(buffer)
        self.bar.update(n)
        return n

    def close(self) -> None:
        self.bar.close()
        self.raw.close()
        super().close()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; gzip is told by content, not by name."""
    with io.BufferedReader(Counted(path), 1 << 20) as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        try:
            yield gzip.GzipFile(fileobj=raw) if packed else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
            raise ValueError(f"the compressed file is damaged or incomplete\n{path}: {fault}\n"
                             "delete it and fetch it again") from fault


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of every line that is not blank."""
    with opened(path) as stream:
        # surrogateescape: a broken byte spoils its own row (see reviews._is_key), not the whole file
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield from ((n, line) for n, line in enumerate(text, 1) if not line.isspace())


def read_blocks(path: Path, size: int | None = None) -> Iterator[bytes]:
    """The file in pieces of about `size` bytes (BLOCK), each ending with a line."""
    with opened(path) as stream:
        rest = b""
        while piece := stream.read(size or BLOCK):
            piece = rest + piece
            end = piece.rfind(b"\n") + 1
            if end:
                yield piece[:end]
            rest = piece[end:]
        if rest:
            yield rest
