"""The lines of a text file, packed with gzip or not; those that cannot be used are counted, 1 % at most."""
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from minipeso import parallel


class BadLine(Exception):
    """A line that cannot be used: (reason it is counted under), or (what is wrong with the whole file, what to do)."""


def parsed(path: Path, lines: Iterable[tuple[int, str]], parse: Callable, bad: dict[str, int]) -> Iterator:
    """parse(line) of every numbered line but the BadLines, counted in `bad`; ValueError after the last if over 1 %."""
    n_lines, first = 0, []
    for n_lines, (number, line) in enumerate(lines, start=1):
        try:
            yield parse(line)
        except BadLine as fault:
            reason, *remedy = fault.args
            if remedy:
                raise ValueError(f"{reason}\n{path}, line {number}\n{remedy[0]}") from None
            bad[reason] = bad.get(reason, 0) + 1
            first = [*first, number][:5]
    if (skipped := sum(bad.values())) > 0.01 * n_lines:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(bad.items()))
        raise ValueError(f"{skipped} of {n_lines} lines cannot be read (limit 1 %)\n{path}, first on lines "
                         f"{', '.join(map(str, first))} ({reasons})\nrepair the file or fetch it again")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not blank. gzip is told by content. A byte that is not UTF-8 spoils its own
    line alone, as half of a surrogate pair."""
    with open(path, "rb") as raw, tqdm(total=path.stat().st_size, desc=f"reading {path.name}", unit="B", leave=False,
                                       unit_scale=True, delay=2, disable=parallel.rank() > 0) as bar:
        stream = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        try:
            for number, line in enumerate(text, start=1):
                if number % 65536 == 0:
                    bar.update(raw.tell() - bar.n)
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
            raise ValueError(f"the compressed file is damaged or incomplete\n{path}: {fault}\n"
                             "delete it and fetch it again") from fault
