"""The authors' released files: blocks D_1 .. D_5 of users with item numbers, and the items' semantic IDs."""
from __future__ import annotations

import json
import re
from pathlib import Path

from minipeso.files.reviews import BLOCK_FILES, find_one, listing, matching
from minipeso.stages import Stage

INDEX_FILES = re.compile(r"(?!\.).*\.index.*\.json")


def read_release(folder: str | Path) -> tuple[list[Stage], Path]:
    """The stages of the authors' block files, and the path of their semantic IDs.

    C.all.block_k.json = {user: {"previous_block": [ids], "current_block": [ids]}} is stage k + 1;
    previous_block is the history. Blocks that are not there (the first one of Instruments was not
    obtainable) leave a gap in the numbers. Errors: ValueError naming the file and the user.
    """
    blocks: dict[int, Path] = {}
    for path in matching(Path(folder), BLOCK_FILES):
        number = int(BLOCK_FILES.fullmatch(path.name)[1]) + 1
        if number in blocks:
            raise ValueError(f"two files hold stage {number}\n{listing(Path(folder))}\n"
                             "keep one data set per folder")
        blocks[number] = path
    codes_path = find_one(folder, INDEX_FILES, "file of semantic IDs (C.index*.json)")
    if not blocks:
        raise ValueError(f"no stage found\n{listing(Path(folder))}\n"
                         "expected C.all.block_0.json, C.all.block_1.json ...")
    return [_read_block(path, number) for number, path in sorted(blocks.items())], codes_path


def _read_block(path: Path, number: int) -> Stage:
    try:
        block = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise ValueError(f"not JSON\n{path}: {fault}\nfetch the file again") from fault
    if not isinstance(block, dict):
        raise ValueError(f"not a block of the release\n{path} holds a {type(block).__name__}\n"
                         'expected {"12": {"previous_block": [...], "current_block": [...]}}')
    history, current = {}, {}
    for key, row in block.items():
        try:
            user = int(key)
            history[user] = _item_numbers(row["previous_block"])
            current[user] = _item_numbers(row["current_block"])
            if user < 0 or not current[user]:
                raise ValueError("a negative user or an empty current_block")
        except (ValueError, TypeError, KeyError) as fault:
            raise ValueError(f"not a user of a release block: {fault!r}\n{path}, user {key!r}: "
                             f"{str(row)[:80]}\nexpected previous_block and current_block, "
                             "lists of item numbers") from fault
    return Stage(number, {u: history[u] for u in sorted(history)},
                 {u: current[u] for u in sorted(current)})


def _item_numbers(value: object) -> list[int]:
    """["65", "66"] or [65, 66] as whole numbers >= 0; anything else is a ValueError."""
    if not isinstance(value, list) or not all(type(v) in (str, int) for v in value):
        raise ValueError("not a list of item numbers")
    items = [int(v) for v in value]
    if min(items, default=0) < 0:
        raise ValueError("a negative item number")
    return items
