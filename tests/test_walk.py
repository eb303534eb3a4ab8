"""docs/walk.md is of the demo as it is: python docs/walk.py makes it anew."""
import json
import math
import runpy
from pathlib import Path

import pytest

from minipeso.runs.setup import fingerprints, load_dataset

DOCS = Path(__file__).parents[1] / "docs"
walk = runpy.run_path(DOCS / "walk.py")


def test_the_walk_is_not_stale(tmp_path):
    """Page = text + stored numbers; they are of today's settings and world, which no CPU changes, and fit together."""
    facts = json.loads((DOCS / "walk.json").read_text())
    assert walk["render"](facts) == (DOCS / "walk.md").read_text(), "the page or its text was changed by hand"
    cfg = walk["from_args"](facts["flags"])
    data = fingerprints(load_dataset(cfg, tmp_path / "world"))["data"]
    assert (facts["settings"], facts["data"]) == (walk["stored"](cfg), data), "run docs/walk.py again"
    assert -sum(facts["each"]) / facts["levels"] == pytest.approx(facts["loss"], abs=1e-3)
    assert [row["hit"] for row in facts["ten"]].index(True) + 1 == facts["user"]["rank"]
    assert facts["user"]["ndcg"] == pytest.approx(1 / math.log2(facts["user"]["rank"] + 1))
