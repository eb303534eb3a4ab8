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
import html
import json
import re
from array import array
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from minipeso.files.ratings import Keys, read_ratings
from minipeso.files.rows import SECONDS, SECONDS_RANGE, YEAR_2100, BadRow, Tally, read_lines
from minipeso.stages import Interactions, day, ordered

REVIEW_FILES = re.compile(r"(?!meta_|\.).*\.(jsonl|csv)(\.gz)?")
META_FILES = re.compile(r"meta_.*\.jsonl(\.gz)?")
BLOCK_FILES = re.compile(r"(?!\.).*\.block_(\d+)\.json")
EXPECTED = ("expected C.jsonl[.gz] or C.csv[.gz] with meta_C.jsonl[.gz], "
            "or the release's C.all.block_0.json ... with C.index*.json")

# A tag, an escaped token such as <a_12> or <|eot|>, or a control character: never part of a name.
MARKUP = re.compile(r"<[^<>\s][^<>]*>|[\x00-\x1f\x7f-\x9f]")
TEXT_FIELDS = ("title", "store", "categories", "description")


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


def _json_object(line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRow("malformed JSON") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
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
        raise BadRow("timestamp missing or not an integer")
    if not 0 <= value < YEAR_2100:
        raise BadRow("timestamp before 1970 or after 2099")
    if SECONDS_RANGE[0] <= value < SECONDS_RANGE[1]:
        raise BadRow(SECONDS)
    return value


def _review(user: object, item: object, time: object) -> tuple[str, str, int]:
    if not _is_key(user):
        raise BadRow("user_id missing, empty or not a text")
    if not _is_key(item):
        raise BadRow("parent_asin missing, empty or not a text")
    return user, item, _milliseconds(time)


def _json_review(line: str) -> tuple[str, str, int]:
    row = _json_object(line)
    return _review(row.get("user_id"), row.get("parent_asin"), row.get("timestamp"))


def _csv_columns(path: Path, header: str) -> tuple[tuple[int, int, int], int]:
    """Where user, item and time stand in a row, by the header's names, and how many fields it has."""
    names = header.strip().replace('"', "").split(",")
    if not {"user_id", "parent_asin", "timestamp"} <= set(names):
        raise ValueError(f"the CSV has no header\n{path}, line 1: {header[:80]!r}\n"
                         "expected user_id,parent_asin,rating,timestamp")
    return tuple(map(names.index, ("user_id", "parent_asin", "timestamp"))), len(names)


def _csv_review(places: tuple[int, int, int], n_fields: int, line: str) -> tuple[str, str, int]:
    try:  # quotes are undone line by line: a stray one must not swallow the rows that follow
        fields = next(csv.reader([line], strict=True)) if '"' in line else line.rstrip("\r\n").split(",")
    except csv.Error:
        raise BadRow("malformed CSV") from None
    if len(fields) != n_fields:
        raise BadRow("wrong number of fields")
    return _review(*(fields[place] for place in places))


def read_reviews(path: str | Path, start: int | None = None,
                 end: int | None = None) -> Interactions:
    """The interactions of C.jsonl[.gz] or C.csv[.gz] (or of the folder that holds the only one).

    start <= time < end in ms is the paper's span of years (2019-2023; Books 2022-2023). Duplicates
    go before the span is cut out, as in the Hub's 0core files, so both sources give one result.
    One pass; rows are kept as integers, each key once. Bad rows are skipped and counted.
    Errors: ValueError (over 1 % bad, times in seconds, nothing in the span), FileNotFoundError.
    """
    path, bad = find_one(path, REVIEW_FILES, "review file"), {}
    tally = Tally(path, bad)
    if ".csv" in path.suffixes[-2:]:
        number, header = next(read_lines(path), (1, ""))
        places, fields = _csv_columns(path, header)
        parse = partial(_csv_review, places, fields)
        user, item, time, users, items = read_ratings(path, number, places, fields, parse, tally)
    else:
        user, item, time, users, items = _columns(tally.parsed(read_lines(path), _json_review))
    tally.close()
    rows = len(time)
    user, item, time = _earliest(user, item, time, len(items))  # (rows - duplicates,) each
    inside = _within(path, time, start, end)
    core = min(int(np.bincount(codes).min()) for codes in (user, item))
    user, users = _sorted_keys(user[inside], users)
    item, items = _sorted_keys(item[inside], items)
    time = time[inside]
    order = ordered(time, user, item)
    return Interactions(user[order], item[order], time[order], users, items, bad, rows - len(inside), core)


def _columns(rows: Iterable[tuple[str, str, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Keys, Keys]:
    """Rows as numbers of keys, and times."""
    users, items, user, item, time = Keys(), Keys(), array("i"), array("i"), array("q")
    for user_key, item_key, ms in rows:
        user.append(users.number(user_key))
        item.append(items.number(item_key))
        time.append(ms)
    return *(np.asarray(column) for column in (user, item, time)), users, items


def _earliest(user: np.ndarray, item: np.ndarray, time: np.ndarray, n_items: int) -> tuple[np.ndarray, ...]:
    """Each (user, item) once, with its first time."""
    pair = user.astype(np.int64) * n_items + item
    order = np.argsort(pair)
    pair = pair[order]
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    first = np.minimum.reduceat(time[order], starts) if len(starts) else time
    return *np.divmod(pair[starts], max(n_items, 1)), first


def _within(path: Path, time: np.ndarray, start: int | None, end: int | None) -> np.ndarray:
    """Which have start <= time < end; none at all is an error."""
    if not len(time):
        raise ValueError(f"no interactions\n{path} has no row\ncheck that it is complete")
    inside = (time >= (start or 0)) & (time < (YEAR_2100 if end is None else end))
    if not inside.any():
        raise ValueError("no interaction lies in the span of time asked for\n"
                         f"{path} covers {day(time.min())} to {day(time.max())}\n"
                         "choose other years")
    return inside


def _sorted_keys(codes: np.ndarray, keys: Keys) -> tuple[np.ndarray, list[str]]:
    """Codes renumbered by the sorted order of the keys that still occur, and those keys."""
    there = np.unique(codes)
    names = keys.names(there)
    order = sorted(range(len(there)), key=names.__getitem__)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[there[order]] = np.arange(len(order))
    return rank[codes], [names[k] for k in order]


def read_items(path: str | Path, keep: set[str] | None = None, bad: dict[str, int] | None = None) -> dict[str, dict]:
    """{item key: title, store, categories, description as the file has them} of meta_C.jsonl[.gz].
    Only keys in `keep`, where given; rows skipped are counted in `bad`. Any field may be absent, None or of
    an odd type: show names through `item_text`. Two lines for one key keep the same one whatever their order.
    """
    path = find_one(path, META_FILES, "metadata file")
    items: dict[str, dict] = {}
    tally = Tally(path, {} if bad is None else bad)
    for key, fields in tally.parsed(read_lines(path), _json_item):
        if keep is not None and key not in keep:
            continue
        if key not in items or repr(items[key]) < repr(fields):
            items[key] = fields
    tally.close()
    return items


def _json_item(line: str) -> tuple[str, dict]:
    row = _json_object(line)
    if not _is_key(row.get("parent_asin")):
        raise BadRow("parent_asin missing, empty or not a text")
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
