"""Training state, in memory and on disk: what a stage may change, to go back to it or go on from it.

On disk it is a folder without pickle that is there whole or not at all:

    FOLDER/state.safetensors   the tensors
    FOLDER/facts.json          everything else
    FOLDER/manifest.json       bytes and SHA-256 of both; written last, before the folder gets its name
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from minipeso.llama import Llama
from minipeso.lora import LoRALinear, adapters, rewrap


class CheckpointError(Exception):
    """A checkpoint cannot be used: exit code 3. Three lines: what, found, what to do."""


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


def write(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Commits by rename: a crash at any point leaves the old folder, or none, never half of one."""
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = {"state.safetensors": save({name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}),
             "facts.json": json.dumps(facts, indent=1, allow_nan=False).encode()}
    manifest = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    for name, data in {**files, "manifest.json": json.dumps(manifest, indent=1).encode()}.items():
        with open(part / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)


def read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, facts) of an intact checkpoint. A safetensors file alone would not notice a flipped
    bit, so both files are held against the manifest first; CheckpointError says what differs."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {name: (folder / name).read_bytes() for name in ("state.safetensors", "facts.json")}
        wrong = [f"{name}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}, the manifest has "
                 f"{manifest[name]['bytes']:,}, {manifest[name]['sha256'][:12]}"
                 for name, data in files.items() if manifest[name]["sha256"] != hashlib.sha256(data).hexdigest()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise CheckpointError(f"{folder} is not an intact checkpoint\n{wrong[0]}\ndelete it and run again")
    return load(files["state.safetensors"]), json.loads(files["facts.json"])
