"""A finished run, opened again from its folder to be asked: the model with one stage's adapter. Nothing is written."""
import contextlib
import io
from dataclasses import replace
from pathlib import Path

from minipeso.config import UsageError
from minipeso.files.peft import load_peft
from minipeso.runs.checkpoints import read
from minipeso.runs.identity import read_settings
from minipeso.runs.run import Run


def reopen(folder: Path, stage: int = 0) -> Run:
    """The run in `folder` after D_stage (0: the last), with .stage, .adapter (its folder) and .known, the items that
    exist then. FileNotFoundError, UsageError or CheckpointError if a part is missing, changed or not the run's."""
    root, cfg = read_settings(folder)
    places = [*root.glob("adapters/stage-1/adapter_config.json"), *folder.glob("adapters/stage-*/adapter_config.json")]
    adapters = {int(place.parent.name.removeprefix("stage-")): place.parent for place in places}  # D_1's is everybody's
    stage = stage or max(adapters, default=0)
    if stage not in adapters:
        there = ", ".join(f"D{t}" for t in sorted(adapters)) or "none"
        raise UsageError(f"no adapter of {f'D{stage}' if stage else 'any stage'} in {folder}\nthere are {there}\n"
                         "choose one of them, or pass a run of an LLM method that came to its end")
    run = Run(replace(read_settings(root)[1], out=str(root), resume=True), writes=False)
    with contextlib.redirect_stdout(io.StringIO()):
        run.load_data()
        run.load_base()
    read(adapters[stage])  # its hashes
    load_peft(run.model, adapters[stage])
    run.model.eval()
    run.cfg, run.stage, run.adapter, run.known = cfg, stage, adapters[stage], run.known[stage - 1]
    return run
