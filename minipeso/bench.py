"""How fast is this, beside transformers + peft on the same work?

    python -m minipeso.bench train       LoRA steps on the sliding-window pairs of whole users
    python -m minipeso.bench generate    the ten best items of 64 users, over a trie of 26,000

Both sides get the same weights and data, take turns in one process, and are first held to the same
results: a faster wrong answer is no answer. On a busy machine trust the ratios, not the ms. The
peers need the test extras (pip install -e '.[test]').
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from collections.abc import Callable
from itertools import groupby
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minipeso.beam import beam_search
from minipeso.config import UsageError, guard, resolve
from minipeso.continual import answer_loss, choose_trainable
from minipeso.llama import Llama, LlamaConfig
from minipeso.lora import PREFIX, TARGETS, adapter_parameters, adapters, inject
from minipeso.prepare import llama_config
from minipeso.stages import Example, Stage, examples
from minipeso.tokens import IGNORE, Row, Template, batches, code_tokens, collate, rows
from minipeso.trie import Trie

LEVELS, BEAMS, WINDOW = 4, 10, 20
SHAPES = ("tiny", "small", "small-bigvocab")  # --base tiny, --base small; the words of Llama 3 on 256 units


class Case(NamedTuple):
    """One model, written twice, and a catalogue."""

    ours: Llama
    peer: torch.nn.Module  # peft.PeftModelForCausalLM
    template: Template
    codes: np.ndarray  # (items, L)


class Contest(NamedTuple):
    """Contenders that do the same work, ours first, and what was found equal before."""

    runs: dict[str, Callable[[], object]]
    count: int
    unit: str
    equal: str


# -- the same model on both sides -------------------------------------------------------------------

def libraries():
    """The modules transformers and peft; UsageError if they are not installed."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise UsageError(f"the peers of the benchmark are missing\n{error}\n"
                         "pip install -e '.[test]'") from error
    transformers.utils.logging.set_verbosity_error()
    return transformers, peft


def shape_of(name: str) -> LlamaConfig:
    """What --base tiny or small trains from scratch; small-bigvocab has a real vocabulary."""
    if name != "small-bigvocab":
        return llama_config(resolve({"base": name}))
    return dataclasses.replace(llama_config(resolve({"base": "small"})), vocab_size=128256,
                               hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                               num_attention_heads=8, num_key_value_heads=2, head_dim=32)


def make_case(shape: LlamaConfig, items: int = 26_000, n_codes: int = 256, device: str = "cpu",
              seed: int = 0) -> Case:
    """Random weights and distinct random codes. B is not zero, or A would get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    ours = Llama(shape).initialise(generator, std=0.05)
    ours.grow(LEVELS * n_codes, generator, std=0.05)
    inject(ours, rank=8, alpha=16, generator=generator)
    choose_trainable(ours, "adapter")
    for _, layer in adapters(ours):
        layer.B.data.normal_(0, 0.02, generator=generator)
    keys = np.random.default_rng(seed).choice(n_codes**LEVELS, items, replace=False)
    codes = keys[:, None] // n_codes ** np.arange(LEVELS)[::-1] % n_codes  # (items, L)
    first = shape.vocab_size
    template = Template((0,), (), (), (), code_tokens(codes, n_codes, first), first, n_codes)
    return Case(ours.to(device), peer_of(ours).to(device), template, codes)


@torch.no_grad()
def peer_of(ours: Llama):
    """transformers' Llama in peft's adapter, with copies of our weights."""
    transformers, peft = libraries()
    table = ours.model.embed_tokens
    tokens = torch.cat([table.weight, table.rows])  # (V, d)
    fields = dataclasses.asdict(ours.config) | {"vocab_size": len(tokens)}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **fields, bos_token_id=0, eos_token_id=None, pad_token_id=0))
    weights = {name: t for name, t in ours.state_dict().items() if name.endswith(".weight")}
    base.load_state_dict(weights | {"model.embed_tokens.weight": tokens, "lm_head.weight": tokens})
    peer = peft.get_peft_model(base, peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    for name, layer in adapters(ours):
        other = peer.get_submodule(PREFIX + name)
        other.lora_A["default"].weight.copy_(layer.A)
        other.lora_B["default"].weight.copy_(layer.B)
    return peer


# -- training ---------------------------------------------------------------------------------------

def draw_pairs(n_items: int, users: int, seed: int = 0) -> list[Example]:
    """Training pairs of users with 5 items and a geometric rest, 7.5 in the mean, as Amazon's have.
    No history outgrows the window."""
    rng = np.random.default_rng(seed)
    length = np.minimum(4 + rng.geometric(1 / 3.5, users), WINDOW + 2)
    current = {u: rng.integers(0, n_items, l).tolist() for u, l in enumerate(length)}
    return examples(Stage(1, {u: [] for u in current}, current), "train", WINDOW)


def peer_batch(pairs: list[Example], template: Template, device, left: bool) -> dict[str, Tensor]:
    """One padded row a pair, labels on the answer."""
    prompts = [template.trunk(pair.history) for pair in pairs]
    answers = [template.answer(pair.target) for pair in pairs]
    side = "left" if left else "right"
    ids, seen, labels = (
        pad_sequence([torch.tensor(row) for row in of], True, padding, side).to(device)
        for padding, of in ((0, [p + a for p, a in zip(prompts, answers)]),
                            (0, [[1] * len(p + a) for p, a in zip(prompts, answers)]),
                            (IGNORE, [[IGNORE] * len(p) + a for p, a in zip(prompts, answers)])))
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}  # (pairs, l) each


def peer_loss(peer, pairs: list[Example], template: Template, keep: bool = False) -> Tensor:
    """Eq. 2 by transformers. keep: padded on the left, so that the head can skip the prompts."""
    batch = peer_batch(pairs, template, peer.device, left=keep)
    if keep:
        last = LEVELS + 1  # transformers shifts: the answer and the position before it
        batch |= {"labels": batch["labels"][:, -last:], "logits_to_keep": last}
    return peer(**batch, use_cache=False).loss


def train_contest(case: Case, pairs: int = 32, steps: int = 4, seed: int = 0) -> Contest:
    """`steps` steps of AdamW on about `pairs` pairs each: whole users, as tokens.batches cuts them."""
    drawn = draw_pairs(len(case.codes), steps * pairs, seed)
    users = [list(group) for _, group in groupby(drawn, key=lambda pair: pair.user)]
    built = rows(drawn, case.template)  # one a user, since no window slides
    pairs_of = {id(row): own for row, own in zip(built, users, strict=True)}
    chosen = batches(built, pairs, torch.Generator().manual_seed(seed))[:steps]
    flat = [[pair for row in batch for pair in pairs_of[id(row)]] for batch in chosen]
    ours, peer = case.ours.train(), case.peer.train()
    weights = adapter_parameters(ours), peer_parameters(case)

    def our_loss(batch: list[Row]) -> Tensor:
        return answer_loss(ours, collate(batch, ours.device))

    def peft(batch: list[Example]) -> Tensor:
        return peer_loss(peer, batch, case.template)

    def tuned(batch: list[Example]) -> Tensor:
        return peer_loss(peer, batch, case.template, keep=True)

    check = [same_training(our_loss, other, weights, batch, own)
             for other in (peft, tuned) for batch, own in zip(chosen, flat)]
    runs = {"ours": stepper(our_loss, weights[0], chosen), "peft": stepper(peft, weights[1], flat),
            "peft, head on answers only": stepper(tuned, weights[1], flat)}
    return Contest(runs, sum(map(len, flat)), "examples",
                   "loss to {:.0e}, gradient of the adapter to {:.0e}".format(*map(max, zip(*check))))


def peer_parameters(case: Case) -> list[Tensor]:
    """The peer's A and B, in the order of lora.adapter_parameters."""
    layers = [case.peer.get_submodule(PREFIX + name) for name, _ in adapters(case.ours)]
    return [m["default"].weight for layer in layers for m in (layer.lora_A, layer.lora_B)]


def same_training(ours: Callable, peer: Callable, weights, rows, pairs) -> tuple[float, float]:
    """The relative differences of loss and LoRA gradient; FloatingPointError if they are no rounding."""
    losses, grads = [], []
    for loss_of, batch, parameters in ((ours, rows, weights[0]), (peer, pairs, weights[1])):
        loss = loss_of(batch)
        losses.append(loss.item())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    loss = abs(losses[0] / losses[1] - 1)
    grad = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
    if not (loss <= 1e-5 and grad <= 1e-4):
        raise FloatingPointError(f"the contenders do not train the same\nloss differs by {loss:.1e}, "
                                 f"gradient by {grad:.1e}\ntimings of different work mean nothing")
    return loss, grad


def stepper(loss_of: Callable, parameters: list[Tensor], data: list) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run() -> None:
        for batch in data:
            optimiser.zero_grad()
            loss_of(batch).backward()
            optimiser.step()
    return run


# -- decoding ---------------------------------------------------------------------------------------

def generate_contest(case: Case, users: int = 64, seed: int = 0) -> Contest:
    """One batch of users with 5 to 20 items. The peer's adapter is merged: its faster way."""
    rng = np.random.default_rng(seed)
    prompts = [case.template.prompt(rng.integers(0, len(case.codes), n)).to(case.ours.device)
               for n in rng.integers(5, WINDOW + 1, users)]
    ours, merged = case.ours.eval(), case.peer.merge_and_unload().eval()
    trie = Trie(torch.from_numpy(case.codes), case.template.n_codes).to(ours.device)
    tree = dict_trie(case.template.items)
    runs = {
        "ours": lambda: beam_search(ours, prompts, trie, case.template.first_token, BEAMS),
        "generate": lambda: peer_search(merged, prompts, tree),
        "generate, prompt once per user": lambda: peer_search(merged, prompts, tree, once=True)}
    codes, scores = runs["ours"]()
    items = codes + torch.from_numpy(code_tokens(np.zeros((1, LEVELS)), trie.n_codes,
                                                 case.template.first_token)).to(ours.device)
    apart = max(same_search(items, scores, *runs[name]()) for name in list(runs)[1:])
    return Contest(runs, users, "users", f"{BEAMS} items of every user, scores to {apart:.0e}")


def dict_trie(items: np.ndarray) -> dict:
    """Nested dictionaries of tokens, the usual companion of generate()."""
    tree: dict = {}
    for item in items.tolist():
        node = tree
        for token in item:
            node = node.setdefault(token, {})
    return tree


@torch.no_grad()
def peer_search(model, prompts: list[Tensor], tree: dict, once: bool = False) -> tuple[Tensor, Tensor]:
    """tokens (n, beams, L) and scores (n, beams) by generate(). once: the prompt is computed once per
    user, not once per beam, and its cache repeated by hand."""
    ids = pad_sequence(prompts, True, padding_side="left")  # (n, l)
    seen = pad_sequence([torch.ones_like(p) for p in prompts], True, padding_side="left")
    longest, extra = ids.shape[1], {}

    def allowed(user: int, sent: Tensor) -> list[int]:
        node = tree
        for token in sent[longest:].tolist():
            node = node[token]
        return list(node)

    if once:
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, :-1]
        cache = model(ids[:, :-1], attention_mask=seen[:, :-1], position_ids=positions, use_cache=True,
                      logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(BEAMS)
        extra["past_key_values"] = cache
    out = model.generate(ids, attention_mask=seen, prefix_allowed_tokens_fn=allowed, max_new_tokens=LEVELS,
                         num_beams=BEAMS, num_return_sequences=BEAMS, do_sample=False, length_penalty=0.0,
                         early_stopping=False, output_scores=True, return_dict_in_generate=True, **extra)
    return out.sequences[:, longest:].view(-1, BEAMS, LEVELS), out.sequences_scores.view(-1, BEAMS)


def same_search(items: Tensor, scores: Tensor, peer_items: Tensor, peer_scores: Tensor) -> float:
    """The largest difference of a score; FloatingPointError unless every user gets the same items
    (near ties may change places) with scores within 1e-4."""
    ours, peers = ([set(map(tuple, user)) for user in x.tolist()] for x in (items, peer_items))
    other = sum(a != b for a, b in zip(ours, peers, strict=True))
    apart = (scores - peer_scores).abs().max().item()
    if other or not apart <= 1e-4:
        raise FloatingPointError(f"the contenders do not find the same\n{other} of {len(ours)} users get other "
                                 f"items, scores differ by {apart:.1e}\ntimings of different work mean nothing")
    return apart


# -- the clock --------------------------------------------------------------------------------------

def compare(runs: dict[str, Callable], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every contender in every round. They take turns, in alternating order."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    for turn in range(rounds):
        for name in list(runs)[::-1 if turn % 2 else 1]:
            wait()
            began = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def table(contest: Contest, seconds: dict[str, list[float]]) -> str:
    """One line a contender; the ratio is taken round by round, then its median and range."""
    ours, lines = next(iter(seconds.values())), []
    for name, times in seconds.items():
        ratio = [peer / own for peer, own in zip(times, ours)]
        lines.append(f"{name:31}{median(times) * 1e3:10.1f} ms {contest.count / median(times):10,.1f} "
                     f"{contest.unit}/s   {median(ratio):6.2f} x ours [{min(ratio):.2f}, {max(ratio):.2f}]")
    return "\n".join(lines)


def machine() -> str:
    transformers, peft = libraries()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (f"{os.cpu_count()} cores, {torch.get_num_threads()} threads{load}; Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minipeso.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "generate"))
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UsageError(f"--rounds is out of range\nfound {args.rounds}\ngive a number >= 1")
    print(machine())
    shape = shape_of(args.shape)
    case = make_case(shape, device=args.device)
    contest = (train_contest if args.task == "train" else generate_contest)(case)
    print(f"{args.task}: hidden {shape.hidden_size}, {shape.num_hidden_layers} layers, vocabulary "
          f"{shape.vocab_size} + {LEVELS * case.template.n_codes}, {contest.count} {contest.unit}, {args.device}\n"
          f"equal: {contest.equal}")
    print(table(contest, compare(contest.runs, args.rounds, args.device)))


if __name__ == "__main__":
    guard(main)
