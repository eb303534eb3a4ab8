"""Prompts one can read, labels on the answer only, and rows that share a trunk without any effect."""
from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minipeso.objective import answer_loss
from minipeso.tokens import FRAME, IGNORE, QUESTIONS, TokenSequence, Template, batches, code_tokens, collate, sequences
from tests.reference import toy_llama

LEVELS, N_CODES, ITEMS = 3, 7, 40
KINDS = ("short", "paper", "release", "paper without end")


class Example(NamedTuple):
    user: int
    history: tuple[int, ...]
    target: int
    stage: int = 1


def some_codes() -> np.ndarray:
    """ITEMS different IDs."""
    picked = np.random.default_rng(0).permutation(N_CODES**LEVELS)[:ITEMS]
    return np.stack(np.unravel_index(picked, (N_CODES,) * LEVELS), 1)


CODES = some_codes()


def take(user: int, items: list[int], start: int = 0, window: int = 20) -> list[Example]:
    """All of a user's pairs from item `start` on, with a window of the last 20."""
    return [Example(user, tuple(items[max(0, j - window):j]), items[j]) for j in range(start, len(items))]


def crowd() -> list[Example]:
    """One user with a window that slides, one with a single item, one with a history from before,
    one with one item again and again, one whose pairs do not follow each other."""
    rng = np.random.default_rng(1)
    a, b, c, e = (rng.integers(0, ITEMS, n).tolist() for n in (22, 1, 8, 6))
    return [*take(0, a), *take(1, b), *take(2, c, start=5), *take(3, [8] * 4), *take(4, e)[::2], *take(4, e)[3:4]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE with Llama's two marks, as small as it gets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokenizer.train_from_iterator(QUESTIONS.values(), trainers.BpeTrainer(
        vocab_size=330, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer


@pytest.fixture(scope="module")
def made(tokenizer) -> dict:
    """{kind: (template, a float64 model with its vocabulary)}."""
    made = {"short": (Template.short(CODES, N_CODES), toy_llama(vocab_size=1 + LEVELS * N_CODES))}
    for kind in KINDS[1:]:
        template = Template.text(tokenizer, kind.split()[0], kind in QUESTIONS, CODES, N_CODES)
        model = toy_llama(vocab_size=tokenizer.get_vocab_size())
        model.grow(LEVELS * N_CODES, torch.Generator().manual_seed(0), std=0.3)
        made[kind] = template, model
    return made


def readable(ids: list[int], template: Template, tokenizer: Tokenizer) -> str:
    """Token ids as a person would write them: codes as <a_5>, text as it is."""
    out, text = "", []
    for token in [*ids, None]:
        if token is None or token >= template.first_token:
            out, text = out + tokenizer.decode(text, skip_special_tokens=False), []
            if token is not None:
                level, code = divmod(token - template.first_token, template.n_codes)
                out += f"<{'abcdefgh'[level]}_{code}>"
        else:
            text.append(token)
    return out


# ---- what a prompt looks like


SNAPSHOTS = {
    "paper": """<|begin_of_text|>Below is an instruction that describes a task. Write a response that \
appropriately completes the request.

### Instruction:
Based on the items that the user has interacted with: <a_0><b_1><c_2>, <a_3><b_0><c_6>, <a_0><b_1><c_2>, can you \
determine what item would be recommended to the user next?

### Response:<a_6><b_5><c_4><|end_of_text|>""",
    "release": """<|begin_of_text|>Below is an instruction that describes a task. Write a response that \
appropriately completes the request.

### Instruction:
The user has interacted with items <a_0><b_1><c_2>, <a_3><b_0><c_6>, <a_0><b_1><c_2> in chronological order. Can \
you predict the next possible item that the user may expect?

### Response:<a_6><b_5><c_4><|end_of_text|>"""}


@pytest.mark.parametrize("style", list(SNAPSHOTS))
def test_a_prompt_reads_like_this(tokenizer, style):
    """Prompt and answer of a history of items 0, 1, 0 and target 2, in full."""
    codes = [[0, 1, 2], [3, 0, 6], [6, 5, 4]]
    template = Template.text(tokenizer, style, True, codes, N_CODES)
    ids = template.prompt((0, 1, 0)).tolist() + template.answer(2)
    assert readable(ids, template, tokenizer) == SNAPSHOTS[style]
    without = Template.text(tokenizer, style, False, codes, N_CODES)
    assert without.answer(2) == template.answer(2)[:-1]
    assert torch.equal(without.prompt((0, 1, 0)), template.prompt((0, 1, 0)))


def test_the_marks_are_one_token_each(tokenizer):
    """<|begin_of_text|> once, first; <|end_of_text|> once, last; the pieces of text are the tokenizer's own."""
    template = Template.text(tokenizer, "paper", True, CODES, N_CODES)
    begin, end = (tokenizer.token_to_id(f"<|{edge}_of_text|>") for edge in ("begin", "end"))
    ids = template.prompt((1, 2)).tolist() + template.answer(3)
    assert ids[0] == begin and ids[-1] == end and ids.count(begin) == ids.count(end) == 1
    assert template.first_token == tokenizer.get_vocab_size()
    text = tokenizer.decode(template.preamble, skip_special_tokens=True) + tokenizer.decode(template.tail)
    assert text == QUESTIONS["paper"].format(items="") and FRAME.startswith("Below is")


def test_the_short_form_is_bos_and_items():
    """<bos> = 0, codes from token 1 on, nothing between and nothing behind; no history is <bos> alone."""
    template = Template.short([[0, 1], [6, 5]], N_CODES)
    assert template.first_token == 1 and template.continues
    assert template.prompt((0, 1)).tolist() == [0, 1 + 0, 1 + 7 + 1, 1 + 6, 1 + 7 + 5]
    assert template.prompt(()).tolist() == [0] and template.prompt(()).dtype == torch.long
    assert template.answer(1) == [7, 13]


def test_each_code_is_one_token():
    """first_token + l * n_codes + c: all levels' codes are different tokens, without gap or overlap."""
    every = np.stack([np.arange(N_CODES)] * LEVELS, 1)
    found = code_tokens(every, N_CODES, 100)
    assert found.shape == every.shape and sorted(found.T.flatten()) == list(range(100, 100 + LEVELS * N_CODES))
    for i, j in ((0, 0), (6, 2), (3, 1)):
        assert found[i, j] == 100 + j * N_CODES + i
    assert np.array_equal(code_tokens(torch.from_numpy(every), N_CODES, 100), found)
    assert np.array_equal(code_tokens(every.tolist(), N_CODES, 100), found)


def test_what_is_no_template_is_an_error(tokenizer):
    """An unknown style lists the known; a tokenizer without Llama's marks is not Llama's."""
    with pytest.raises(ValueError, match="'poem'.*paper, release"):
        Template.text(tokenizer, "poem", True, CODES, N_CODES)
    with pytest.raises(ValueError, match="begin_of_text"):
        Template.text(Tokenizer(models.BPE({"a": 0}, [])), "paper", True, CODES, N_CODES)


# ---- labels


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers_and_nothing_else(made, kind, share):
    """Every pair has exactly its answer as labels, L or L + 1 of them, each at the token before, and
    what that position may see is its own prompt and answer so far."""
    template, _ = made[kind]
    examples = crowd()
    built = sequences(examples, template, share)
    per_pair = LEVELS + (kind in QUESTIONS)
    labels = [label for row in built for label in row.labels.tolist() if label != IGNORE]
    assert labels == [token for e in examples for token in template.answer(e.target)]
    assert len(labels) == per_pair * len(examples) and sum(row.pairs for row in built) == len(examples)
    assert len(built) < len(examples) if share else len(built) == len(examples)
    pairs = iter(examples)
    for row in built:
        seen_from = np.flatnonzero(row.labels != IGNORE)
        mask = collate([row]).mask
        mask = np.tri(len(row.ids), dtype=bool) if mask is None else mask[0, 0].numpy()
        for at in seen_from.reshape(row.pairs, per_pair):
            example = next(pairs)
            whole = template.prompt(example.history).tolist() + template.answer(example.target)
            for j, position in enumerate(at):
                visible = np.flatnonzero(mask[position])
                want = whole[:len(whole) - per_pair + j]
                assert row.ids[visible].tolist() == want
                assert row.positions[visible].tolist() == list(range(len(want)))


def test_shared_rows_are_far_shorter(made):
    """What sharing is for: a user's ten pairs in one row hold a fraction of the tokens."""
    for kind, at_most in (("short", 0.3), ("paper", 0.8)):
        template, _ = made[kind]
        one, each = (sum(len(r.ids) for r in sequences(take(0, list(range(10))), template, share)) for share in (True, False))
        assert one < at_most * each, f"{kind}: {one} tokens shared, {each} alone"


def test_a_sliding_window_breaks_the_run(made):
    """Up to 20 items of history the pairs share a row; from then on each stands alone; so do pairs
    of two users, and pairs that do not follow each other."""
    template, _ = made["short"]
    assert [r.pairs for r in sequences(take(0, list(range(24))), template)] == [21, 1, 1, 1]
    assert [r.pairs for r in sequences([Example(0, (), 1), Example(1, (1,), 2)], template)] == [1, 1]
    assert [r.pairs for r in sequences([Example(0, (), 1), Example(0, (2,), 3), Example(0, (2, 3), 4)], template)] == [1, 2]
    assert sequences([], template) == []


# ---- loss and gradient


def loop_loss(model, examples: list[Example], template: Template) -> torch.Tensor:
    """The sum of -log p over all answers' tokens, pair by pair, with plain logits."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        prompt, answer = template.prompt(example.history).tolist(), template.answer(example.target)
        log_p = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        for j, token in enumerate(answer):
            total = total - log_p[len(prompt) - 1 + j, token]
    return total


def batched_loss(model, built: list[TokenSequence]) -> torch.Tensor:
    batch = collate(built)
    logits = model.head(model.model(batch.ids, batch.positions, batch.mask))
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("kind", ["short", "release", "paper without end"])
def test_sharing_changes_neither_loss_nor_gradient(made, kind):
    """Loss and gradient of a padded batch of all users, shared or not, with the template's head computed once
    and the last layer at the answers alone or not, are those of a loop over the pairs, each a plain sequence, to 1e-10."""
    template, model = made[kind]
    examples = crowd()
    found, answers = {}, sum((row.labels != IGNORE).sum() for row in sequences(examples, template))
    for name, loss in (("loop", lambda m: loop_loss(m, examples, template)),
                       ("alone", lambda m: batched_loss(m, sequences(examples, template, share=False))),
                       ("shared", lambda m: batched_loss(m, sequences(examples, template))),
                       ("lean", lambda m: answers * answer_loss(m, collate(sequences(examples, template), preamble=template.preamble))),
                       ("alone, lean", lambda m: answers * answer_loss(m, collate(
                           sequences(examples, template, share=False), preamble=template.preamble)))):
        copied = copy.deepcopy(model)
        value = loss(copied)
        value.backward()
        found[name] = value.item(), {n: p.grad for n, p in copied.named_parameters()}
    value, gradient = found["loop"]
    for name in found.keys() - {"loop"}:
        assert abs(found[name][0] / value - 1) <= 1e-12, f"{name}: {found[name][0]} against {value}"
        for parameter, want in gradient.items():
            difference = (found[name][1][parameter] - want).abs().max()
            assert difference <= 1e-10 * max(1, want.abs().max()), f"{name}, {parameter}: {difference:.1e}"
            assert want.abs().max() > 1e-3, f"{parameter} has no gradient: nothing is compared"


def test_a_lean_batch_asks_for_less(made):
    """The template's head is in no row, and the last layer's MLP sees the answers' places alone."""
    template, model = made["release"]
    whole, lean = (collate(sequences(crowd(), template), preamble=head) for head in (None, template.preamble))
    assert lean.ids.shape[1] == whole.ids.shape[1] - len(template.preamble) and lean.preamble.tolist() == [list(template.preamble)]
    assert (lean.labels.gather(1, lean.at) != IGNORE).sum() == (whole.labels != IGNORE).sum()
    seen = []
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        answer_loss(model, lean)
    hook.remove()
    assert seen == [1, max((row.labels != IGNORE).sum() for row in sequences(crowd(), template))]


def test_a_batch_is_the_sum_of_its_rows(made):
    """Padding to the longest row has no effect; its labels are IGNORE and its pairs add up."""
    template, model = made["release"]
    built = sequences(crowd(), template)
    batch = collate(built)
    assert batch.pairs == len(crowd()) and batch.ids.shape[1] == max(len(r.ids) for r in built)
    for row, labels in zip(built, batch.labels):
        assert (labels[len(row.ids):] == IGNORE).all() and labels[:len(row.ids)].tolist() == row.labels.tolist()
    with torch.no_grad():
        alone = sum(batched_loss(model, [row]) for row in built)
        assert abs(batched_loss(model, built) / alone - 1) <= 1e-12
    short = collate(sequences(crowd(), made["short"][0]))
    assert short.mask is None and short.positions is None, "the short form needs no mask"


# ---- batches


def test_every_row_comes_once_an_epoch_in_batches_of_about_that_many_pairs(made):
    """An epoch is a partition of the rows; a batch is off by less than its largest row."""
    rng = np.random.default_rng(0)
    template, _ = made["short"]
    built = [row for user in range(300)
             for row in sequences(take(user, rng.integers(0, ITEMS, rng.integers(1, 15)).tolist()), template)]
    largest = max(row.pairs for row in built)
    for pairs in (1, 16, 64, 10_000):
        epoch = batches(built, pairs, torch.Generator().manual_seed(0))
        assert sorted(id(row) for batch in epoch for row in batch) == sorted(map(id, built))
        sizes = sorted(sum(row.pairs for row in batch) for batch in epoch)
        assert all(epoch) and sizes[-1] < pairs + largest, f"{pairs}: {sizes}"
        if pairs > largest:
            assert sizes[1] > pairs - largest if len(sizes) > 1 else sizes == [sum(r.pairs for r in built)], sizes
            assert len(sizes) == -(-sum(sizes) // pairs), "steps an epoch"


def test_batches_are_seeded_shuffled_and_little_padded(made):
    """The generator alone decides; two epochs differ; rows of like length meet, and yet batches do
    not come by length."""
    rng = np.random.default_rng(0)
    template, _ = made["short"]
    built = [row for user in range(400)
             for row in sequences(take(user, rng.integers(0, ITEMS, rng.integers(1, 20)).tolist()), template)]
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    first, second = batches(built, 64, generator), batches(built, 64, generator)
    torch.manual_seed(2)
    again = batches(built, 64, torch.Generator().manual_seed(5))
    order = [[[id(row) for row in batch] for batch in epoch] for epoch in (first, second, again)]
    assert order[0] == order[2] != order[1]
    assert sorted(map(tuple, order[0])) != sorted(map(tuple, order[1])), "only the batches' order changed"
    longest = [max(len(row.ids) for row in batch) for batch in first]
    padded = sum(top * len(batch) for top, batch in zip(longest, first)) / sum(len(row.ids) for row in built)
    assert padded < 1.15, f"{padded:.2f} times the tokens"
    longest = [max(len(row.ids) for row in batch) for batch in batches(built, 128, generator)]  # one pool
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.6, "batches come by length"
    assert first[0][0] is not built[0] or first[0][1] is not built[1], "nothing is shuffled"


def test_no_rows_are_no_batches():
    """A stage without pairs has an epoch of nothing."""
    assert batches([], 8, torch.Generator()) == []
