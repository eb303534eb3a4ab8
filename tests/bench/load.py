"""Loading a checkpoint beside transformers and beside reading nothing but its bytes; and what an adapter's whole
training state takes on the disk.

    python -m tests.bench.load ours|transformers|bytes FOLDER warm|cold     one contender, in a process of its own
"""
from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.bench import race
from minipeso.continual import choose_trainable
from minipeso.files.hub import load_llama
from minipeso.runs.journal import Journal
from minipeso.runs.keeper import Keeper
from minipeso.progress import Progress
from minipeso.llama import Llama, LlamaConfig
from minipeso.lora import inject

DTYPE = torch.bfloat16
RANK, ALPHA = 8, 16


def empty(shape: LlamaConfig) -> Llama:
    """Without weights: on no device."""
    with torch.device("meta"):
        return Llama(shape).to(DTYPE)


def write_base(shape: LlamaConfig, folder: Path) -> Path:
    """Random weights in the Hub's layout, on the disk when this returns; the file."""
    generator, file = torch.Generator().manual_seed(0), folder / "model.safetensors"
    save_file({name: torch.empty(p.shape, dtype=DTYPE).normal_(float("norm" in name), 0.02, generator=generator)
               for name, p in empty(shape).named_parameters()}, file, {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(shape)}
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()
    return file


def theirs(folder: Path) -> torch.nn.Module:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return LlamaForCausalLM.from_pretrained(folder, dtype=DTYPE)


def read_bytes(folder: Path) -> None:
    """The file, into one buffer, again and again."""
    buffer = bytearray(1 << 23)
    with open(folder / "model.safetensors", "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


CONTENDERS: dict[str, Callable] = {"ours": lambda folder: load_llama(folder, DTYPE), "transformers": theirs,
                                   "bytes": read_bytes}


def weights_of(model: torch.nn.Module) -> dict[str, int]:
    """CRC-32 of every parameter's bytes, by its name in the checkpoint."""
    return {name: zlib.crc32(p.detach().flatten().view(torch.uint8).numpy()) for name, p in model.named_parameters()}


def same_weights(ours: dict[str, int], others: dict[str, int]) -> int:
    """How many tensors both sides have, byte for byte; FloatingPointError names one that differs."""
    wrong = sorted(name for name in ours.keys() | others.keys() if ours.get(name) != others.get(name))
    if wrong:
        race.refuse("load", f"{len(wrong)} of {len(ours)} tensors differ, the first is {wrong[0]}")
    return len(ours)


def check(folder: Path) -> str:
    ours, others = (race.child("tests.bench.load", name, folder, "check").said["weights"]
                    for name in ("ours", "transformers"))
    return f"{same_weights(ours, others)} tensors, byte for byte"


def load_race(file: Path, rounds: int, cache: str) -> list[str]:
    """A line for every contender: time, rate, ratio, and its peak of memory as a multiple of the file."""
    found = race.compare_children("tests.bench.load", {name: (name, file.parent, cache) for name in CONTENDERS}, rounds)
    size = file.stat().st_size
    lines = race.lines({name: [one.seconds for one in ones] for name, ones in found.items()}, size / 1e9, "GB")
    peaks = [max(one.said["peak"] for one in ones) / size for ones in found.values()]
    return [f"{line}   memory {peak:.2f} x the file" for line, peak in zip(lines, peaks, strict=True)]


def state_bytes(shape: LlamaConfig, folder: Path) -> tuple[int, int]:
    """(numbers that a later stage trains, bytes of PHASE.step-1 on the disk): adapters of all projections with
    AdamW's moments and the best copy, as a run saves them after an epoch. The base is never touched, nor allocated."""
    model = empty(shape).to_empty(device="cpu")
    inject(model, RANK, ALPHA)
    choose_trainable(model, "adapter")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    at = Progress(parameters, torch.optim.AdamW(parameters.values(), fused=True))
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    at.optimiser.step()
    at.step = 1
    Keeper.due = 0.0
    Keeper(folder, "peso-stage-2", "", Journal(folder / "metrics.jsonl", "peso")).end_epoch(at, 1.0)
    place = folder / "peso-stage-2.step-1"
    return sum(p.numel() for p in parameters.values()), sum(path.stat().st_size for path in place.iterdir())


def main(name: str, folder: Path, cache: str) -> None:
    """Loads once. A number of every page is read within the time, so that nothing is put off until later."""
    if cache == "cold":
        with open(folder / "model.safetensors") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if name == "transformers":
        import transformers.models.llama.modeling_llama  # noqa: F401  imports are not what is timed
    kept, seconds = [], []

    def run() -> None:
        began = time.perf_counter()
        kept.append(CONTENDERS[name](folder))
        for p in kept[0].parameters() if kept[0] is not None else ():
            p.detach().flatten()[::1024].max()
        seconds.append(time.perf_counter() - began)

    peak = race.peak_of(run)
    print(json.dumps({"seconds": seconds[0], "peak": peak, "weights": weights_of(kept[0]) if cache == "check" else {}}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
