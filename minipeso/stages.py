"""Who is trained on what, and when: the stages D_1 .. D_T of continual recommendation.

The protocol of the paper's Section 3 and Appendix C.1: a chronological cut into a large D_1 and
equal later parts, users with too few events in a stage dropped from that stage, leave-one-out per
user and stage, histories of at most 20 items. All leakage would start here, so nothing else
decides what an example may see.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

PARTS = ("train", "valid", "test")


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


def ordered(first: np.ndarray, *ties: np.ndarray) -> np.ndarray:
    """The order by `first`, equals by `ties`, as np.lexsort gives it; faster where equals are few."""
    order = np.argsort(first)
    equal = np.diff(first[order]) == 0
    tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
    rows = order[tied]
    order[tied] = rows[np.lexsort((*(key[rows] for key in ties[::-1]), first[rows]))]
    return order


@dataclass(frozen=True)
class Stage:
    """D_t: the users active in stage t, what each had before, and what each took now.

    history[user] are the items of earlier stages ([] for a new user), current[user] those of this
    stage; both oldest first, users in increasing order.
    """
    number: int                       # t, from 1
    history: dict[int, list[int]]
    current: dict[int, list[int]]

    @property
    def users(self) -> list[int]:
        return list(self.current)

    @property
    def items(self) -> set[int]:
        """The items taken in this stage."""
        return {item for items in self.current.values() for item in items}

    @property
    def interactions(self) -> int:
        return sum(map(len, self.current.values()))


class Example(NamedTuple):
    """One next-item question: after `history` (oldest first, a window), the user took `target`."""
    user: int
    history: tuple[int, ...]
    target: int
    stage: int


def cut(interactions: Interactions, first: float = 0.6, stages: int = 5,
        min_events: int = 5) -> list[Stage]:
    """The natural chronological split (Section 3, setting 1; Appendix C.1).

    Events in time order: the first 60 % are D_1, the rest is cut into equal parts by count. Then
    users with fewer than `min_events` events in a stage are dropped from that stage; a history is
    what survived of the user's earlier stages.
    Paper: "for each incremental stage, we filter out users with fewer than five interactions".
    Release: every block, the first one too, holds only users with >= 5. Here: as the release.
    Errors: ValueError for too few events, times that are all equal, or an empty D_1.
    """
    time = interactions.time
    span = f"{len(time)} interactions"
    if len(time):
        span += f", {day(time.min())} to {day(time.max())}"
    if not 0 < first < 1 or not 1 <= stages <= len(time) or time.min() == time.max():
        raise ValueError(f"cannot cut into {stages} stages by time, the first of {first:g}\n"
                         f"found {span}\nuse more data, fewer stages or a longer span of years")
    order = ordered(time, interactions.user, interactions.item)
    cuts, past = [], {}
    for number, part in enumerate(np.split(order, _bounds(len(order), first, stages)), start=1):
        current = _by_user(interactions.user[part], interactions.item[part], min_events)
        cuts.append(Stage(number, {u: past.get(u, []) for u in current}, current))
        past |= {u: past.get(u, []) + items for u, items in current.items()}
    if not cuts[0].current:
        raise ValueError(f"no user has {min_events} events in D1\nfound {span}\n"
                         "use more data or a smaller min_events")
    return cuts


def _bounds(n: int, first: float, stages: int) -> list[int]:
    """Where D_2, D_3, ... start among n events in time order."""
    start = int(round(first * n, 6))          # the floor, but 0.57 * 100 = 56.99999 is 57
    return [start + (n - start) * k // (stages - 1) for k in range(stages - 1)]


def _by_user(user: np.ndarray, item: np.ndarray, min_events: int) -> dict[int, list[int]]:
    """{user: items in the order given} of the users with at least `min_events` rows."""
    kept = np.bincount(user)[user] >= min_events
    user, item = user[kept], item[kept]
    order = np.argsort(user, kind="stable")                   # groups users, keeps time order
    users, starts = np.unique(user[order], return_index=True)
    items, ends = item[order].tolist(), np.append(starts[1:], len(user)).tolist()
    return {u: items[a:b] for u, a, b in zip(users.tolist(), starts.tolist(), ends)}


def user_disjoint(stages: Sequence[Stage], seed: int) -> list[Stage]:
    """The pseudo user-disjoint split (Section 3, setting 2) with the sizes of the natural stages.

    Each user's whole sequence (the items of all these stages, order kept) goes to one stage:
    users in a random order fill D_1 up to its natural number of interactions, then D_2, ...
    So every boundary is off by less than one user's sequence, and no one has a history.
    """
    sequences: dict[int, list[int]] = {}
    for stage in stages:
        for user, items in stage.current.items():
            sequences.setdefault(user, []).extend(items)
    # a stream of its own: with `subset`'s, whoever is drawn there would be those who come first here, all in D_1
    users = np.random.default_rng([seed, 1]).permutation(sorted(sequences))
    lengths = np.array([len(sequences[u]) for u in users.tolist()])
    full = np.cumsum([stage.interactions for stage in stages])
    place = np.searchsorted(full, np.cumsum(lengths) - lengths, side="right")
    mixed = []
    for k, stage in enumerate(stages):
        mine = sorted(users[place == k].tolist())
        mixed.append(Stage(stage.number, {u: [] for u in mine}, {u: sequences[u] for u in mine}))
    return mixed


def subset(stages: Sequence[Stage], n_users: int, seed: int) -> list[Stage]:
    """The same stages for a random n_users of all users, with their full histories.

    Drawn from the users of all stages together, so each stage shrinks in proportion (a later one
    may become empty). One seed's subsets are nested: a larger n_users only adds users.
    """
    users = sorted(set().union(*(stage.current for stage in stages)))
    chosen = set(np.random.default_rng(seed).permutation(users)[:max(n_users, 0)].tolist())
    smaller = [Stage(stage.number, {u: h for u, h in stage.history.items() if u in chosen},
                     {u: c for u, c in stage.current.items() if u in chosen}) for stage in stages]
    if not smaller[0].current:
        raise ValueError(f"none of {n_users} drawn users is active in stage {stages[0].number}\n"
                         f"there are {len(users)} users\nask for more users")
    return smaller


def examples(stage: Stage, part: str, window: int = 20) -> list[Example]:
    """Leave-one-out per user and stage: the last item is the test, the one before validates.

    train: every other item of the stage is a target; valid: current[-2]; test: current[-1], with
    the validation item in its history. A history is all that came before, earlier stages
    included, cut to the last `window` items; a new user's first item keeps its empty one, as in
    the release. A user with two items has no training example, with one only a test.
    """
    if part not in PARTS or window < 1:
        raise ValueError(f"no such examples\npart {part!r}, window {window}\n"
                         f"part is one of {', '.join(PARTS)}; window at least 1")
    made = []
    for user, current in stage.current.items():
        full = stage.history[user] + current
        start, n = len(stage.history[user]), len(full)
        targets = {"train": range(start, n - 2), "valid": range(max(start, n - 2), n - 1),
                   "test": range(max(start, n - 1), n)}[part]
        made += [Example(user, tuple(full[max(0, i - window):i]), full[i], stage.number)
                 for i in targets]
    return made


def statistics(stages: Sequence[Stage]) -> list[dict]:
    """The rows of the paper's Table 4, and a last one for all stages together.

    A user is new if the history is empty; an item is new if it is in no earlier stage given here
    and in no history seen so far. sparsity = 1 - interactions / (users * items). What has no
    meaning is None: new, average and sparsity of the last row, ratios of an empty stage.
    """
    rows, all_users, all_items, seen = [], set(), set(), set()
    for stage in stages:
        items, users, n = stage.items, len(stage.current), stage.interactions
        seen.update(*stage.history.values())
        rows.append({"stage": f"D{stage.number}", "users": users,
                     "new_users": sum(not h for h in stage.history.values()),
                     "items": len(items), "new_items": len(items - seen), "interactions": n,
                     "avg_length": n / users if n else None,
                     "sparsity": 1 - n / (users * len(items)) if n else None})
        seen |= items
        all_items |= items
        all_users.update(stage.current)
    return rows + [{"stage": f"D{stages[0].number}:{stages[-1].number}", "users": len(all_users),
                    "new_users": None, "items": len(all_items), "new_items": None,
                    "interactions": sum(row["interactions"] for row in rows),
                    "avg_length": None, "sparsity": None}]


def statistics_table(rows: list[dict]) -> str:
    """Rows of `statistics` as a markdown table, rounded as in the paper."""
    lines = ["| | Total Users | New Users | Total Items | New Items | Total Interactions "
             "| Avg Seq Len | Sparsity |", "|---|" + "---:|" * 7]
    formats = {"avg_length": "{:.2f}", "sparsity": "{:.4f}"}
    for row in rows:
        cells = ["NA" if value is None else formats.get(name, "{:,}").format(value)
                 for name, value in row.items() if name != "stage"]
        lines.append(f"| {row['stage']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
