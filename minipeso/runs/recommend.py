"""What a finished run recommends: ten real items for a user, with titles, scores and semantic IDs.

The history is all that the user took up to the stage, its last items included, and the search is the one that
was evaluated: log-probabilities under the whole vocabulary, over the items that exist at the stage.
"""
from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minipeso.beam import beam_search
from minipeso.config import UsageError
from minipeso.evaluate import Ranker
from minipeso.runs.reopen import Reopened
from minipeso.semantic_ids import LETTERS


def histories(run: Reopened) -> dict[int, list[int]]:
    """{user: everything taken in D_1 .. D_t, oldest first}, users ascending."""
    found: dict[int, list[int]] = {}
    for stage in run.data.stages[:run.stage]:
        found |= {user: stage.history[user] + items for user, items in stage.current.items()}
    return dict(sorted(found.items()))


def name_of(run: Reopened, user: int) -> str:
    return run.data.users[user] if run.data.users else str(user)


def find_user(run: Reopened, name: str, known: dict[int, list[int]]) -> int:
    """The user's number by the source's name; UsageError suggests the nearest."""
    users = {name_of(run, user): user for user in known}
    if name not in users:
        near = difflib.get_close_matches(name, users, n=3, cutoff=0.6) or list(users)[:3]
        raise UsageError(f"no user {name!r} in D1 .. D{run.stage}\n{len(users):,} users have at least {run.cfg.min_events} "
                         f"items in one of these stages\nfor example {', '.join(near)}")
    return users[name]


def top_items(run: Reopened, some: Sequence[list[int]], top: int = 10, ranker: Ranker | None = None
              ) -> list[list[tuple[int, float]]]:
    """[(item, score), ...] a history, best first: real items, each once; those that share an ID follow one
    another, by number, with the ID's score. `ranker`: the one of an earlier call, whose trie is as good."""
    ranker = ranker or Ranker(run.ids, run.known, run.template)
    prompts = [run.template.prompt(taken[-run.cfg.window:]).to(run.model.device) for taken in some]
    codes, scores = beam_search(run.model, prompts, ranker.trie.to(run.model.device), run.template.first_token,
                                max(top, run.cfg.beams))
    found = []
    for row, row_scores in zip(codes.tolist(), scores.tolist(), strict=True):
        found.append([(item, score) for code, score in zip(row, row_scores) if code[0] >= 0
                      for item in run.ids.item_of(code) if item in ranker.place][:top])
    return found


def answers(run: Reopened, users: dict[int, list[int]], progress: Callable[[int], None] = lambda n: None) -> Iterator[dict]:
    """One record a user, searched cfg.eval_batch at a time."""
    pairs, ranker = list(users.items()), Ranker(run.ids, run.known, run.template)
    for start in range(0, len(pairs), run.cfg.eval_batch):
        batch = pairs[start:start + run.cfg.eval_batch]
        for (user, taken), found in zip(batch, top_items(run, [taken for _, taken in batch], ranker=ranker), strict=True):
            yield {"user": name_of(run, user), "stage": run.stage, "history": [described(run, item) for item in taken],
                   "items": [described(run, item) | {"score": round(score, 4)} for item, score in found]}
        progress(len(batch))


def described(run: Reopened, item: int) -> dict:
    title = run.data.texts[item] if run.data.texts else f"item {run.data.keys[item]}"
    tokens = (f"<{LETTERS[level]}_{code}>" for level, code in enumerate(run.ids.codes[item].tolist()))
    return {"item": run.data.keys[item], "id": "".join(tokens), "title": title}


def recommend(run: Reopened, name: str) -> str:
    """History and recommendations of one user, to read."""
    known = histories(run)
    user = find_user(run, name, known)
    answer = next(answers(run, {user: known[user]}))
    shown = answer["history"][-run.cfg.window:]
    lines = [f"user {answer['user']}, D{run.stage}: {len(answer['history'])} items taken, the last {len(shown)} are the prompt"]
    lines += [f"           {row['id']}  {row['title']}" for row in shown]
    lines += [f"{run.cfg.method} recommends (log-probability, semantic ID, title)"]
    lines += [f"{place:>2} {row['score']:7.2f} {row['id']}  {row['title']}" for place, row in enumerate(answer["items"], start=1)]
    return "\n".join(lines)


def recommend_all(run: Reopened, path: Path, progress: Callable[[int], None] = lambda n: None) -> int:
    """One JSON line a user, as they are found; the file gets its name when it is whole. -> users"""
    known, part = histories(run), Path(f"{path}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            for answer in answers(run, known, progress):
                file.write(json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return len(known)
