"""Runs small enough to be made by the dozen: a world of 60 users, a Llama of 2,000 parameters, toy folders."""
from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import train
from minipeso import config
from minipeso.runs.run import Run
from minipeso.runs.run import set_up as set_up_run
from minipeso.llama import Llama, LlamaConfig
from minipeso.semantic_ids import SemanticIDs
from minipeso.synthetic import ADJECTIVES, DEPARTMENTS
from minipeso.tokens import QUESTIONS

MICRO = dict(world_users=60, world_items=60, stages=3, levels=2, codes=8, latent=4, rqvae_hidden=(16,), rqvae_epochs=2,
             text_width=16, hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16, base_epochs=1, base_lr=3e-3,
             rank=2, lr=1e-3, later_lr=0.5, epochs=1, batch=8, beams=10, compare="single")
WORDS = 256  # of the toy checkpoint


def micro(out: Path, **changes) -> config.Config:
    return config.resolve(MICRO | {"out": str(out)} | changes)


def flags(**changes) -> list[str]:
    """Settings as a command line."""
    line = []
    for name, value in changes.items():
        flag = "--" + ("lambda" if name == "lam" else name.replace("_", "-"))
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        line += [flag] if value is True else [flag, text]
    return line


def run(cfg: config.Config) -> str:
    """train.main in this process -> what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        train.main(cfg)
    return printed.getvalue()


def set_up(cfg: config.Config) -> Run:
    """Data, IDs, base and a new adapter: all that train.py has before D_1."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return set_up_run(cfg)


def fingerprint(out: Path) -> dict[str, object]:
    """Everything a run computed, without what it merely repeats of its settings or measures of time."""
    found: dict[str, object] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.name == "results.json":
            results = json.loads(path.read_text())
            found[name] = {part: results[part] for part in ("stages", "average", "references")}
        elif path.name in ("ranks.json", "metrics.jsonl", "semantic_ids.json", "adapter_model.safetensors"):
            found[name] = path.read_bytes()
    return found


def checkpoint(folder: Path, seed: int = 0, words: int = WORDS) -> Path:
    """A random Llama with a tokenizer of whole words, in the Hub's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = (kind for kinds in DEPARTMENTS.values() for kind in kinds)
    text = " ".join([*QUESTIONS.values(), *ADJECTIVES, *DEPARTMENTS, *kinds])
    vocabulary = ["<unk>", "<|begin_of_text|>", "<|end_of_text|>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    vocabulary += [f"reserved{i}" for i in range(WORDS - len(vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = dict(vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=True,
                 rope_theta=10000.0, rope_scaling=None)
    (folder / "config.json").write_text(json.dumps(shape))
    model = Llama(LlamaConfig.from_dict(shape)).initialise(torch.Generator().manual_seed(seed), std=0.3)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


def llama_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with Llama 3's special tokens behind it, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                             show_progress=False))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))])
    return tokenizer


def llama_checkpoint(folder: Path, texts: list[str], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random Llama with such a tokenizer, in the Hub's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = llama_tokenizer(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=True,
                 rope_theta=500000.0, rope_scaling=None, model_type="llama", max_position_embeddings=4096)
    (folder / "config.json").write_text(json.dumps(shape))
    model = Llama(LlamaConfig.from_dict(shape)).initialise(torch.Generator().manual_seed(0), std=0.3)
    save_file({name: p.detach().to(dtype) for name, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


def blocks(folder: Path, stages: list[dict[int, list[int]]], codes: list[list[int]]) -> Path:
    """The release's schema: {user: items} a stage, and the codes of every item."""
    folder.mkdir(parents=True, exist_ok=True)
    past: dict[int, list[int]] = {}
    for k, stage in enumerate(stages):
        block = {str(u): {"previous_block": past.get(u, []), "current_block": items} for u, items in stage.items()}
        (folder / f"C.all.block_{k}.json").write_text(json.dumps(block))
        past |= {u: past.get(u, []) + items for u, items in stage.items()}
    SemanticIDs(torch.tensor(codes)).save(folder / "C.index.json")
    return folder


def shared_ids(folder: Path, users: int = 24, items: int = 20, stages: int = 3) -> Path:
    """Random blocks in which every two items share an ID."""
    draw = torch.Generator().manual_seed(7)
    made = [{u: torch.randperm(items, generator=draw)[:6].tolist() for u in range(stage, users, stage + 1)}
            for stage in range(stages)]
    return blocks(folder, made, [[i // 2 % 4, i // 8] for i in range(items)])
