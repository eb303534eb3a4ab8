"""What a finished run recommends: ten items per user, by the search that was evaluated, from all that the user has."""
import difflib
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from minipeso.config import UsageError
from minipeso.runs.run import Run


def histories(run: Run) -> dict[str, list[int]]:
    """{user's name in the source: the items taken in D_1 .. D_t, oldest first}."""
    taken: dict[int, list[int]] = {}
    for stage in run.data.stages[:run.stage]:
        taken |= {user: stage.history[user] + items for user, items in stage.current.items()}
    return {run.data.users[user] if run.data.users else str(user): taken[user] for user in sorted(taken)}


def top_items(run: Run, some: Sequence[list[int]], top: int = 10) -> list[list[tuple[int, float]]]:
    """The `top` (item, score) per history, best first. Items that share an ID share its score, lower numbers first."""
    cfg, best = run.cfg, [[] for _ in some]
    ranker = run.ranker(run.stage, beams=top)
    own = [set(items) if cfg.seen == "exclude" else set() for items in some]
    found = ranker.search(run.model, [items[-cfg.window:] for items in some], own)
    for i, codes, scores in tqdm(found, "recommend", len(some), leave=False, unit="user", delay=1):
        places = [(item, score) for code, score in zip(codes, scores) for item in ranker.items.get(code, ())]
        best[i] = [place for place in places if place[0] not in own[i]][:top]
    return best


def answers(run: Run, users: dict[str, list[int]]) -> Iterator[dict]:
    """One record per user, ready for JSON."""
    for (user, taken), best in zip(users.items(), top_items(run, list(users.values())), strict=True):
        yield {"user": user, "stage": run.stage, "history": [run.data.described(run.ids, item) for item in taken],
               "items": [run.data.described(run.ids, item) | {"score": round(score, 4)} for item, score in best]}


def recommend(run: Run, name: str) -> str:
    """History and recommendations of one user, to read; UsageError suggests users for an unknown name."""
    users = histories(run)
    if name not in users:
        near = difflib.get_close_matches(name, users, n=3, cutoff=0.6) or list(users)[:3]
        raise UsageError(f"no user {name!r} in D1 .. D{run.stage}\n{len(users):,} users have at least "
                         f"{run.cfg.min_events} items in one of these stages\nfor example {', '.join(near)}")
    answer = next(answers(run, {name: users[name]}))
    shown = [f"           {row['id']}  {row['title']}" for row in answer["history"][-run.cfg.window:]]
    return "\n".join([
        f"user {name}, D{run.stage}: {len(users[name])} items taken, the last {len(shown)} are the prompt", *shown,
        f"{run.cfg.method} recommends (log-probability, semantic ID, title)",
        *(f"{i:>2} {row['score']:7.2f} {row['id']}  {row['title']}" for i, row in enumerate(answer["items"], 1))])
