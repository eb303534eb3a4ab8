"""Weights from the Hub, or from a folder in its layout, into `Llama`: strictly, one tensor after the other."""
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minipeso.files.download import cached, content_hash, fetch_checkpoint
from minipeso.llama import Llama, LlamaConfig

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_llama(name_or_path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Llama:
    """The model of a Hub repository, or of a folder with config.json and model.safetensors (or shards and index).
    FileNotFoundError or ValueError unless every parameter is there once, with its shape, and nothing else."""
    folder = checkpoint_folder(name_or_path)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    missing = dict(model.named_parameters())  # a tied head appears once, as the embedding
    for file in weight_files(folder):
        for name, tensor in _tensors(file, config.tie_word_embeddings):
            expected = missing.pop(name, None)
            if expected is None or expected.shape != tensor.shape:
                what = "unknown or double" if expected is None else f"expected {tuple(expected.shape)}"
                raise ValueError(f"{file} does not fit its config.json\n{name} {tuple(tensor.shape)}: {what}\n"
                                 "use the config.json that belongs to these weights")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(tensor.to(device=device, dtype=dtype)))
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the model's tensors\n"
                         f"the first is {next(iter(missing))}\ndownload the checkpoint again")
    return model


def checkpoint_folder(name_or_path: str | Path, weights: bool = True) -> Path:
    """The folder itself, or that of the Hub's repository "owner/name", downloaded where missing."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if not REPOSITORY.fullmatch(str(name_or_path)):
        raise FileNotFoundError(f"no folder {folder} with a Llama checkpoint\nand no name of a Hub repository\n"
                                "pass a folder with config.json, tokenizer.json and model.safetensors, or owner/name")
    return fetch_checkpoint(str(name_or_path), weights)


def folder_at_hand(name_or_path: str | Path) -> Path | None:
    """The folder, or the one in the Hub's cache; None if its config.json is not on this machine. Makes no request."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    config = cached(str(name_or_path), "config.json") if REPOSITORY.fullmatch(str(name_or_path)) else None
    return config and config.parent


def checkpoint_hash(folder: Path) -> str:
    """The hash of all that a checkpoint's model is made from. Files in the Hub's cache are named by theirs."""
    names = [folder / "config.json", folder / "tokenizer.json", *weight_files(folder)]
    return hashlib.sha256(json.dumps([[path.name, content_hash(path)] for path in names]).encode()).hexdigest()


def read_config(folder: str | Path) -> LlamaConfig:
    """LlamaConfig of folder/config.json; the error names the file."""
    path = _existing(Path(folder) / "config.json")
    try:
        return LlamaConfig.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        what = f"{path} does not describe a Llama that minipeso knows"
        raise ValueError(f"{what}\n{error}\nuse a Llama 3 checkpoint") from error


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if strange := [name for name in names if not SHARD.fullmatch(name)]:  # a path from a file is not trusted
                raise ValueError(f"{strange[0]!r}, expected model-0000N-of-0000M.safetensors")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{index} is no index of shards\nits weight_map: {error}"
            raise ValueError(f"{what}\ndownload the checkpoint again") from error
    return [_existing(folder / name) for name in names]


def _existing(path: Path) -> Path:
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.iterdir())) or "no files"
        raise FileNotFoundError(f"{path} is missing\nthe folder has {there}\ndownload the checkpoint again")
    return path


def _tensors(file: Path, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a safetensors file, each a private view of the mapped file: copied only when written to."""
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys():
                if name.endswith("rotary_emb.inv_freq") or tied and name == "lm_head.weight":
                    continue  # nothing new: old versions' frequencies; the embedding under its second name
                tensor = f.get_tensor(name)
                if tensor.dtype not in FLOATS:
                    raise ValueError(f"{file} holds no plain weights\n{name} is {tensor.dtype}, known are "
                                     f"{', '.join(map(str, FLOATS))}\nuse a checkpoint that is not quantised")
                yield name, tensor
    except SafetensorError as error:
        raise ValueError(f"{file} is not an intact safetensors file\n{file.stat().st_size:,} bytes: {error}\n"
                         "delete it and download it again") from error
