"""The authors' released files: blocks D_1 .. D_5 of users with item numbers, and the items' semantic IDs."""
import json
import re
from pathlib import Path

from minipeso.files.reviews import BLOCK_FILES, find_one, matching, unfit
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Stage

INDEX_FILES = re.compile(r"(?!\.).*\.index.*\.json")


def read_release(folder: str | Path) -> tuple[list[Stage], Path]:
    """The stages of the authors' block files, and the path of their semantic IDs.
    C.all.block_k.json = {user: {"previous_block": history, "current_block": items}} is stage k + 1; some may lack."""
    folder, blocks = Path(folder), {}
    for path in matching(folder, BLOCK_FILES):
        number = int(BLOCK_FILES.fullmatch(path.name)[1]) + 1
        if number in blocks:
            raise unfit(folder, f"two files hold stage {number}", "keep one data set per folder")
        blocks[number] = path
    codes_path = find_one(folder, INDEX_FILES, "file of semantic IDs (C.index*.json)")
    if not blocks:
        raise unfit(folder, "no stage found", "expected C.all.block_0.json, C.all.block_1.json ...")
    return [_read_block(path, number) for number, path in sorted(blocks.items())], codes_path


def write_release(folder: Path, name: str, stages: list[Stage], ids: SemanticIDs) -> None:
    """The inverse: blocks and IDs of a data set called `name`, for the authors' code or `read_release`."""
    ids.save(folder / f"{name}.index.json")
    for stage in stages:
        block = {user: {"previous_block": [*map(str, stage.history[user])], "current_block": [*map(str, items)]}
                 for user, items in stage.current.items()}
        (folder / f"{name}.all.block_{stage.number - 1}.json").write_text(json.dumps(block))


def _read_block(path: Path, number: int) -> Stage:
    try:
        users = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(users, dict):
            raise ValueError(f"it holds a {type(users).__name__}")
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{path} is no block of the release\nnot JSON of users: {fault}\n"
                         'expected {"12": {"previous_block": [...], "current_block": [...]}}') from fault
    history, current = {}, {}
    for key, user in users.items():
        try:
            history[int(key)], current[int(key)] = map(_items, (user["previous_block"], user["current_block"]))
            if int(key) < 0 or not current[int(key)]:
                raise ValueError("a negative user or an empty current_block")
        except (ValueError, TypeError, KeyError) as fault:
            raise ValueError(f"not a user of a release block: {fault!r}\n{path}, user {key!r}: {str(user)[:80]}\n"
                             "expected previous_block and current_block, lists of item numbers") from fault
    return Stage(number, *(dict(sorted(part.items())) for part in (history, current)))


def _items(value: object) -> list[int]:
    """["65", "66"] or [65, 66] as whole numbers >= 0; ValueError for anything else."""
    if not isinstance(value, list) or not all(str(v).isdecimal() for v in value):
        raise ValueError("not a list of item numbers, or a negative item among them")
    return [int(v) for v in value]
