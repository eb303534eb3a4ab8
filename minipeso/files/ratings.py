"""Ratings in the Hub's CSV form by the block: what is plain with numpy, every other line as any row is read.

A plain line has the header's number of fields, printable ASCII without quotes or blanks, a user, an item, and
a time of 11 to 13 digits. A key becomes a number by its bytes; each is kept once.
"""
from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minipeso.files.rows import SECONDS_RANGE, YEAR_2100, Tally, read_blocks

COMMA, NEWLINE = 44, 10
PLAIN = np.zeros(256, bool)
PLAIN[33:127], PLAIN[34], PLAIN[NEWLINE] = True, False, True
WIDEST = 64  # bytes of a plain key


class Keys:
    """Numbers 0, 1, ... for keys in the order in which they come."""

    def __init__(self):
        self.numbers: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def number(self, key: str) -> int:
        return self.numbers.setdefault(key.encode(), len(self.numbers))

    def of(self, keys: np.ndarray) -> np.ndarray:
        """The numbers of keys (n, width) uint8, filled up with zeros: (n,) int32."""
        words = keys.view(np.uint64)  # (n, width / 8)
        mixed = np.zeros(len(words), np.uint64)
        for word in words.T:
            mixed = (mixed ^ word) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        _, first, same = np.unique(mixed, return_index=True, return_inverse=True)
        if (words != words[first][same]).any():  # two keys with one hash
            _, first, same = np.unique(words, axis=0, return_index=True, return_inverse=True)
        each = keys[first].view(f"S{keys.shape[1]}")[:, 0].tolist()
        numbers = [self.numbers.setdefault(key, len(self.numbers)) for key in each]
        return np.array(numbers, np.int32)[same.reshape(-1)]

    def names(self, some: np.ndarray) -> list[str]:
        """The keys of these numbers (ascending)."""
        chosen = np.zeros(len(self.numbers), bool)
        chosen[some] = True
        return [key.decode() for key, wanted in zip(self.numbers, chosen.tolist()) if wanted]


class Block(NamedTuple):
    """The plain lines of a block, and the others as (place in the block, text)."""

    user: np.ndarray  # (n, width) uint8, the key's bytes and zeros
    item: np.ndarray
    time: np.ndarray  # (n,) int64
    others: list[tuple[int, str]]
    lines: int


def read_ratings(path: Path, header: int, places: tuple[int, int, int], n_fields: int, parse: Callable,
                 tally: Tally) -> tuple[np.ndarray, np.ndarray, np.ndarray, Keys, Keys]:
    """(user, item, time, users, items) of the rows below line `header`: numbers (n,) int32 of keys, times (n,)
    int64. `places`: of user, item and time among a row's n_fields fields."""
    users, items, line = Keys(), Keys(), 1
    parts = [tuple(np.empty(0, kind) for kind in (np.int32, np.int32, np.int64))]
    for data in read_blocks(path):
        data = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
        block = cut(data if data.endswith(b"\n") else data + b"\n", places, n_fields, max(header + 1 - line, 0))
        tally.rows += len(block.time)
        parts.append((users.of(block.user), items.of(block.item), block.time))
        others = [(line + k, text) for k, text in block.others if line + k > header and not text.isspace()]
        for user, item, ms in tally.parsed(others, parse):
            parts.append((np.int32([users.number(user)]), np.int32([items.number(item)]), np.array([ms])))
        line += block.lines
    return *(np.concatenate(column) for column in zip(*parts)), users, items


def cut(block: bytes, places: tuple[int, int, int], n_fields: int, skipped: int) -> Block:
    """Finds the plain lines among those after the first `skipped`; a block whose lines may end otherwise than
    with a newline has none."""
    if b"\r" in block:
        lines = list(io.TextIOWrapper(io.BytesIO(block), encoding="utf-8", errors="surrogateescape", newline=""))
        nothing = np.empty((0, 8), np.uint8)
        return Block(nothing, nothing, np.empty(0, np.int64), list(enumerate(lines)), len(lines))
    data = np.frombuffer(block + bytes(WIDEST), np.uint8)
    content = data[:len(block)]
    ends, commas = np.flatnonzero(content == NEWLINE), np.flatnonzero(content == COMMA)
    starts = np.append(0, ends[:-1] + 1)
    first = np.searchsorted(commas, starts)
    plain = np.searchsorted(commas, ends) - first == n_fields - 1  # (lines,)
    plain[np.searchsorted(ends, np.flatnonzero(~PLAIN[content]))] = False
    plain[:skipped] = False
    at = np.flatnonzero(plain)
    cuts = commas[first[at][:, None] + np.arange(n_fields - 1)]  # (plain, n_fields - 1)
    edges = np.concatenate([starts[at][:, None] - 1, cuts, ends[at][:, None]], 1)  # (plain, n_fields + 1)
    start, length = edges[:, :-1] + 1, np.diff(edges) - 1  # (plain, n_fields)
    user, item, when = places
    time = times(data, start[:, when], length[:, when])
    fits = (length[:, [user, item]] >= 1).all(1) & (length[:, [user, item]] <= WIDEST).all(1) & (time >= 0)
    plain[at[~fits]] = False
    others = [(k, block[starts[k]:ends[k] + 1].decode("utf-8", "surrogateescape")) for k in np.flatnonzero(~plain)]
    keys = (gathered(data, start[fits, place], length[fits, place]) for place in (user, item))
    return Block(*keys, time[fits], others, len(ends))


def gathered(data: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The bytes from each start on, as many as its length, then zeros: (n, a multiple of 8)."""
    width = -(-int(length.max(initial=1)) // 8) * 8
    keys = np.lib.stride_tricks.sliding_window_view(data, width)[start]
    keys[np.arange(width) >= length[:, None]] = 0
    return keys


def times(data: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Times in ms written in digits; -1 for what is not plainly one."""
    value, power = np.zeros(len(start), np.int64), 1
    wrong = (length < 11) | (length > 13)
    for place in range(13):
        digit = np.where(place < length, data[np.maximum(start + length - 1 - place, 0)] - np.uint8(48), 0)  # wraps
        wrong |= digit > 9
        value += digit.astype(np.int64) * power
        power *= 10
    return np.where(wrong | (value < SECONDS_RANGE[1]) | (value >= YEAR_2100), -1, value)
