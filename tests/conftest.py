"""Shared fixtures: where the real data lies, and one thread so that results do not depend on the machine."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors gain nothing from more, and lose tenfold on busy cores


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets: $MINIPESO_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("MINIPESO_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder} (set MINIPESO_DATA)")
    return folder
