"""Who took which item when, and what the items are called, from files of Amazon Reviews 2023.

Paper, Appendix C.1: a review is an interaction; its rating and text are not used. Accepted, packed with gzip or not:

    C.jsonl        one JSON object per line with user_id, parent_asin, timestamp (ms); the rest is ignored
    C.csv          header user_id,parent_asin,rating,timestamp (the Hub's benchmark/0core)
    meta_C.jsonl   one JSON object per line with parent_asin, title, store, categories, description"""
import csv
import html
import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minipeso.files.lines import BadLine, parsed, read_lines
from minipeso.stages import Interactions, day

REVIEW_FILES = re.compile(r"(?!meta_|\.).*\.(jsonl|csv)(\.gz)?")
META_FILES = re.compile(r"meta_.*\.jsonl(\.gz)?")
BLOCK_FILES = re.compile(r"(?!\.).*\.block_(\d+)\.json")
EXPECTED = "expected C.jsonl or C.csv with meta_C.jsonl, or .gz of them, or C.all.block_0.json ... with C.index*.json"
KEYS = ("user_id", "parent_asin", "timestamp")
TEXT_FIELDS = ("title", "description", "store", "categories")
YEAR_2100, SECONDS = 4_102_444_800_000, range(10**8, 10**10)  # in ms; 1973 .. 2286 in seconds, as ms the spring of 1970
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
# A tag, an escaped token such as <a_12> or <|eot|>, or a control character: never part of a name.
MARKUP = re.compile(r"<[^<>\s][^<>]*>|[\x00-\x1f\x7f-\x9f]")


def matching(path: Path, pattern: re.Pattern) -> list[Path]:
    """The files of a folder (or the one file) whose whole name matches, sorted by name."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder\n{path}\n{EXPECTED}")
    files = path.iterdir() if path.is_dir() else [path]
    return sorted(p for p in files if pattern.fullmatch(p.name) and p.is_file())


def unfit(path: Path, what: str, remedy: str = EXPECTED) -> ValueError:
    """The error for what a folder holds, or for a file."""
    holds = f" holds {', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'nothing'}" if path.is_dir() else ""
    return ValueError(f"{what}\n{path}{holds}\n{remedy}")


def find_one(path: str | Path, pattern: re.Pattern, what: str) -> Path:
    """The file itself, or the only file of that kind in a folder."""
    files = matching(Path(path), pattern)
    if len(files) != 1:
        remedy = "name the file itself, or leave only one" if files else EXPECTED
        raise unfit(Path(path), f"{len(files)} files can be the {what}", remedy)
    return files[0]


def dataset_schema(path: str | Path) -> str:
    """Which of the two layouts a folder has, "reviews" or "release"; ValueError if none or both."""
    reviews, blocks = matching(Path(path), REVIEW_FILES), matching(Path(path), BLOCK_FILES)
    if bool(reviews) == bool(blocks):
        raise unfit(Path(path), f"{'both reviews and blocks of the release' if reviews else 'no data set'} found")
    return "reviews" if reviews else "release"


def read_reviews(path: str | Path, start: int | None = None, end: int | None = None) -> Interactions:
    """The interactions in C.jsonl[.gz] or C.csv[.gz], or in a folder with one: every (user, item) at its earliest time,
    as in the Hub's 0core files; then start <= time < end (ms). ValueError: none, over 1 % bad lines, or in seconds."""
    path = find_one(path, REVIEW_FILES, "review file")
    bad, lines = {}, read_lines(path)
    parse = _csv_parser(path, lines) if ".csv" in path.suffixes[-2:] else _json_fields
    users, items, columns = {}, {}, (array("i"), array("i"), array("q"))  # keys are numbered as they appear
    for user_key, item_key, ms in parsed(path, lines, lambda line: _checked(*parse(line)), bad):
        columns[0].append(users.setdefault(user_key, len(users)))
        columns[1].append(items.setdefault(item_key, len(items)))
        columns[2].append(ms)
    if not users:
        raise ValueError(f"no interactions\n{path} is empty\ncheck that it is complete")
    user, item, time = _earliest(*map(np.asarray, columns))  # (lines - duplicates,) each
    inside = (time >= (start or 0)) & (time < (YEAR_2100 if end is None else end))
    if not inside.any():
        raise ValueError("no interaction lies in the span of time asked for\n"
                         f"{path} covers {day(time.min())} to {day(time.max())}\nchoose other years")
    core = min(int(np.bincount(numbers).min()) for numbers in (user, item))
    user, users = _sorted_keys(user[inside], list(users))
    item, items = _sorted_keys(item[inside], list(items))
    time, duplicates = time[inside], len(columns[2]) - len(inside)
    order = np.lexsort((item, user, time))
    return Interactions(user[order], item[order], time[order], users, items, bad, duplicates, core)


def _json_fields(line: str, names: tuple[str, ...] = KEYS) -> list:
    """These fields of an object, None where there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise BadLine("malformed JSON") from None
    if not isinstance(value, dict):
        raise BadLine("not a JSON object")
    return [value.get(name) for name in names]


def _csv_parser(path: Path, lines: Iterator[tuple[int, str]]) -> Callable[[str], list]:
    """What gives the fields of a CSV's line; the first line names the columns."""
    header = next(lines, (1, ""))[1]
    names = header.strip().replace('"', "").split(",")
    if not set(KEYS) <= set(names):
        raise ValueError(f"the CSV has no header\n{path}, line 1: {header[:80]!r}\n"
                         "expected user_id,parent_asin,rating,timestamp")
    user, item, time = map(names.index, KEYS)
    def parse(line: str) -> list:
        try:  # line by line: a stray quote must not swallow the lines that follow
            fields = next(csv.reader([line], strict=True)) if '"' in line else line.rstrip("\r\n").split(",")
        except csv.Error:
            raise BadLine("malformed CSV") from None
        if len(fields) != len(names):
            raise BadLine("wrong number of fields")
        return [fields[user], fields[item], fields[time]]
    return parse


def _checked(user: object, item: object, time: object) -> tuple[str, str, int]:
    """The values of a line, if they are two keys and a time in ms, an int or a numeric text."""
    keys = _key("user_id", user), _key("parent_asin", item)
    try:
        ms = int(time) if isinstance(time, str) else time
    except ValueError:
        ms = None
    if type(ms) is not int:  # bool and float are not times
        raise BadLine("timestamp missing or not an integer")
    if not 0 <= ms < YEAR_2100:
        raise BadLine("timestamp before 1970 or after 2099")
    if ms in SECONDS:
        raise BadLine("timestamps in seconds, not in milliseconds", "multiply the timestamps by 1000")
    return *keys, ms


def _key(name: str, value: object) -> str:
    """The value, if it is a text that can be printed and written: not blank, no NUL, no half of a surrogate pair."""
    if isinstance(value, str) and value.strip() and (value.isprintable() or not UNWRITABLE.search(value)):
        return value
    raise BadLine(f"{name} missing, empty or not a text")


def _earliest(user: np.ndarray, item: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each (user, item) once, with its earliest time."""
    by_time = np.argsort(time, kind="stable")
    pair = user[by_time].astype(np.int64) * (item.max() + 1) + item[by_time]  # (lines,)
    first = by_time[np.unique(pair, return_index=True)[1]]
    return user[first], item[first], time[first]


def _sorted_keys(numbers: np.ndarray, keys: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers given anew in the sorted order of the keys that occur, and those keys."""
    order = sorted(np.flatnonzero(np.bincount(numbers)).tolist(), key=keys.__getitem__)
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(order))
    return rank[numbers], [keys[k] for k in order]


def read_items(path: str | Path, keep: set[str] | None = None, bad: dict[str, int] | None = None) -> dict[str, dict]:
    """{item key: its title, description, store and categories} of meta_C.jsonl[.gz], for the keys in `keep`. Skipped
    lines are counted in `bad`. A field may have any type. Of two lines with one key the same is kept in any order."""
    path, items = find_one(path, META_FILES, "metadata file"), {}
    for key, fields in parsed(path, read_lines(path), _item, {} if bad is None else bad):
        if (keep is None or key in keep) and (key not in items or repr(items[key]) < repr(fields)):
            items[key] = fields
    return items


def _item(line: str) -> tuple[str, dict]:
    key, *fields = _json_fields(line, ("parent_asin", *TEXT_FIELDS))
    return _key("parent_asin", key), dict(zip(TEXT_FIELDS, fields))


def item_texts(fields: dict, key: str) -> tuple[str, str, str]:
    """(title, description, "store | category, category"), each a clean line or ""; (key, "", "") without any."""
    title, description, store, categories = (
        mark.join(_texts(fields.get(name))) for name, mark in zip(TEXT_FIELDS, (" ", " ", ", ", ", ")))
    texts = title, description, " | ".join(filter(None, (store, categories)))
    return texts if any(texts) else (_folded(key), "", "")


def _texts(value: object) -> list[str]:
    """The non-empty texts in a field of any type, HTML unescaped and tags taken out."""
    values = [v for v in (value if isinstance(value, list) else [value]) if type(v) in (str, int)]
    return list(filter(None, (_folded(MARKUP.sub(" ", html.unescape(str(v)))) for v in values)))


def _folded(text: str) -> str:
    """White space folded to single blanks; halves of surrogate pairs, which no terminal can print, replaced."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
