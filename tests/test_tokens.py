"""Prompts one can read, labels on the answer only, and pairs that share a trunk without any effect."""
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models

from minipeso.objective import answer_loss
from minipeso.stages import Example
from minipeso.tokens import IGNORE, QUESTIONS, Template, TokenSequence, batches, code_tokens, collate, sequences
from tests.micro import llama_tokenizer
from tests.reference import toy_llama

LEVELS, N_CODES, ITEMS = 3, 7, 40
KINDS = ("short", "paper", "release", "paper without end")
PICKED = np.random.default_rng(0).permutation(N_CODES**LEVELS)[:ITEMS]
CODES = np.stack(np.unravel_index(PICKED, (N_CODES,) * LEVELS), 1)  # all different


def take(user: int, items: list[int], start: int = 0, window: int = 20) -> list[Example]:
    """All of a user's pairs from item `start` on, with a window of the last 20."""
    return [Example(user, tuple(items[max(0, j - window):j]), items[j], 1) for j in range(start, len(items))]


def crowd() -> list[Example]:
    """Users with a sliding window, a single item, a history from before, one item again and again, gaps."""
    a, b, c, e = (np.random.default_rng(1 + n).integers(0, ITEMS, n).tolist() for n in (22, 1, 8, 6))
    return [*take(0, a), *take(1, b), *take(2, c, start=5), *take(3, [8] * 4), *take(4, e)[::2], *take(4, e)[3:4]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return llama_tokenizer(list(QUESTIONS.values()))


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
    out, first = "", template.first_token
    for coded, run in itertools.groupby(ids, lambda token: token >= first):
        codes = (divmod(token - first, template.n_codes) for token in run) if coded else ()
        out += "".join(f"<{'abc'[level]}_{code}>" for level, code in codes) or tokenizer.decode([*run], False)
    return out


SNAPSHOT = ("<|begin_of_text|>Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{}\n\n### Response:<a_6><b_5><c_4><|end_of_text|>")
ITEMS_READ = "<a_0><b_1><c_2>, <a_3><b_0><c_6>, <a_0><b_1><c_2>"
SENTENCES = {
    "paper": f"Based on the items that the user has interacted with: {ITEMS_READ}, can you determine what item would "
             "be recommended to the user next?",
    "release": f"The user has interacted with items {ITEMS_READ} in chronological order. Can you predict the next "
               "possible item that the user may expect?"}


@pytest.mark.parametrize("style", list(SENTENCES))
def test_a_prompt_reads_like_this(tokenizer, style):
    """Prompt and answer of a history of items 0, 1, 0 and target 2, in full; Llama's marks are one token each, once."""
    codes = [[0, 1, 2], [3, 0, 6], [6, 5, 4]]
    template = Template.text(tokenizer, style, True, codes, N_CODES)
    ids = template.prompt((0, 1, 0)).tolist() + template.answer(2)
    assert readable(ids, template, tokenizer) == SNAPSHOT.format(SENTENCES[style])
    marks = [tokenizer.token_to_id(f"<|{edge}_of_text|>") for edge in ("begin", "end")]
    assert [ids[0], ids[-1]] == marks and all(ids.count(mark) == 1 for mark in marks)
    assert template.first_token == tokenizer.get_vocab_size()
    without = Template.text(tokenizer, style, False, codes, N_CODES)
    assert without.answer(2) == template.answer(2)[:-1]
    assert torch.equal(without.prompt((0, 1, 0)), template.prompt((0, 1, 0)))


def test_the_short_form_is_bos_and_items():
    """<bos> = 0, codes from token 1 on, nothing between, nothing behind; no history is <bos> alone. A code is one
    token, first_token + l * n_codes + c: all levels' codes are different tokens, without gap or overlap."""
    template = Template.short([[0, 1], [6, 5]], N_CODES)
    assert template.first_token == 1 and template.answer(1) == [7, 13]
    assert template.prompt((0, 1)).tolist() == [0, 1 + 0, 1 + 7 + 1, 1 + 6, 1 + 7 + 5]
    assert template.prompt(()).tolist() == [0] and template.prompt(()).dtype == torch.long
    every = np.stack([np.arange(N_CODES)] * LEVELS, 1)
    want = [[100 + level * N_CODES + code for level in range(LEVELS)] for code in range(N_CODES)]
    for codes in (every, torch.from_numpy(every), every.tolist()):
        assert code_tokens(codes, N_CODES, 100).tolist() == want


def test_what_is_no_template_is_an_error(tokenizer):
    """An unknown style lists the known; a tokenizer without Llama's marks is not Llama's."""
    with pytest.raises(ValueError, match="'poem'.*paper, release"):
        Template.text(tokenizer, "poem", True, CODES, N_CODES)
    with pytest.raises(ValueError, match="begin_of_text"):
        Template.text(Tokenizer(models.BPE({"a": 0}, [])), "paper", True, CODES, N_CODES)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers_and_nothing_else(made, kind, share):
    """Every pair has exactly its answer as labels, L or L + 1 of them, each at the token before, and
    what that position may see is its own prompt and answer so far, at the positions of a single pair."""
    template, examples, per_pair = made[kind][0], crowd(), LEVELS + (kind in QUESTIONS)
    built = sequences(examples, template, share)
    labels = [label for one in built for label in one.labels.tolist() if label != IGNORE]
    assert labels == [token for e in examples for token in template.answer(e.target)]
    assert len(labels) == per_pair * len(examples) and sum(one.pairs for one in built) == len(examples)
    assert len(built) < len(examples) if share else len(built) == len(examples)
    pairs = iter(examples)
    for one in built:
        batch, l = collate([one]), len(one.ids)
        mask = np.tri(l, dtype=bool) if batch.mask is None else batch.mask[0, 0].numpy()
        positions = np.arange(l) if batch.positions is None else batch.positions[0].numpy()
        for places in np.flatnonzero(one.labels != IGNORE).reshape(one.pairs, per_pair):
            example = next(pairs)
            whole = template.prompt(example.history).tolist() + template.answer(example.target)
            for place, seen in zip(places, range(len(whole) - per_pair, len(whole))):
                visible = np.flatnonzero(mask[place])
                assert one.ids[visible].tolist() == whole[:seen] and positions[visible].tolist() == list(range(seen))


def test_a_sliding_window_breaks_the_run(made):
    """Pairs share a sequence up to 20 items of history, not beyond, nor those of two users or that do not follow."""
    examples = {(21, 1, 1, 1): take(0, list(range(24))), (1, 1): [*take(0, [1]), *take(1, [1, 2], start=1)],
                (1, 2): [*take(0, [1]), *take(0, [2, 3, 4], start=1)], (): []}
    for pairs, some in examples.items():
        assert tuple(one.pairs for one in sequences(some, made["short"][0])) == pairs


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
    logits = model.lm_head.logits(model.model(batch.ids, batch.positions, batch.mask))
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("kind", ["short", "release", "paper without end"])
def test_sharing_changes_neither_loss_nor_gradient(made, kind):
    """Loss and gradient of a padded batch of all users, shared or not, its preamble computed once or in every
    sequence, are those of a loop over the pairs, each a plain sequence, to 1e-10."""
    (template, model), examples, results = made[kind], crowd(), {}
    shared, apart = (sequences(examples, template, share) for share in (True, False))
    answers = sum(len(template.answer(e.target)) for e in examples)
    for name, loss in (("loop", lambda m: loop_loss(m, examples, template)),
                       ("apart, whole", lambda m: batched_loss(m, apart)),
                       ("shared, whole", lambda m: batched_loss(m, shared)),
                       ("apart", lambda m: answers * answer_loss(m, collate(apart))),
                       ("shared", lambda m: answers * answer_loss(m, collate(shared)))):
        copied = copy.deepcopy(model)
        value = loss(copied)
        value.backward()
        results[name] = value.item(), {n: p.grad for n, p in copied.named_parameters()}
    value, gradient = results.pop("loop")
    for name, (other, gradients) in results.items():
        assert abs(other / value - 1) <= 1e-12, f"{name}: {other} against {value}"
        for parameter, want in gradient.items():
            assert (gradients[parameter] - want).abs().max() <= 1e-10 * max(1, want.abs().max()), f"{name}, {parameter}"
            assert want.abs().max() > 1e-3, f"{parameter} has no gradient: nothing is compared"


def test_a_batch_is_the_sum_of_its_sequences(made):
    """Padding to the longest has no effect, its labels are IGNORE and its pairs add up; the model sees the preamble of
    one sequence, and of every sequence what is behind it."""
    template, model = made["release"]
    built = sequences(crowd(), template)
    batch = collate(built)
    assert batch.pairs == len(crowd()) and batch.ids.shape[1] == max(len(one.ids) for one in built)
    for one, labels, real in zip(built, batch.labels, batch.real):
        l = len(one.ids)
        assert (labels[l:] == IGNORE).all() and labels[:l].tolist() == one.labels.tolist()
        assert real[:l].all() and not real[l:].any()
    with torch.no_grad():
        total = sum(batched_loss(model, [one]) for one in built)
        assert abs(batched_loss(model, built) / total - 1) <= 1e-12
    short = collate(sequences(crowd(), made["short"][0]))
    assert short.mask is None and short.positions is None, "the short form needs no mask"
    shapes, p = [], len(template.preamble)
    hook = model.model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        answer_loss(model, batch)
    hook.remove()
    assert (batch.ids[:, :p] == torch.tensor(template.preamble)).all() and p > 1
    assert shapes == [(1, p), (len(batch.ids), batch.ids.shape[1] - p)]


def test_batches_are_seeded_shuffled_and_little_padded(made):
    """An epoch is a partition of the sequences; a batch is off by less than its largest one. The generator alone
    decides; two epochs differ; sequences of like length meet, yet batches are not by length."""
    rng = np.random.default_rng(0)
    carts = [take(user, rng.integers(0, ITEMS, rng.integers(1, 20)).tolist()) for user in range(400)]
    built = [one for cart in carts for one in sequences(cart, made["short"][0])]
    largest, total = (f(one.pairs for one in built) for f in (max, sum))
    for pairs in (1, 16, 64, 10_000):
        epoch = batches(built, pairs, torch.Generator().manual_seed(0))
        assert sorted(id(one) for batch in epoch for one in batch) == sorted(map(id, built))
        sizes = sorted(sum(one.pairs for one in batch) for batch in epoch)
        assert all(epoch) and sizes[-1] < pairs + largest, f"{pairs}: {sizes}"
        if pairs > largest:
            assert len(sizes) == -(-total // pairs), "steps per epoch"
            assert len(sizes) == 1 or sizes[1] > pairs - largest, sizes
    assert batches([], 8, torch.Generator()) == []
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    first, second = batches(built, 64, generator), batches(built, 64, generator)
    torch.manual_seed(2)
    again = batches(built, 64, torch.Generator().manual_seed(5))
    order = [[[id(one) for one in batch] for batch in epoch] for epoch in (first, second, again)]
    assert order[0] == order[2] != order[1]
    assert sorted(map(tuple, order[0])) != sorted(map(tuple, order[1])), "only the batches' order changed"
    longest = [max(len(one.ids) for one in batch) for batch in first]
    padded = sum(top * len(batch) for top, batch in zip(longest, first)) / sum(len(one.ids) for one in built)
    assert padded < 1.15, f"{padded:.2f} times the tokens"
    longest = [max(len(one.ids) for one in batch) for batch in batches(built, 128, generator)]  # one pool
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.6, "batches come by length"
    for pairs, pools in ((16, True), (128, False)):  # within one pool, no batch reaches into the next one's lengths
        ends = sorted((min(lengths), max(lengths)) for lengths in (
            [len(one.ids) for one in batch] for batch in batches(built, pairs, generator)))
        assert any(low < high for (_, high), (low, _) in zip(ends, ends[1:])) == pools, pairs
    assert first[0][0] is not built[0] or first[0][1] is not built[1], "nothing is shuffled"
