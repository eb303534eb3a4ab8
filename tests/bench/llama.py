"""The model beside transformers + peft, of the same weights: LoRA steps on the sliding-window pairs of whole users,
and the ten best items of users over a trie."""
from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial, reduce
from itertools import groupby
from operator import attrgetter, getitem
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minipeso.beam import beam_search
from minipeso.config import UsageError, resolve
from minipeso.continual import choose_trainable
from minipeso.llama import Llama, LlamaConfig
from minipeso.lora import TARGETS, adapters, inject
from minipeso.objective import answer_loss
from minipeso.runs.setup import llama_config
from minipeso.stages import Example, Stage, examples
from minipeso.tokens import IGNORE, Template, batches, code_tokens, collate, sequences
from minipeso.trie import Trie
from tests.bench import race
from tests.bench.trie import CODES, LEVELS, catalogue, nested

BEAMS, WINDOW, RANK, ALPHA = 10, 20, 8, 16
PREAMBLE, TAIL = 36, 18  # words before and after the history, about as many as in Appendix D
POOL, PAIRS = 32, 5.5  # batches from whose users those of like length are taken; mean pairs per user
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES = {"tiny": llama_config(resolve({"base": "tiny"})),
          "small-smallvocab": LlamaConfig(1024, 256, 1024, 4, 8, 2, 32, 1e-5, PLAIN, True),
          "small-bigvocab": LlamaConfig(128256, 256, 1024, 4, 8, 2, 32, 1e-5, PLAIN, True),
          "1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, LLAMA3, True)}  # Llama 3.2


class Case(NamedTuple):
    """One adapted model, written twice, and a catalogue."""
    ours: Llama
    peer: nn.Module  # peft.PeftModel
    template: Template
    codes: Tensor  # (n_items, L)


def adapted(shape: LlamaConfig, n_codes: int = CODES) -> Llama:
    """Random weights and an adapter. B is not zero as in a new one: A would get no gradient."""
    generator = torch.Generator().manual_seed(0)
    std = min(0.05, shape.hidden_size ** -0.5)  # above it a wide layer adds more than it gets, to rounding errors too
    model = Llama(shape).initialise(generator, std)
    model.grow(LEVELS * n_codes, generator, std)
    inject(model, RANK, ALPHA, generator=generator)
    choose_trainable(model, "adapter")
    for _, layer in adapters(model):
        layer.B.data.normal_(0, 0.02, generator=generator)
    return model


def make_case(shape: LlamaConfig, n_items: int = 26_000, n_codes: int = CODES, device="cpu") -> Case:
    """Random codes, and a prompt of random words where the vocabulary has any."""
    ours, codes, first = adapted(shape, n_codes), catalogue(n_items, LEVELS, n_codes), shape.vocab_size
    words = tuple(np.random.default_rng(0).integers(first, size=PREAMBLE + TAIL).tolist())
    preamble, tail = (words[:PREAMBLE], words[PREAMBLE:]) if first > 1 else ((0,), ())
    template = Template(preamble, (), tail, (), code_tokens(codes, n_codes, first), first, n_codes)
    return Case(ours.to(device), peer_of(ours).to(device), template, codes)


@torch.no_grad()
def peer_of(ours: Llama) -> nn.Module:
    """transformers' Llama in peft's adapter, with copies of our weights."""
    transformers, peft = race.peers("transformers", "peft")
    tokens = torch.cat([ours.model.embed_tokens.weight, ours.model.embed_tokens.rows])  # (V, d)
    changes = {"vocab_size": len(tokens), "eos_token_id": None, "pad_token_id": 0}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**asdict(ours.config) | changes))
    weights = {name: t for name, t in ours.state_dict().items() if name.endswith(".weight")}
    base.load_state_dict(weights | {"model.embed_tokens.weight": tokens, "lm_head.weight": tokens})
    peer = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    for theirs, p in zip(race.trainable(peer), race.trainable(ours), strict=True):
        theirs.copy_(p)
    return peer


def draw_pairs(n_items: int, users: int, seed: int) -> list[Example]:
    """Training pairs of users with 5 items or more, 7.5 in the mean, like Amazon's; no window slides."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(4 + rng.geometric(1 / 3.5, users), WINDOW + 2)
    current = {user: rng.integers(0, n_items, length).tolist() for user, length in enumerate(lengths)}
    return examples(Stage(1, {user: [] for user in current}, current), "train", WINDOW)


def like_length(template: Template, users: int, steps: int) -> list[list[Example]]:
    """The pairs of `steps` batches of an epoch, of about `users` users each, grouped by length as in training."""
    drawn = draw_pairs(len(template.items), users * POOL, 0)
    by_user, data = groupby(drawn, attrgetter("user")), sequences(drawn, template)
    pairs_of = {id(one): list(pairs) for one, (_, pairs) in zip(data, by_user, strict=True)}
    some = batches(data, round(PAIRS * users), torch.Generator().manual_seed(0))[:steps]
    return [[pair for one in batch for pair in pairs_of[id(one)]] for batch in some]


def peer_loss(peer, template: Template, tuned: bool, pairs: list[Example]) -> Tensor:
    """Eq. 2 by transformers: one padded sequence per pair, labels on the answer.
    tuned: padded on the left, so that all answers stand last and the head can skip the rest."""
    parts = [(template.prompt(pair.history).tolist(), template.answer(pair.target)) for pair in pairs]
    full = [torch.tensor(prompt + answer) for prompt, answer in parts]
    marked = [torch.tensor([IGNORE] * len(prompt) + answer) for prompt, answer in parts]
    ids, labels = (pad_sequence(some, True, IGNORE, "left" if tuned else "right").to(peer.device)
                   for some in (full, marked))  # (pairs, l) each
    seen = (ids != IGNORE).long()
    kept = LEVELS + 1 if tuned else ids.shape[1]  # transformers shifts the labels by one itself
    return peer(input_ids=ids * seen, attention_mask=seen, labels=labels[:, -kept:], logits_to_keep=kept,
                use_cache=False).loss


def lone_pairs(n_items: int, users: int, steps: int) -> list[list[Example]]:
    """One pair per user, each with a full window: nothing that pairs could share."""
    items = np.random.default_rng(0).integers(0, n_items, (steps, users, WINDOW + 1)).tolist()
    return [[Example(user, tuple(taken[:-1]), taken[-1], 1) for user, taken in enumerate(some)] for some in items]


def train_contest(case: Case, users: int = 6, steps: int = 4, one_pair=False) -> tuple[dict, int, str, Callable]:
    """`steps` steps of AdamW on the pairs of `users` users each, about 32; or on one pair per user.
    -> runs by name (ours first), how much work each is, its unit, a check that says what is equal."""
    ours, peer, template = case.ours.train(), case.peer.train(), case.template
    data = lone_pairs(len(case.codes), users, steps) if one_pair else like_length(template, users, steps)
    contenders = {
        "ours": (ours, lambda pairs: answer_loss(
            ours, collate(sequences(pairs, template), ours.device))),
        "peft": (peer, partial(peer_loss, peer, template, False)),
        "peft, head on answers only": (peer, partial(peer_loss, peer, template, True))}
    runs = {name: partial(train, loss_of, data, torch.optim.AdamW(race.trainable(model), lr=1e-4, fused=True))
            for name, (model, loss_of) in contenders.items()}
    return runs, sum(map(len, data)), "examples", lambda: "losses to {:.0e}, gradients of A and B to {:.0e}".format(
        *race.same_training(list(contenders.values()), data))


def train(loss_of: Callable, data: list, optimiser: torch.optim.Optimizer) -> None:
    for batch in data:
        optimiser.zero_grad()
        loss_of(batch).backward()
        optimiser.step()


def generate_contest(case: Case, users: int = 64) -> tuple[dict, int, str, Callable]:
    """One batch of users with 5 to 20 items. The peer's adapter is merged, which is its faster way."""
    rng = np.random.default_rng(0)
    prompts = [case.template.prompt(rng.integers(0, len(case.codes), n)).to(case.ours.device)
               for n in rng.integers(5, WINDOW + 1, users)]
    ours, merged = case.ours.eval(), case.peer.merge_and_unload().eval()
    first, n_codes = case.template.first_token, case.template.n_codes
    trie = Trie(case.codes, n_codes).to(ours.device)
    tree = nested(torch.from_numpy(case.template.items))
    runs = {"ours": partial(beam_search, ours, prompts, trie, first, BEAMS, len(case.template.preamble)),
            "generate": partial(peer_search, merged, prompts, tree, False),
            "generate, one prompt per user": partial(peer_search, merged, prompts, tree, True)}

    def check() -> str:
        codes, scores = runs["ours"]()
        items = codes + first + n_codes * torch.arange(LEVELS, device=codes.device)
        apart = max(same_search(items, scores, *run()) for name, run in runs.items() if name != "ours")
        return f"the {BEAMS} items of every user, scores to {apart:.0e}"
    return runs, users, "users", check


@torch.no_grad()
def peer_search(model, prompts: list[Tensor], tree: dict, tuned: bool) -> tuple[Tensor, Tensor]:
    """tokens (n, beams, L) and scores (n, beams) by transformers' generate(). tuned: the prompt is
    computed once per user instead of once per beam, and its cache is repeated by hand."""
    ids, seen = (pad_sequence(p, True, 0, "left") for p in (prompts, [torch.ones_like(p) for p in prompts]))
    longest, extra = ids.shape[1], {}  # ids (n, longest)
    if tuned:
        prefilled = model(ids[:, :-1], attention_mask=seen[:, :-1], logits_to_keep=1, use_cache=True,
                          position_ids=(seen.cumsum(1) - 1).clamp(min=0)[:, :-1])
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # 5.0's name
        extra[name] = getattr(prefilled, name)
        extra[name].batch_repeat_interleave(BEAMS)
    out = model.generate(ids, attention_mask=seen, max_new_tokens=LEVELS, num_beams=BEAMS, do_sample=False,
                         num_return_sequences=BEAMS, length_penalty=0.0, early_stopping=False, output_scores=True,
                         return_dict_in_generate=True, prefix_allowed_tokens_fn=lambda user, sent: list(
                             reduce(getitem, sent[longest:].tolist(), tree)), **extra)
    return out.sequences[:, longest:].view(-1, BEAMS, LEVELS), out.sequences_scores.view(-1, BEAMS)


def same_search(items: Tensor, scores: Tensor, peer_items: Tensor, peer_scores: Tensor) -> float:
    """The largest difference of a score; FloatingPointError above 1e-4, and if a user's items differ as a set."""
    sets = zip(*([set(map(tuple, user)) for user in x.tolist()] for x in (items, peer_items)), strict=True)
    other, apart = sum(a != b for a, b in sets), (scores - peer_scores).abs().max().item()
    if other or not apart <= 1e-4:
        race.refuse("find", f"{other} of {len(items)} users have other items, scores {apart:.1e} apart")
    return apart


CONTESTS = {"train": train_contest, "generate": generate_contest}


def prepared(task: str, shape: str, device: str, how: dict, name: str) -> tuple[Callable, Callable]:
    """One contender, for its memory above the models."""
    return CONTESTS[task](make_case(SHAPES[shape], device=device), **how)[0][name], lambda made: None


def run(args: Namespace) -> None:
    how = {name: getattr(args, name) for name in ("users", "steps", "one_pair") if getattr(args, name)}
    if args.task == "generate" and how.keys() - {"users"}:
        raise UsageError("--steps and --one-pair are of training\nfound one of them for generate\nleave it away")
    print(race.machine(*race.peers("transformers", "peft")))
    runs, count, unit, check = CONTESTS[args.task](make_case(SHAPES[args.shape], device=args.device), **how)
    print(f"{args.task}, shape {args.shape}, on {args.device}: {count} {unit}\nequal: {check()}")
    if not args.memory:
        return print(race.table(race.compare(runs, args.rounds), count, unit))
    jobs = {name: (prepared, args.task, args.shape, args.device, how, name) for name in runs}
    took = race.compare(jobs, 1, race.child)
    print(*(f"{name:29}{one.above / 2**20:10,.0f} MiB above the models {one.above / took['ours'][0].above:6.2f} x ours"
            for name, (one,) in took.items()), sep="\n")
