"""Shared fixtures: where the real data lies, one thread and the same drawn cases on every machine."""
import os
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # small tensors gain nothing from more, and lose tenfold on busy cores

# A newcomer's run draws what CI has drawn. MINIPESO_FRESH=10 pytest: other cases at every start, ten times as many.
FRESH = int(os.environ.get("MINIPESO_FRESH", 0))
hypothesis.settings.register_profile("ours", derandomize=not FRESH, database=None, deadline=None)
hypothesis.settings.load_profile("ours")


def draws(n: int) -> hypothesis.settings:
    """A decorator beside @given: how many cases a property is tried on."""
    return hypothesis.settings(max_examples=n * max(FRESH, 1))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets: $MINIPESO_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("MINIPESO_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder} (set MINIPESO_DATA)")
    return folder
