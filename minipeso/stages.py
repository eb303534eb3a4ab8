"""Who is trained on what, and when: the stages D_1 .. D_T of continual recommendation.

The paper's Section 3 and Appendix C.1: a chronological cut, leave-one-out per user and stage, histories of at most 20
items. All leakage would start here, so nothing else decides what an example may see."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ABSENT = 500  # users of U_I who are asked at a stage: their mean is known well enough, and beams cost time


@dataclass(frozen=True, eq=False)
class Interactions:
    """Every (user, item) once, in the order (time, user key, item key); no number depends on the order of the file."""
    user: np.ndarray  # (n,) int64, index into users
    item: np.ndarray  # (n,) int64, index into items
    time: np.ndarray  # (n,) int64, in ms
    users: list[str]  # the raw keys, sorted
    items: list[str]
    bad: dict[str, int] = field(default_factory=dict)  # unreadable lines, by reason
    duplicates: int = 0  # lines left out: the same user had the same item earlier
    core: int = 0  # the events of the user or item with the fewest, before the span is cut out


def day(ms: int) -> str:
    """A time in ms as a date, for messages."""
    return str(np.datetime64(int(ms), "ms"))[:10]


@dataclass(frozen=True)
class Stage:
    """D_t: each active user's items of earlier stages and of this one, oldest first; users in increasing order."""
    number: int  # t, from 1
    history: dict[int, list[int]]  # [] for a new user
    current: dict[int, list[int]]

    @property
    def users(self) -> list[int]:
        return list(self.current)

    @property
    def items(self) -> set[int]:
        """The items taken in this stage."""
        return set().union(*self.current.values())

    @property
    def interactions(self) -> int:
        return sum(map(len, self.current.values()))

    def training(self, user: int) -> list[int]:
        """The user's items of this stage that may be learnt: all but the last two, for validation and test."""
        return self.current[user][:-2]


class Example(NamedTuple):
    """One next-item question: after `history` (oldest first, a window), the user took `target`."""
    user: int
    history: tuple[int, ...]
    target: int
    stage: int


def cut(interactions: Interactions, first: float = 0.6, stages: int = 5, min_events: int = 5) -> list[Stage]:
    """The natural chronological split (Section 3, setting 1; Appendix C.1): 60 % are D_1, then equal parts by count.

    Users with fewer than `min_events` events in a stage are dropped from it; a history is what survived of earlier
    stages. Paper: "for each incremental stage, we filter out users with fewer than five". Release, here: D_1 too."""
    time = interactions.time
    span = f"{len(time)} interactions" + (f", {day(time.min())} to {day(time.max())}" if len(time) else "")
    if not 0 < first < 1 or not 1 <= stages <= len(time) or time.min() == time.max():
        raise ValueError(f"cannot cut into {stages} stages by time, the first of {first:g}\nfound {span}\n"
                         "use more data, fewer stages or more years")
    order = np.lexsort((interactions.item, interactions.user, time))
    start = int(round(first * len(order), 6))  # the floor, but 0.57 * 100 = 56.99999 is 57
    bounds = [start + (len(order) - start) * k // (stages - 1) for k in range(stages - 1)]
    cuts, past = [], {}
    for number, part in enumerate(np.split(order, bounds), start=1):
        current = by_user(interactions.user[part], interactions.item[part], min_events)
        cuts.append(Stage(number, {u: past.get(u, []) for u in current}, current))
        past |= {u: past.get(u, []) + items for u, items in current.items()}
    if not cuts[0].current:
        raise ValueError(f"no user has {min_events} events in D1\nfound {span}\nuse more data or a smaller min_events")
    return cuts


def by_user(user: np.ndarray, item: np.ndarray, min_events: int) -> dict[int, list[int]]:
    """{user: items, in the order given} of the users with at least `min_events` events."""
    users, starts = np.unique(np.sort(user), return_index=True)
    lists = np.split(item[np.argsort(user, kind="stable")], starts[1:])  # groups users, keeps time order
    return {u: items.tolist() for u, items in zip(users.tolist(), lists) if len(items) >= min_events}


def user_disjoint(stages: Sequence[Stage], seed: int) -> list[Stage]:
    """The pseudo user-disjoint split (Section 3, setting 2): users in a random order, each with all stages' items, fill
    D_1 up to its natural number of interactions, then D_2, ... No one has a history."""
    whole: dict[int, list[int]] = {}
    for stage in stages:
        whole |= {user: whole.get(user, []) + items for user, items in stage.current.items()}
    # a stream of its own: with `subset`'s, those drawn there would all come first here, in D_1
    users = np.random.default_rng([seed, 1]).permutation(sorted(whole))
    lengths = np.array([len(whole[u]) for u in users.tolist()])
    full = np.cumsum([stage.interactions for stage in stages])
    place = np.searchsorted(full, np.cumsum(lengths) - lengths, side="right")  # (users,), as an index into stages
    own = [sorted(users[place == k].tolist()) for k in range(len(stages))]
    return [Stage(s.number, {u: [] for u in mine}, {u: whole[u] for u in mine}) for s, mine in zip(stages, own)]


def subset(stages: Sequence[Stage], n_users: int, seed: int) -> list[Stage]:
    """The same stages for n_users drawn from all stages together, so each shrinks in proportion; nested per seed."""
    users = sorted(set().union(*(stage.current for stage in stages)))
    chosen = set(np.random.default_rng(seed).permutation(users)[:max(n_users, 0)].tolist())
    smaller = [Stage(stage.number, *({u: side[u] for u in stage.current if u in chosen}
                                     for side in (stage.history, stage.current))) for stage in stages]
    if not smaller[0].current:
        raise ValueError(f"none of {n_users} drawn users in D{stages[0].number}\nthere are {len(users)}\nask for more")
    return smaller


def examples(stage: Stage, part: str, window: int = 20) -> list[Example]:
    """Leave-one-out per user and stage. train: every item of `Stage.training`; valid: current[-2]; test: current[-1].
    A history is the last `window` of all that came before, earlier stages and the validation item included; a new
    user's first item has an empty one, as in the Release. A user with one item has only a test."""
    made = []
    for user, current in stage.current.items():
        full = stage.history[user] + current
        start = len(stage.history[user])
        held_out, last = start + len(stage.training(user)), max(start, len(full) - 1)
        targets = dict(train=range(start, held_out), valid=range(held_out, last), test=range(last, len(full)))[part]
        made += [Example(user, tuple(full[max(0, i - window):i]), full[i], stage.number) for i in targets]
    return made


def questions(stages: Sequence[Stage], window: int = 20) -> list[Example]:
    """The test questions of the last stage: first its users' (U_A), then those of the users of earlier stages who are
    not in it (U_I), each with its last known one; of ABSENT at most, drawn by the stage's number."""
    last = {e.user: e for stage in stages[:-1] for e in examples(stage, "test", window)}
    absent = sorted(last.keys() - stages[-1].current.keys())
    drawn = np.random.default_rng(stages[-1].number).permutation(absent)[:ABSENT]
    return examples(stages[-1], "test", window) + [last[user] for user in sorted(drawn.tolist())]


def had(stages: Sequence[Stage]) -> dict[int, set[int]]:
    """What every user has had before its last test question, validation items included: no target of a later one."""
    return {user: {*stage.history[user], *items[:-1]} for stage in stages for user, items in stage.current.items()}


def statistics(stages: Sequence[Stage]) -> list[dict]:
    """The paper's Table 4 and a row for all stages. New is a user without a history, an item in no stage or history."""
    rows, seen = [], set()
    for stage in stages:
        n, m, k = stage.interactions, len(stage.users), len(stage.items)
        seen.update(*stage.history.values())
        rows.append({"stage": f"D{stage.number}", "users": m, "new_users": list(stage.history.values()).count([]),
                     "items": k, "new_items": len(stage.items - seen), "interactions": n,
                     "avg_length": n / m if n else None, "sparsity": 1 - n / (m * k) if n else None})
        seen |= stage.items
    users, items = (len(set().union(*sets)) for sets in zip(*((stage.users, stage.items) for stage in stages)))
    whole = {"stage": f"D{stages[0].number}:{stages[-1].number}", "users": users, "items": items,
             "interactions": sum(row["interactions"] for row in rows)}
    return rows + [dict.fromkeys(rows[0]) | whole]
