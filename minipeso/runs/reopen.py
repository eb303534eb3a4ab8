"""A finished run, opened again from its folder: settings, data, semantic IDs, and the model with one stage's adapter."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from minipeso.runs import checkpoint, disk, prepare
from minipeso.config import Config, UsageError
from minipeso.files.download import content_hash
from minipeso.llama import Llama
from minipeso.files.peft import load_peft
from minipeso.runs.report import HASHES, digest
from minipeso.semantic_ids import SemanticIDs
from minipeso.tokens import Template


class Reopened(NamedTuple):
    cfg: Config
    data: prepare.Dataset
    ids: SemanticIDs
    template: Template
    tokenizer: Tokenizer | None
    model: Llama
    stage: int

    @property
    def known(self) -> list[int]:
        """The items that exist at this stage."""
        return self.data.known[self.stage - 1]


def reopen(folder: Path, stage: int = 0) -> Reopened:
    """The run in `folder` after D_stage (0: the last). FileNotFoundError or UsageError if a part is missing
    or the data is no longer that of the run."""
    place, stage = adapter_folder(folder, stage)
    root, cfg, then = settings(folder)
    world = root / "world"
    data = prepare.load_dataset(dataclasses.replace(cfg, dataset=str(world)) if cfg.dataset == "demo" else cfg, world)
    for name, now in prepare.fingerprints(cfg, data).items():
        if now != then.get(name):
            raise UsageError(f"what {folder} was made from is not there any more\n{HASHES[name]} the hash {now[:12]}, "
                             f"in {root / 'config.json'} {str(then.get(name))[:12]}\nbring it back, or run anew")
    ids = SemanticIDs.load(root / "semantic_ids.json", cfg.codes)
    if content_hash(root / "semantic_ids.json") != then.get("ids"):
        raise UsageError(f"{root / 'semantic_ids.json'} is not what the run wrote\nits hash is not that in config.json\n"
                         "bring it back, or run anew")
    tokenizer = prepare.load_tokenizer(cfg)
    template = prepare.make_template(cfg, ids, tokenizer)
    prepare.agree_on_tokens(root / "tokens.json", ids, template)
    model = base_model(root, cfg, ids)
    disk.read(place)
    load_peft(model, place)
    return Reopened(cfg, data, ids, template, tokenizer, model.eval(), stage)


def settings(folder: Path) -> tuple[Path, Config, dict[str, str]]:
    """(the run's own folder, Config, the hashes of what it was made from). `folder` may be that of a method it was compared with."""
    root = folder if (folder / "config.json").is_file() else folder.parent
    path = root / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run\nit has no config.json\npass a folder that train.py --out left")
    try:
        values = json.loads(path.read_text())
        then, _ = dict(values.pop("hashes")), values.pop("versions")
        strange = sorted(values.keys() - Config.__dataclass_fields__.keys())
        cfg = Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name not in strange})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} is not a run's settings\n{type(error).__name__}: {error}\nrun anew") from error
    if strange:
        raise UsageError(f"{path} has settings that this version does not know\n{', '.join(strange)}\n"
                         "use the minipeso that made the run")
    if digest(cfg) != then.get("settings"):
        raise UsageError(f"{path} is not what the run wrote\nits settings have the hash {digest(cfg)}, the run's is "
                         f"{then.get('settings')}\nundo the change, or run anew")
    return root, cfg if folder == root else dataclasses.replace(cfg, method=folder.name), then


def adapter_folder(folder: Path, stage: int = 0) -> tuple[Path, int]:
    """Where the adapter after D_stage lies, and the stage; D_1's is shared by all methods of a run."""
    root = settings(folder)[0]
    places = {1: root / "adapters" / "stage-1"} | {int(p.name.removeprefix("stage-")): p
                                                   for p in folder.glob("adapters/stage-*")}
    there = sorted(t for t, place in places.items() if (place / "adapter_config.json").is_file())
    if not there or stage and stage not in there:
        remedy = "choose one of them" if there else "pass a run of an LLM method that came to its end"
        raise UsageError(f"no adapter of {f'D{stage}' if stage else 'any stage'} in {folder}\n"
                         f"there are {', '.join(f'D{t}' for t in there) or 'none'}\n{remedy}")
    return places[stage or there[-1]], stage or there[-1]


@torch.no_grad()
def base_model(root: Path, cfg: Config, ids: SemanticIDs) -> Llama:
    """The model without an adapter: the checkpoint's, or what the run learnt on D_0."""
    model = prepare.load_model(cfg)
    model.grow(ids.codes.shape[1] * ids.n_codes, torch.Generator().manual_seed(cfg.seed), cfg.init)
    if prepare.from_scratch(cfg):
        tensors, _ = checkpoint.read(root / "checkpoints" / "base")
        own = dict(model.named_parameters())
        if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
            raise checkpoint.CheckpointError(f"{root / 'checkpoints' / 'base'} is not the base of this run\n"
                                             f"it has {len(tensors)} tensors, --base {cfg.base} {len(own)}\nrun anew")
        for name, p in own.items():
            p.copy_(tensors[name])
    return model
