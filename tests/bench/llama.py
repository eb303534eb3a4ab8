"""The model beside transformers + peft: LoRA steps on the sliding-window pairs of whole users, and the ten best
items of users over a trie. Both sides get the same weights and data, and are held to the same results first.
"""
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial, reduce
from itertools import groupby
from operator import attrgetter, getitem
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.bench import race
from minipeso.beam import beam_search, computed
from minipeso.config import UsageError, resolve
from minipeso.continual import choose_trainable
from minipeso.llama import Llama, LlamaConfig
from minipeso.lora import TARGETS, adapters, inject
from minipeso.objective import answer_loss
from minipeso.runs.prepare import llama_config
from tests.bench.trie import nested
from minipeso.stages import Example, Stage, examples
from minipeso.tokens import IGNORE, Template, batches, code_tokens, collate, sequences
from minipeso.trie import Trie

LEVELS, BEAMS, WINDOW, RANK, ALPHA = 4, 10, 20, 8, 16
HEAD, TAIL = 36, 18  # words before and after the history, about as many as in Appendix D
POOL, PAIRS = 32, 5.5  # batches from whose users those of like length are taken; pairs a user, in the mean
SHAPES = ("tiny", "small", "small-smallvocab", "small-bigvocab", "1b")


class Case(NamedTuple):
    """One adapted model, written twice, and a catalogue."""
    ours: Llama
    peer: torch.nn.Module  # peft.PeftModel
    template: Template
    codes: np.ndarray  # (items, L)


def libraries():
    """The modules transformers and peft; UsageError if they are not installed."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise UsageError(f"the benchmark's peers are missing\n{error}\npip install -e '.[test]'") from error
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    return transformers, peft


def shape_of(name: str) -> LlamaConfig:
    """What --base tiny or small trains from scratch; small-bigvocab: 256 units with Llama 3's words;
    small-smallvocab: the same with 1,024 words; 1b: Llama 3.2."""
    if name == "1b":
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, rope, tie_word_embeddings=True)
    if name in ("tiny", "small"):
        return llama_config(resolve({"base": name}))
    return replace(shape_of("small"), vocab_size=128256 if name == "small-bigvocab" else 1024, hidden_size=256,
                   intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=32)


def distinct_codes(items: int, n_codes: int = 256) -> np.ndarray:
    """Random codes (items, L), all different."""
    keys = np.random.default_rng(0).choice(n_codes**LEVELS, items, replace=False)
    return keys[:, None] // n_codes ** np.arange(LEVELS)[::-1] % n_codes


def make_case(shape: LlamaConfig, items: int = 26_000, n_codes: int = 256, device="cpu") -> Case:
    """Random weights, distinct codes, and a prompt of random words where there are any. B is not zero as in a new
    adapter: A would get no gradient."""
    generator = torch.Generator().manual_seed(0)
    std = min(0.05, shape.hidden_size ** -0.5)  # above it a wide layer adds more than it gets, to rounding errors too
    ours = Llama(shape).initialise(generator, std)
    ours.grow(LEVELS * n_codes, generator, std)
    inject(ours, RANK, ALPHA, generator=generator)
    choose_trainable(ours, "adapter")
    for _, layer in adapters(ours):
        layer.B.data.normal_(0, 0.02, generator=generator)
    codes = distinct_codes(items, n_codes)
    words = torch.randint(shape.vocab_size, (HEAD + TAIL,), generator=generator).tolist()
    head, tail = (words[:HEAD], words[HEAD:]) if shape.vocab_size > 1 else ([0], [])
    template = Template(tuple(head), (), tuple(tail), (), code_tokens(codes, n_codes, shape.vocab_size),
                        shape.vocab_size, n_codes)
    return Case(ours.to(device), peer_of(ours).to(device), template, codes)


@torch.no_grad()
def peer_of(ours: Llama) -> torch.nn.Module:
    """transformers' Llama in peft's adapter, with copies of our weights."""
    transformers, peft = libraries()
    tokens = torch.cat([ours.model.embed_tokens.weight, ours.model.embed_tokens.rows])  # (V, d)
    changes = {"vocab_size": len(tokens), "eos_token_id": None, "pad_token_id": 0}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**asdict(ours.config) | changes))
    weights = {name: t for name, t in ours.state_dict().items() if name.endswith(".weight")}
    base.load_state_dict(weights | {"model.embed_tokens.weight": tokens, "lm_head.weight": tokens})
    peer = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    for theirs, p in zip(trainable(peer), trainable(ours), strict=True):
        theirs.copy_(p)
    return peer


def trainable(model: torch.nn.Module) -> list[Tensor]:
    """A and B of every adapted layer; both sides list them in the same order."""
    return [p for p in model.parameters() if p.requires_grad]


def draw_pairs(n_items: int, users: int, seed: int) -> list[Example]:
    """Training pairs of users with 5 items or more, 7.5 in the mean, like Amazon's; no window slides."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(4 + rng.geometric(1 / 3.5, users), WINDOW + 2)
    current = {user: rng.integers(0, n_items, length).tolist() for user, length in enumerate(lengths)}
    return examples(Stage(1, {user: [] for user in current}, current), "train", WINDOW)


def like_length(template: Template, users: int, steps: int) -> list[list[Example]]:
    """The pairs of `steps` batches of an epoch, of about `users` users each, who are grouped by length as in training."""
    drawn = draw_pairs(len(template.items), users * POOL, 0)
    alike = sequences(drawn, template)  # a row a user: no window slides
    pairs_of = {id(row): list(some) for row, (_, some) in zip(alike, groupby(drawn, attrgetter("user")), strict=True)}
    return [[pair for row in some for pair in pairs_of[id(row)]]
            for some in batches(alike, round(PAIRS * users), torch.Generator().manual_seed(0))[:steps]]


def lone_pairs(n_items: int, users: int, seed: int) -> list[Example]:
    """One pair a user, each with a full window: nothing that pairs could share."""
    items = np.random.default_rng(seed).integers(0, n_items, (users, WINDOW + 1)).tolist()
    return [Example(user, tuple(taken[:-1]), taken[-1], 1) for user, taken in enumerate(items)]


def peer_loss(peer, template: Template, tuned: bool, pairs: list[Example]) -> Tensor:
    """Eq. 2 by transformers: one padded row a pair, labels on the answer.
    tuned: padded on the left, so that all answers stand at the end and the head can skip the rest."""
    parts = [(template.prompt(pair.history).tolist(), template.answer(pair.target)) for pair in pairs]
    full = [torch.tensor(prompt + answer) for prompt, answer in parts]
    marked = [torch.tensor([IGNORE] * len(prompt) + answer) for prompt, answer in parts]
    ids, labels = (pad_sequence(some, True, IGNORE, "left" if tuned else "right").to(peer.device)
                   for some in (full, marked))  # (pairs, l) each
    seen = (ids != IGNORE).long()
    kept = LEVELS + 1 if tuned else ids.shape[1]  # transformers shifts the labels by one itself
    return peer(input_ids=ids * seen, attention_mask=seen, labels=labels[:, -kept:], logits_to_keep=kept,
                use_cache=False).loss


def train_contest(case: Case, users: int = 6, steps: int = 4, alone: bool = False,
                  checked: bool = True) -> tuple[dict, int, str, str]:
    """`steps` steps of AdamW on the pairs of `users` users each, about 32; or `alone`, one pair a user. -> runs by
    name (ours first), how much work a run is, its unit, what was found equal."""
    ours, peer, template = case.ours.train(), case.peer.train(), case.template
    data = ([lone_pairs(len(case.codes), users, seed) for seed in range(steps)] if alone
            else like_length(template, users, steps))
    contenders = {
        "ours": (ours, lambda pairs: answer_loss(ours, collate(sequences(pairs, template), ours.device, template.preamble))),
        "peft": (peer, partial(peer_loss, peer, template, False)),
        "peft, head on answers only": (peer, partial(peer_loss, peer, template, True))}
    equal = "loss to {:.0e}, gradient of A and B to {:.0e}".format(
        *same_training(list(contenders.values()), data)) if checked else ""
    runs = {name: partial(train, loss_of, data, torch.optim.AdamW(trainable(model), lr=1e-4, fused=True))
            for name, (model, loss_of) in contenders.items()}
    return runs, sum(map(len, data)), "examples", equal


def same_training(contenders: list[tuple[torch.nn.Module, Callable]], data: list) -> list[float]:
    """The largest relative differences of losses and gradients; FloatingPointError if beyond rounding."""
    found = []
    for model, loss_of in contenders:
        losses = [loss_of(pairs) for pairs in data]
        grads = [g.flatten() for loss in losses for g in torch.autograd.grad(loss, trainable(model))]
        found.append((torch.stack(losses).detach(), torch.cat(grads)))
    apart = [torch.stack([(x - first).norm() / first.norm() for x in others]).max().item()
             for first, *others in zip(*found)]
    if not (apart[0] <= 1e-5 and apart[1] <= 1e-4):
        race.refuse("train", "loss differs by {:.1e}, gradient by {:.1e}".format(*apart))
    return apart


def train(loss_of: Callable, data: list, optimiser: torch.optim.Optimizer) -> None:
    for pairs in data:
        optimiser.zero_grad()
        loss_of(pairs).backward()
        optimiser.step()


def generate_contest(case: Case, users: int = 64, checked: bool = True) -> tuple[dict, int, str, str]:
    """One batch of users with 5 to 20 items. The peer's adapter is merged, which is its faster way."""
    rng = np.random.default_rng(0)
    prompts = [case.template.prompt(rng.integers(0, len(case.codes), n)).to(case.ours.device)
               for n in rng.integers(5, WINDOW + 1, users)]
    ours, merged = case.ours.eval(), case.peer.merge_and_unload().eval()
    first, n_codes = case.template.first_token, case.template.n_codes
    trie = Trie(torch.from_numpy(case.codes), n_codes).to(ours.device)
    tree = nested(torch.from_numpy(case.template.items))
    runs = {"ours": partial(beam_search, ours, prompts, trie, first, BEAMS, computed(ours, case.template.preamble)),
            "generate": partial(peer_search, merged, prompts, tree, False),
            "generate, prompt once a user": partial(peer_search, merged, prompts, tree, True)}
    if not checked:
        return runs, users, "users", ""
    codes, scores = runs["ours"]()
    items = codes + first + n_codes * torch.arange(LEVELS, device=codes.device)
    apart = max(same_search(items, scores, *run()) for name, run in runs.items() if name != "ours")
    return runs, users, "users", f"the {BEAMS} items of every user, scores to {apart:.0e}"


@torch.no_grad()
def peer_search(model, prompts: list[Tensor], tree: dict, tuned: bool) -> tuple[Tensor, Tensor]:
    """tokens (n, beams, L) and scores (n, beams) by transformers' generate(). tuned: the prompt is
    computed once a user instead of once a beam, and its cache is repeated by hand."""
    ids, seen = (pad_sequence(p, True, 0, "left") for p in (prompts, [torch.ones_like(p) for p in prompts]))
    longest, extra = ids.shape[1], {}  # ids (n, longest)
    if tuned:
        prefilled = model(ids[:, :-1], attention_mask=seen[:, :-1], logits_to_keep=1, use_cache=True,
                          position_ids=(seen.cumsum(1) - 1).clamp(min=0)[:, :-1])
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        extra[name] = getattr(prefilled, name)
        extra[name].batch_repeat_interleave(BEAMS)
    out = model.generate(ids, attention_mask=seen, max_new_tokens=LEVELS, num_beams=BEAMS, do_sample=False,
                         num_return_sequences=BEAMS, length_penalty=0.0, early_stopping=False, output_scores=True,
                         return_dict_in_generate=True, prefix_allowed_tokens_fn=lambda user, sent: list(
                             reduce(getitem, sent[longest:].tolist(), tree)), **extra)
    return out.sequences[:, longest:].view(-1, BEAMS, LEVELS), out.sequences_scores.view(-1, BEAMS)


def same_search(items: Tensor, scores: Tensor, peer_items: Tensor, peer_scores: Tensor) -> float:
    """The largest difference of a score; FloatingPointError above 1e-4, and if a user's items differ as a set."""
    found = zip(*([set(map(tuple, user)) for user in x.tolist()] for x in (items, peer_items)), strict=True)
    other, apart = sum(a != b for a, b in found), (scores - peer_scores).abs().max().item()
    if other or not apart <= 1e-4:
        race.refuse("find", f"{other} of {len(items)} users have other items, scores {apart:.1e} apart")
    return apart
