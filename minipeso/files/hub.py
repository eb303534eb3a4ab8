"""Weights from the Hub, or a folder in its layout, into `Llama`: strict, one tensor at a time."""
from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minipeso.files.download import cached, content_hash, fetch_checkpoint, fetch_small
from minipeso.llama import Llama, LlamaConfig, Rotary

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def load_llama(name_or_path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Llama:
    """The model of a folder with config.json and model.safetensors (or its shards and index), or of a
    Hub repository, which is downloaded once.

    Every parameter must be there once, with its shape, and nothing else; a tied head shares its
    storage with the embedding. FileNotFoundError or ValueError names what is missing or wrong.
    """
    folder = checkpoint_folder(name_or_path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    missing = dict(model.named_parameters())  # a tied head appears once, as the embedding
    for file in weight_files(folder):
        for name, tensor in _tensors(file, config.tie_word_embeddings):
            expected = missing.pop(name, None)
            if expected is None or expected.shape != tensor.shape:
                found = f"{name} {tuple(tensor.shape)}"
                what = "unknown or double" if expected is None else f"expected {tuple(expected.shape)}"
                raise ValueError(f"{file} does not fit its config.json\n{found}: {what}\n"
                                 "use the config.json that belongs to these weights")
            _assign(model, name, tensor.to(device=device, dtype=dtype))
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the model's tensors\n"
                         f"the first is {next(iter(missing))}\ndownload the checkpoint again")
    model.model.rotary = Rotary(config).to(device, dtype)
    return model


def checkpoint_folder(name_or_path: str | Path, weights: bool = True) -> Path:
    """The folder itself, or that of the Hub repository "owner/name" in the cache, downloaded if need be (without
    its weights only config and tokenizer)."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if not REPOSITORY.fullmatch(str(name_or_path)):
        raise FileNotFoundError(f"no folder {folder} with a Llama checkpoint\nand no name of a Hub repository\n"
                                "pass a folder with config.json, tokenizer.json and model.safetensors, or owner/name")
    return (fetch_checkpoint if weights else fetch_small)(str(name_or_path))


def checkpoint_hash(folder: Path) -> str:
    """Of all that a checkpoint's model is made from. What the Hub's cache calls by its hash is not read again
    (download.verify has), a folder's own files are."""
    names = [folder / "config.json", folder / "tokenizer.json", *weight_files(folder)]
    return hashlib.sha256(json.dumps([[path.name, content_hash(path)] for path in names]).encode()).hexdigest()


def folder_at_hand(name_or_path: str | Path) -> Path | None:
    """The folder whose config.json is on this machine, the Hub's cache included; None if there is none. Asks nobody."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    found = cached(str(name_or_path), "config.json") if REPOSITORY.fullmatch(str(name_or_path)) else None
    return found and found.parent


def read_config(folder: str | Path) -> LlamaConfig:
    """LlamaConfig from folder/config.json; the error names the file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing\na checkpoint needs it beside its weights\n"
                                "download the checkpoint again")
    try:
        return LlamaConfig.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a Llama that minipeso knows\n{error}\n"
                         "use a Llama 3 checkpoint") from error


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards\nits weight_map cannot be read: {error!r}\n"
                             "download the checkpoint again") from error
        strange = [name for name in names if not SHARD.fullmatch(name)]
        if strange:  # a path from a file is not to be trusted
            raise ValueError(f"{index} names a strange file\n{strange[0]!r} is not model-0000N-of-0000M.safetensors\n"
                             "download the checkpoint again")
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing\nthe folder has "
                                    f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'no files'}\n"
                                    "download the checkpoint again")
    return [folder / name for name in names]


def _tensors(file: Path, tied: bool):
    """(name, tensor) of a safetensors file, less what carries no information. A tensor is a private view of the
    mapped file: nothing is copied until it is written to, changes its type or goes to a GPU."""
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys():
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # written by old versions; computed here
                if tied and name == "lm_head.weight":
                    continue  # the embedding under its second name
                tensor = f.get_tensor(name)
                if tensor.dtype not in FLOATS:
                    raise ValueError(f"{file} holds no plain weights\n{name} is {tensor.dtype}, known are "
                                     f"{', '.join(map(str, FLOATS))}\nuse a checkpoint that is not quantised")
                yield name, tensor
    except SafetensorError as error:
        raise ValueError(f"{file} is not an intact safetensors file\n{file.stat().st_size:,} bytes: {error}\n"
                         "delete it and download it again") from error


def _assign(model: Llama, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(tensor))
