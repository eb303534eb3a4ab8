"""Runs small enough to be made by the dozen: a world of 60 users, a Llama of 2,000 parameters, toy folders."""
import contextlib
import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import train
from minipeso import config
from minipeso.continual import choose_trainable, stage_data, train_stage
from minipeso.files.release import write_release
from minipeso.llama import Llama, LlamaConfig
from minipeso.runs.command import from_args
from minipeso.runs.guard import guard
from minipeso.runs.run import Run, begun
from minipeso.semantic_ids import SemanticIDs
from minipeso.stages import Stage
from minipeso.synthetic import ADJECTIVES, DEPARTMENTS, LEAVES
from minipeso.tokens import QUESTIONS

MICRO = dict(world_users=60, world_items=60, stages=3, levels=2, codes=8, latent=4, rqvae_hidden=(16,), rqvae_epochs=2,
             text_width=16, shape=(16, 1, 2, 1, 16), base_epochs=1, base_lr=3e-3,
             rank=2, lr=1e-3, later_lr=0.5, epochs=1, batch=8, beams=10, compare="single",
             init=0.06, base_dropout=0.15, dropout=0.0, patience=4, warmup=0.05, weight_decay=0.05)  # pinned


def micro(out: Path, **changes) -> config.Config:
    return config.resolve(MICRO | {"out": str(out)} | changes)


def flags(**changes) -> list[str]:
    """Settings as a command line."""
    line = []
    for name, value in changes.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        line += [config.flag(name)] if value is True else [config.flag(name), text]
    return line


def run(cfg: config.Config) -> str:
    """train.main in this process -> what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        train.main(cfg)
    return printed.getvalue()


def fails(argv: list[str], capsys, monkeypatch, main=None) -> tuple[int, list[str]]:
    """(exit code, the message's lines) of a command line that cannot be done: train.py's, or that of another `main`."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as left:
        guard(main or (lambda: train.main(from_args(argv))))
    _, told, message = capsys.readouterr().err.rpartition("error: ")
    assert told, "no error was told"
    return left.value.code, message.strip("\n").splitlines()


def set_up(cfg: config.Config) -> Run:
    """Data, IDs, base and a new adapter: all that train.py has before D_1."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), begun(cfg) as made:
        made.load_data()
        train.make_base(made, cfg)
    return made


def learn_first(now, stages: int = 1, t: int = 1) -> None:
    """D_1 (or D_1 .. D_stages at once) as train.py learns it, without a disk."""
    choose_trainable(now.model, now.cfg.first_trains)
    train_stage(now.model, stage_data(now.stages[:stages], now.template, now.cfg.window), t,
                dataclasses.replace(now.cfg, proximal="none"))


def fingerprint(out: Path) -> dict[str, object]:
    """Everything a run computed, without what it merely repeats of its settings or measures of time."""
    names = ("ranks.json", "absent.json", "expected.json", "metrics.jsonl", "semantic_ids.json",
             "adapter_model.safetensors")
    files: dict[str, object] = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
                                if path.name in names}
    for path in out.rglob("results.json"):
        results = json.loads(path.read_text())
        files[str(path.relative_to(out))] = {part: results[part] for part in ("stages", "average", "references")}
    return files


def save_llama(folder: Path, tokenizer: Tokenizer, words: int, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A random Llama with this tokenizer, in the Hub's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = dict(vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=True,
                 rope_theta=10000.0, rope_scaling=None) | settings
    (folder / "config.json").write_text(json.dumps(shape))
    model = Llama(LlamaConfig.from_dict(shape)).initialise(torch.Generator().manual_seed(0), std=0.3)
    save_file({name: p.detach().to(dtype) for name, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


def begins(token: int) -> processors.TemplateProcessing:
    """Every text begins with <|begin_of_text|>, which has this id."""
    return processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", token)])


def checkpoint(folder: Path, words: int = 256) -> Path:
    """A random Llama with a tokenizer of whole words."""
    text = " ".join([*QUESTIONS.values(), *ADJECTIVES, *DEPARTMENTS, *(kind for _, kind in LEAVES)])
    vocabulary = ["<unk>", "<|begin_of_text|>", "<|end_of_text|>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    vocabulary += [f"reserved{i}" for i in range(256 - len(vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.post_processor = pre_tokenizers.Whitespace(), begins(1)
    return save_llama(folder, tokenizer, words)


def llama_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with Llama 3's special tokens behind it, trained on `texts`."""
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet,
                                                             show_progress=False))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"])
    tokenizer.post_processor = begins(tokenizer.token_to_id("<|begin_of_text|>"))
    return tokenizer


def llama_checkpoint(folder: Path, texts: list[str], dtype: torch.dtype = torch.bfloat16) -> Path:
    tokenizer = llama_tokenizer(texts)
    return save_llama(folder, tokenizer, tokenizer.get_vocab_size(), dtype, rope_theta=500000.0, model_type="llama",
                      max_position_embeddings=4096)


def blocks(folder: Path, stages: list[dict[int, list[int]]], codes: list[list[int]]) -> Path:
    """The release's schema, from {user: items} of each stage and the codes of every item."""
    folder.mkdir(parents=True, exist_ok=True)
    past, made = {}, []
    for number, stage in enumerate(stages, start=1):
        made.append(Stage(number, {u: past.get(u, []) for u in stage}, stage))
        past |= {u: past.get(u, []) + items for u, items in stage.items()}
    write_release(folder, "C", made, SemanticIDs(torch.tensor(codes)))
    return folder


def shared_ids(folder: Path) -> Path:
    """Random blocks of 24 users and 20 items, in which every two items share an ID."""
    draw = torch.Generator().manual_seed(7)
    made = [{u: torch.randperm(20, generator=draw)[:6].tolist() for u in range(stage, 24, stage + 1)}
            for stage in range(3)]
    return blocks(folder, made, [[i // 2 % 4, i // 8] for i in range(20)])
