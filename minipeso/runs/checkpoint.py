"""Training state, in memory and on disk: what a stage may change, to go back to it or go on from it.

On disk it is a folder without pickle that is there whole or not at all (disk.py):

    FOLDER/state.safetensors   the tensors
    FOLDER/facts.json          everything else
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minipeso.runs import disk
from minipeso.runs.disk import CheckpointError
from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapters, rewrap


class Snapshot(NamedTuple):
    """All that training may have changed: methods share one D_1 model by going back to it."""

    tensors: dict[str, Tensor]
    tied: bool
    adapter: type[LoRALinear]


def snapshot(model: Llama, tables: bool = False) -> Snapshot:
    """Adapters with anchors and histories, rows of new tokens; with tables=True the whole token tables."""
    layers = dict(adapters(model))
    state = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()
             if key != "weight"}
    ends = ("embed_tokens.rows", "lm_head.rows") + tables * ("embed_tokens.weight", "lm_head.weight")
    state |= {name: t for name, t in model.state_dict().items() if name.endswith(ends)}
    return Snapshot({name: t.detach().clone() for name, t in state.items()},
                    model.lm_head is model.model.embed_tokens, type(next(iter(layers.values()))))


@torch.no_grad()
def restore(model: Llama, saved: Snapshot) -> None:
    """Back to a snapshot, bit for bit: class of adapter, tying and every tensor."""
    rewrap(model, saved.adapter)
    if saved.tied:
        model.lm_head = model.model.embed_tokens
    else:
        model.untie()
    for name, layer in adapters(model):
        own = {key: saved.tensors[f"{name}.{key}"] for key in layer.state_dict() if key != "weight"}
        layer.load_state_dict(own | {"weight": layer.weight})
    state = model.state_dict()
    for name in saved.tensors.keys() & state.keys():
        if "embed_tokens" in name or "lm_head" in name:
            state[name].copy_(saved.tensors[name])


def packed(saved: Snapshot) -> tuple[dict[str, Tensor], dict]:
    """A snapshot as what `write` takes."""
    return saved.tensors, {"tied": saved.tied, "adapter": saved.adapter.__name__}


def unpacked(tensors: dict[str, Tensor], facts: dict, *kinds: type[LoRALinear]) -> Snapshot:
    """The snapshot again; its class is one of `kinds`, by name."""
    return Snapshot(tensors, facts["tied"], {kind.__name__: kind for kind in kinds}[facts["adapter"]])


def write(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Commits both; see disk.commit."""
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    disk.commit(folder, {"state.safetensors": save(on_cpu), "facts.json": json.dumps(facts, allow_nan=False).encode()})


def read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, facts) of an intact checkpoint. A safetensors file alone would not notice a flipped bit,
    so both files are held against the manifest first; CheckpointError says what differs."""
    files = disk.read(folder)
    try:
        return load(files["state.safetensors"]), json.loads(files["facts.json"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of minipeso\n{type(error).__name__}: {error}\n"
                              "delete it and run again") from error


def check(folder: Path) -> None:
    """Every checkpoint in `folder` is read; a broken one is reported and removed, so that the one before
    it counts. CheckpointError, and nothing removed, if there are checkpoints and none is intact."""
    disk.sweep(folder)
    places, broken = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else [], {}
    for place in places:
        try:
            read(place)
        except CheckpointError as error:
            broken[place] = " ".join(str(error).splitlines()[:2])
    if broken and len(broken) == len(places):
        raise CheckpointError(f"no checkpoint in {folder} is intact\n{'; '.join(broken.values())}\n"
                              "start anew, without --resume")
    for place, reason in broken.items():
        print(f"warning: {reason}; it is removed, and what it held is computed again", file=sys.stderr)
        disk.remove(place)
