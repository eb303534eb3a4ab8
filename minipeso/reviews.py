"""What happened, from files: who took which item when, and what the items are called.

Amazon Reviews 2023 as it lies on the Hub (paper, Appendix C.1: reviews are implicit interactions;
ratings and texts of the reviews are not used). Accepted, packed with gzip or not:

    C.jsonl        one JSON a line with user_id, parent_asin, timestamp (ms); the rest is ignored
    C.csv          header user_id,parent_asin,rating,timestamp (the Hub's benchmark/0core)
    meta_C.jsonl   one JSON a line with parent_asin, title, store, categories, description

Who is trained on what is the paper's protocol and is in stages.py.
"""
from __future__ import annotations

import csv
import gzip
import html
import io
import json
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

REVIEW_FILES = re.compile(r"(?!meta_|\.).*\.(jsonl|csv)(\.gz)?")
META_FILES = re.compile(r"meta_.*\.jsonl(\.gz)?")
BLOCK_FILES = re.compile(r"(?!\.).*\.block_(\d+)\.json")
EXPECTED = ("expected C.jsonl[.gz] or C.csv[.gz] with meta_C.jsonl[.gz], "
            "or the release's C.all.block_0.json ... with C.index*.json")

MAX_BAD = 0.01                       # share of unreadable rows above which a file is refused
YEAR_2100 = 4_102_444_800_000        # ms
SECONDS_RANGE = (10**8, 10**10)      # 1973 .. 2286 in seconds; read as ms: the spring of 1970
SECONDS = "timestamps in seconds"
# A tag, an escaped token such as <a_12> or <|eot|>, or a control character: never part of a name.
MARKUP = re.compile(r"<[^<>\s][^<>]*>|[\x00-\x1f\x7f-\x9f]")
TEXT_FIELDS = ("title", "store", "categories", "description")


@dataclass(frozen=True, eq=False)
class Interactions:
    """Every (user, item) once, in the order (time, user key, item key).

    user, item (n,) int64 index the sorted raw keys `users`, `items`, so no number here depends on
    the order of the file; time (n,) int64 in ms. `bad` counts unreadable rows by reason,
    `duplicates` the rows dropped because the same user had the same item earlier.
    """
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    users: list[str]
    items: list[str]
    bad: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    core: int = 0  # the events of the user or item with the fewest, before the span is cut out


def day(ms: int) -> str:
    """A time in ms as a date, for messages."""
    return str(np.datetime64(int(ms), "ms"))[:10]


def matching(path: Path, pattern: re.Pattern) -> list[Path]:
    """The files of a folder (or the one file) whose whole name fits, in the order of names."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder\n{path}\n{EXPECTED}")
    files = path.iterdir() if path.is_dir() else [path]
    return sorted(p for p in files if pattern.fullmatch(p.name) and p.is_file())


def listing(path: Path) -> str:
    """What is there, for messages."""
    if path.is_file():
        return str(path)
    return f"{path} holds {', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'nothing'}"


def find_one(path: str | Path, pattern: re.Pattern, what: str) -> Path:
    """The file itself, or the only file of that kind in a folder."""
    found = matching(Path(path), pattern)
    if len(found) != 1:
        wish = "name the file itself, or leave only one" if found else EXPECTED
        raise ValueError(f"{len(found)} files can be the {what}\n{listing(Path(path))}\n{wish}")
    return found[0]


def dataset_schema(path: str | Path) -> str:
    """Which of the two layouts a folder holds, "reviews" or "release"; ValueError if not one."""
    reviews, blocks = matching(Path(path), REVIEW_FILES), matching(Path(path), BLOCK_FILES)
    if bool(reviews) == bool(blocks):
        kinds = "both reviews and the release's blocks" if reviews else "no data set"
        raise ValueError(f"{kinds} found\n{listing(Path(path))}\n{EXPECTED}")
    return "reviews" if reviews else "release"


class _BadRow(Exception):
    """One row that cannot be used; the text is the reason it is counted under."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of every line that is not blank; gzip is told by content, not by name."""
    with open(path, "rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        # surrogateescape: a broken byte spoils its own row (see _is_key), not the whole file.
        text = io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if packed else raw,
                                encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield from ((n, line) for n, line in enumerate(text, 1) if not line.isspace())
        except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
            raise ValueError(f"the compressed file is damaged or incomplete\n{path}: {fault}\n"
                             "delete it and fetch it again") from fault


def _parsed(path: Path, lines: Iterable[tuple[int, str]], parse: Callable,
            bad: dict[str, int]) -> Iterator:
    """parse(line) of every line; refused rows are counted in `bad` by reason, 1 % at most."""
    rows, first = 0, []
    for number, line in lines:
        rows += 1
        try:
            row = parse(line)
        except _BadRow as fault:
            if str(fault) == SECONDS:
                raise ValueError(f"{SECONDS}, not in milliseconds\n{path}, line {number}\n"
                                 "multiply the timestamps by 1000") from None
            bad[str(fault)] = bad.get(str(fault), 0) + 1
            first = (first + [number])[:5]
        else:
            yield row
    if sum(bad.values()) > MAX_BAD * rows:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(bad.items()))
        raise ValueError(f"{sum(bad.values())} of {rows} rows cannot be read (limit 1 %)\n{path}, "
                         f"first on lines {', '.join(map(str, first))} ({reasons})\n"
                         "repair the file or fetch it again")


def _json_object(line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise _BadRow("malformed JSON") from None
    if not isinstance(row, dict):
        raise _BadRow("not a JSON object")
    return row


def _is_key(value: object) -> bool:
    """A text that can be printed and written: not blank, no NUL, no half of a surrogate pair."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.isprintable() or not re.search("[\0\ud800-\udfff]", value)


def _milliseconds(value: object) -> int:
    """An integer time in ms from an int or a numeric text."""
    try:
        value = int(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    if type(value) is not int:       # bool and float are not times
        raise _BadRow("timestamp missing or not an integer")
    if not 0 <= value < YEAR_2100:
        raise _BadRow("timestamp before 1970 or after 2099")
    if SECONDS_RANGE[0] <= value < SECONDS_RANGE[1]:
        raise _BadRow(SECONDS)
    return value


def _review(user: object, item: object, time: object) -> tuple[str, str, int]:
    if not _is_key(user):
        raise _BadRow("user_id missing, empty or not a text")
    if not _is_key(item):
        raise _BadRow("parent_asin missing, empty or not a text")
    return user, item, _milliseconds(time)


def _json_review(line: str) -> tuple[str, str, int]:
    row = _json_object(line)
    return _review(row.get("user_id"), row.get("parent_asin"), row.get("timestamp"))


def _csv_review(path: Path, header: str) -> Callable[[str], tuple[str, str, int]]:
    """The parser of the rows below this header; columns are found by name."""
    names = header.strip().replace('"', "").split(",")
    if not {"user_id", "parent_asin", "timestamp"} <= set(names):
        raise ValueError(f"the CSV has no header\n{path}, line 1: {header[:80]!r}\n"
                         "expected user_id,parent_asin,rating,timestamp")
    user, item, time = map(names.index, ("user_id", "parent_asin", "timestamp"))

    def parse(line: str) -> tuple[str, str, int]:
        try:  # quotes are undone line by line: a stray one must not swallow the rows that follow
            fields = (next(csv.reader([line], strict=True)) if '"' in line
                      else line.rstrip("\r\n").split(","))
        except csv.Error:
            raise _BadRow("malformed CSV") from None
        if len(fields) != len(names):
            raise _BadRow("wrong number of fields")
        return _review(fields[user], fields[item], fields[time])

    return parse


def read_reviews(path: str | Path, start: int | None = None,
                 end: int | None = None) -> Interactions:
    """The interactions of C.jsonl[.gz] or C.csv[.gz] (or of the folder that holds the only one).

    start <= time < end in ms is the paper's span of years (2019-2023; Books 2022-2023). Duplicates
    go before the span is cut out, as in the Hub's 0core files, so both sources give one result.
    One pass; rows are kept as integers, each key once. Bad rows are skipped and counted.
    Errors: ValueError (over 1 % bad, times in seconds, nothing in the span), FileNotFoundError.
    """
    path = find_one(path, REVIEW_FILES, "review file")
    lines, bad = read_lines(path), {}
    parse = _csv_review(path, next(lines, (1, ""))[1]) if ".csv" in path.suffixes[-2:] else _json_review
    user_ids, item_ids = {}, {}
    user, item, time = array("q"), array("q"), array("q")
    for user_key, item_key, ms in _parsed(path, lines, parse, bad):
        user.append(user_ids.setdefault(user_key, len(user_ids)))
        item.append(item_ids.setdefault(item_key, len(item_ids)))
        time.append(ms)
    events = np.stack([np.asarray(column) for column in (user, item, time)])   # (3, n)
    kept = _earliest(events)                                                   # (3, n - duplicates)
    spanned = _within(path, kept, start, end)                                  # (3, m)
    user, users = _sorted_keys(spanned[0], list(user_ids))
    item, items = _sorted_keys(spanned[1], list(item_ids))
    order = np.lexsort((item, user, spanned[2]))
    core = min(int(np.bincount(kept[axis]).min()) for axis in (0, 1))
    return Interactions(user[order], item[order], spanned[2][order], users, items, bad,
                        events.shape[1] - kept.shape[1], core)


def _earliest(events: np.ndarray) -> np.ndarray:
    """One column for each (user, item): the earliest."""
    events = events[:, np.lexsort(events[::-1])]              # by user, then item, then time
    again = (events[:2, 1:] == events[:2, :-1]).all(axis=0)   # (n - 1,)
    return events[:, ~np.append(False, again)] if events.size else events


def _within(path: Path, events: np.ndarray, start: int | None, end: int | None) -> np.ndarray:
    """The columns with start <= time < end; none left is an error."""
    time = events[2]
    if not len(time):
        raise ValueError(f"no interactions\n{path} has no row\ncheck that it is complete")
    inside = (time >= (start or 0)) & (time < (YEAR_2100 if end is None else end))
    if not inside.any():
        raise ValueError("no interaction lies in the span of time asked for\n"
                         f"{path} covers {day(time.min())} to {day(time.max())}\n"
                         "choose other years")
    return events[:, inside]


def _sorted_keys(codes: np.ndarray, keys: list[str]) -> tuple[np.ndarray, list[str]]:
    """Codes renumbered by the sorted order of the keys that still occur, and those keys."""
    order = sorted(np.unique(codes).tolist(), key=keys.__getitem__)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes], [keys[k] for k in order]


def read_items(path: str | Path, keep: set[str] | None = None, bad: dict[str, int] | None = None) -> dict[str, dict]:
    """{item key: title, store, categories, description as the file has them} of meta_C.jsonl[.gz].
    Only keys in `keep`, where given; rows skipped are counted in `bad`. Any field may be absent, None or of
    an odd type: show names through `item_text`. Two lines for one key keep the same one whatever their order.
    """
    path = find_one(path, META_FILES, "metadata file")
    items: dict[str, dict] = {}
    for key, fields in _parsed(path, read_lines(path), _json_item, {} if bad is None else bad):
        if keep is not None and key not in keep:
            continue
        if key not in items or repr(items[key]) < repr(fields):
            items[key] = fields
    return items


def _json_item(line: str) -> tuple[str, dict]:
    row = _json_object(line)
    if not _is_key(row.get("parent_asin")):
        raise _BadRow("parent_asin missing, empty or not a text")
    return row["parent_asin"], {name: row.get(name) for name in TEXT_FIELDS}


def item_text(fields: dict, key: str) -> str:
    """One clean line: "title | store | category, category"; the key if nothing is there."""
    parts = [", ".join(_texts(fields.get(name))) for name in ("title", "store", "categories")]
    return " | ".join(filter(None, parts)) or _folded(key)


def _texts(value: object) -> list[str]:
    """The non-empty texts in a field that may be anything: HTML unescaped, tags taken out."""
    values = value if isinstance(value, list) else [value]
    texts = (html.unescape(str(v)) for v in values if type(v) in (str, int))
    return [text for text in (_folded(MARKUP.sub(" ", t)) for t in texts) if text]


def _folded(text: str) -> str:
    """Whitespace folded to one line; half surrogate pairs replaced, which no terminal can print."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
