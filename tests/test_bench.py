"""The benchmark compares like with like: the same loss, gradients, items and scores on both sides."""
from __future__ import annotations

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.bench import __main__ as bench, data as race_data, growth as race_growth, llama as race_llama, load as race_load, race, rqvae as race_rqvae, towers as race_towers, trie as race_trie
from minipeso.config import UsageError, resolve
from minipeso.runs.guard import guard
from minipeso.llama import LlamaConfig
from minipeso.tokens import sequences
from minipeso.trie import Trie
from tests.reference import TOY

MICRO = LlamaConfig.from_dict({**TOY, "vocab_size": 1})


def micro_case() -> race_llama.Case:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    return race_llama.make_case(MICRO, items=200, n_codes=16)


def move_an_adapter(case: race_llama.Case, by: float) -> None:
    """Shifts one matrix A of the peer, in its last layer."""
    with torch.no_grad():
        race_llama.trainable(case.peer)[-2].add_(by)


# ---- the same work


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 40, "num_key_value_heads": 4}])
def test_training_is_compared_on_equal_losses_and_gradients(changes):
    """Ours, peft and peft with a cut head agree on micro shapes before anything is timed."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    case = race_llama.make_case(replace(MICRO, **changes), items=200, n_codes=16)
    runs, count, unit, equal = race_llama.train_contest(case, users=3, steps=2)
    loss, gradient = map(float, re.findall(r"\de[+-]\d\d", equal))
    assert loss <= 1e-5 and gradient <= 1e-4, equal
    assert next(iter(runs)) == "ours" and len(runs) == 3 and unit == "examples" and count >= 2 * 3 * 3
    for run in runs.values():
        run()


def test_steps_move_both_sides_alike():
    """After two AdamW steps on the same pairs, A and B of both sides are still the same."""
    case = micro_case()
    before = [p.detach().clone() for p in race_llama.trainable(case.ours)]
    runs, *_ = race_llama.train_contest(case, users=3, steps=2)
    runs["ours"]()
    runs["peft"]()
    moved = [(p - b).abs().max().item() for p, b in zip(race_llama.trainable(case.ours), before)]
    apart = [(p - q).abs().max().item() for p, q in zip(race_llama.trainable(case.ours), race_llama.trainable(case.peer))]
    assert min(moved) >= 1e-4, f"a matrix moved by {min(moved):.1e} only"
    # AdamW's first steps are lr * sign(gradient): where a gradient is rounding, so is its sign
    assert torch.tensor(apart).median() <= 1e-6, f"apart by {apart}"


def test_decoding_is_compared_on_equal_items_and_scores():
    """Beam search, generate() and generate() with one prompt a user find the same ten items, scores within 1e-4."""
    runs, count, unit, equal = race_llama.generate_contest(micro_case(), users=5)
    assert count == 5 and unit == "users" and float(re.search(r"\de[+-]\d\d", equal)[0]) <= 1e-4, equal
    codes, scores = runs["ours"]()
    assert codes.shape == (5, 10, 4) and scores.isfinite().all(), "a trie with enough items fills every beam"
    for name in list(runs)[1:]:
        _, theirs = runs[name]()
        assert (scores - theirs).abs().max() <= 1e-4, name


@pytest.mark.parametrize("contest", [race_llama.train_contest, race_llama.generate_contest])
def test_different_work_is_not_timed(contest):
    """One matrix moved by 0.01 on one side is noticed: no timing, FloatingPointError in three lines."""
    case = micro_case()
    move_an_adapter(case, 0.01)
    with pytest.raises(FloatingPointError, match="the contenders do not") as caught:
        contest(case, users=3)
    assert len(str(caught.value).splitlines()) == 3, caught.value


def test_gradients_are_compared_even_with_equal_losses():
    """The loss a b is the same with the factors exchanged, its gradient is not."""
    class Pair(torch.nn.Module):
        def __init__(self, a: float, b: float):
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.tensor([float(x)])) for x in (a, b))

    def contender(a: float, b: float):
        model = Pair(a, b)
        return model, lambda factor: (factor * model.a * model.b).sum()

    assert race_llama.same_training([contender(2, 3), contender(2, 3)], [1.0, 2.0]) == [0, 0]
    with pytest.raises(FloatingPointError, match="loss differs by 0.0e\\+00, gradient by"):
        race_llama.same_training([contender(2, 3), contender(2, 3), contender(3, 2)], [1.0, 2.0])
    with pytest.raises(FloatingPointError):
        race_llama.same_training([contender(2, 3), contender(2, torch.nan), contender(2, 3)], [1.0])


def test_other_items_are_noticed_even_with_equal_scores():
    """The order of near ties is free, the set of items is not."""
    items = torch.arange(12).reshape(1, 3, 4)
    scores = torch.tensor([[-1.0, -1.0, -2.0]])
    assert race_llama.same_search(items, scores, items[:, [1, 0, 2]], scores) == 0
    with pytest.raises(FloatingPointError, match="1 of 1 users"):
        race_llama.same_search(items, scores, items + torch.tensor([0, 0, 0, 1]), scores)
    with pytest.raises(FloatingPointError, match="scores 1.0e-03 apart"):
        race_llama.same_search(items, scores, items, scores + 1e-3)
    with pytest.raises(FloatingPointError):
        race_llama.same_search(items, scores, items, scores * torch.nan)


# ---- the workload


def test_users_are_like_amazons():
    """Sequences of 5 items and more, 7.5 in the mean; the last two of each are held out; no window slides,
    so that every user is one row."""
    drawn = race_llama.draw_pairs(1000, users=4000, seed=0)
    pairs = torch.bincount(torch.tensor([pair.user for pair in drawn]))
    assert len(pairs) == 4000 and pairs.min() == 3 and pairs.max() <= 20
    assert abs(pairs.float().mean() - 5.5) < 0.2, f"{pairs.float().mean():.2f} pairs a user"
    assert max(len(pair.history) for pair in drawn) < 20
    case_rows = sequences(drawn[:200], race_llama.Template.short([[1, 2, 3, 4]] * 1000, 256))
    assert len(case_rows) == len({pair.user for pair in drawn[:200]})


def test_batches_are_those_of_an_epoch():
    """Whole users, each in one batch, about 5.5 pairs a user; users of a batch are of like length, as in training."""
    template = race_llama.Template((0, 1), (), (2,), (), race_llama.code_tokens(race_llama.distinct_codes(500), 256, 3), 3, 256)
    made = race_llama.like_length(template, users=6, steps=32)
    per_user = [[pair.user for pair in batch] for batch in made]
    users = [user for batch in per_user for user in set(batch)]
    assert len(users) == len(set(users)) and len(made) >= 28 and len(users) > 0.85 * 6 * 32
    drawn = race_llama.draw_pairs(500, 6 * 32, 0)
    assert sorted(map(repr, (pair for batch in made for pair in batch))) == sorted(repr(p) for p in drawn if p.user in set(users))
    spread = [np.ptp([batch.count(user) for user in set(batch)]) for batch in per_user]
    assert np.median(spread) <= 2, f"pairs a user differ by {spread} inside the batches"
    assert 28 < np.mean(list(map(len, made))) < 38


def test_shapes_are_those_of_the_command_line():
    """tiny and small are what --base builds; the third has a real vocabulary and 256 units."""
    for name in ("tiny", "small"):
        shape, cfg = race_llama.shape_of(name), resolve({"base": name})
        assert (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size) == (cfg.hidden, cfg.layers, 1)
    big = race_llama.shape_of("small-bigvocab")
    assert (big.hidden_size, big.vocab_size, big.head_dim * big.num_attention_heads) == (256, 128256, 256)


# ---- the report


def test_contenders_take_turns():
    """One round to warm up, then every contender once a round, the order reversed each time."""
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = race.compare(runs, 3)
    assert "".join(calls) == "abc" "cba" "abc" "cba"
    assert {len(times) for times in seconds.values()} == {3}


@pytest.mark.parametrize("task", ["train", "generate"])
def test_report_has_a_line_for_every_contender(task, capsys):
    """The machine, the sizes, what was found equal, and name, ms, rate and ratio of each contender."""
    bench.model(task, micro_case(), rounds=1)
    machine, sizes, equal, *lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\d+ cores; Python 3.*torch .*, transformers .*, peft .*; \d+ threads", machine), machine
    assert task in sizes and "hidden 24" in sizes and "vocabulary 1 + 64" in sizes and equal.startswith("equal: ")
    assert len(lines) == 3 and lines[0].startswith("ours ") and "1.00 x ours [1.00, 1.00]" in lines[0]
    for line in lines:
        assert re.search(r" [\d.,]+ ms +[\d.,]+ (examples|users)/s +[\d.]+ x ours \[[\d.]+, [\d.]+\]$", line), line


def test_ratios_are_of_rounds_not_of_medians(monkeypatch, capsys):
    """A peer at 2, 4 and 3 times ours in three rounds is 3 x ours [2, 4], however the rounds themselves differ."""
    monkeypatch.setitem(bench.CONTESTS, "train", lambda case: ({"ours": None, "peer": None}, 10, "examples", "all"))
    monkeypatch.setattr(race, "compare", lambda *_: {"ours": [1.0, 10.0, 0.1], "peer": [2.0, 40.0, 0.3]})
    bench.model("train", micro_case(), rounds=3)
    ours, peer = capsys.readouterr().out.splitlines()[-2:]
    assert ours.split()[1:] == "1000.0 ms 10.0 examples/s 1.00 x ours [1.00, 1.00]".split()
    assert peer.split()[1:] == "2000.0 ms 5.0 examples/s 3.00 x ours [2.00, 4.00]".split()


# ---- errors


@pytest.mark.parametrize("absent", ["transformers", "peft"])
def test_missing_peers_are_a_usage_error(absent, monkeypatch, capsys):
    """Without the test extras: three lines with the command that installs them, exit code 2."""
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setattr(sys, "argv", ["bench", "train"])
    with pytest.raises(SystemExit) as caught:
        guard(bench.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 3 and absent in lines[1] and ".[test]" in lines[2], lines


@pytest.mark.parametrize("arguments", [["train", "--rounds", "0"], ["fly"], ["train", "--shape", "huge"], []])
def test_a_wrong_command_line_is_exit_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as caught:
        guard(bench.main)
    assert caught.value.code == 2, capsys.readouterr().err


def test_zero_rounds_name_the_flag(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "train", "--rounds", "0"])
    with pytest.raises(UsageError, match="--rounds is out of range\nfound 0\n"):
        bench.main()


# ---- memory, files, growth


def test_peak_memory_is_what_a_run_needs():
    """A run that fills 64 MiB needs 64 MiB, whatever was resident before; what it frees counts too."""
    before = torch.ones(2**22)
    for _ in range(2):
        needed = race.peak_of(lambda: torch.ones(2**24))
        assert 60 * 2**20 < needed < 80 * 2**20, f"{needed:,}"
    assert race.peak() >= before.nbytes


def test_memory_has_a_line_for_every_contender(monkeypatch, capsys):
    """--memory: each contender alone in a process of its own; above the models, and as a multiple of ours."""
    asked = []
    monkeypatch.setattr(race, "child", lambda module, *argv: (
        asked.append(argv), race.Child(1.0, 0, {"peak": 2**20 * (10 if argv[-1] == "ours" else 25)}))[1])
    bench.memory("train", ["ours", "peft"], ["train", "--memory"])
    assert asked == [("train", "--memory", "--only", "ours"), ("train", "--memory", "--only", "peft")]
    ours, peft = capsys.readouterr().out.splitlines()[1:]
    assert ours.split() == "ours 10 MiB above the models 1.00 x ours".split()
    assert peft.split() == "peft 25 MiB above the models 2.50 x ours".split()


def test_flags_of_training_are_refused_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "generate", "--alone"])
    with pytest.raises(UsageError, match="--alone is of training\nfound generate"):
        bench.main()


def test_rating_files_are_read_alike(capsys):
    """The four contenders find the same events; a line for each with its peak, and one for the metadata."""
    pytest.importorskip("pandas")
    pytest.importorskip("polars")
    race_data.run(3000, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in lines[3:7]] == list(race_data.CONTENDERS)
    assert all(re.search(r"rows/s .* x ours \[.*\]  peak [\d,]+ MiB$", line) for line in lines[3:7])
    assert lines[2].startswith("equal: 1,") and lines[7].startswith("metadata: 750 lines") and " 8 items kept" in lines[7]
    assert 10 < float(re.search(r"peak ([\d,]+) MiB$", lines[7])[1].replace(",", "")) < 2000


def test_other_events_are_not_timed():
    made = {"ours": [race.Child(1.0, 0, {"count": 3, "content": "a"})], "peer": [race.Child(1.0, 0, {"count": 3, "content": "b"})]}
    with pytest.raises(FloatingPointError, match="do not read the same") as caught:
        race_data.same(made)
    assert len(str(caught.value).splitlines()) == 3
    race_data.same({"ours": made["ours"], "peer": made["ours"]})


def test_a_child_that_fails_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="exited with 1\n.*race_data nobody nothing\n"):
        race.child("tests.bench.data", "nobody", "nothing")


def test_growth_is_of_the_real_thing():
    """At stage 5, `sumlora-all` holds five adapters and PESO one; keys and values grow with history and beams."""
    one, five = (race_growth.stored(race_growth.after(method, 5)) for method in ("peso", "sumlora-all"))
    assert five == 5 * one and one == race_growth.stored(race_growth.make_model())
    trie, model = Trie(race_llama.distinct_codes(500), 256), race_growth.make_model()
    sizes = [race_growth.search(model, trie, history, beams)[1] for history, beams in ((5, 5), (10, 5), (10, 10))]
    assert sizes[1] - sizes[0] == 2 * 4 * 2 * 32 * 4 * 20, "two arrays, 4 layers, 2 heads of 32 floats, 20 tokens"
    assert sizes[2] - sizes[1] == 2 * 4 * 2 * 32 * 4 * 15
    run, _ = race_growth.search(model, trie, 5, 5)
    assert run()[0].shape == (64, 5, 4)
    before = [p.detach().clone() for p in race_llama.trainable(model)]
    race_growth.epoch(model, 3)()
    assert all((p != b).any() for p, b in zip(race_llama.trainable(model), before))


def test_growth_prints_three_sizes(monkeypatch):
    seconds = {"1": [0.5, 1.5], "2": [2.0], "3": [4.0]}
    monkeypatch.setattr(race, "compare", lambda runs, rounds: seconds)
    found = race_growth.line("beams", (5, 10, 20), {}, 2, "a user", ["a", "b", "c"], 1)
    assert re.sub(" +", " ", found) == "beams a user 5: 500.000 ms a 10: 1000.000 ms b 20: 2000.000 ms c"


# ---- tries and checkpoints


def test_tries_hold_the_same_children():
    """A trie and nested dictionaries of 300 items agree on every prefix tried; one item more is noticed."""
    codes = race_trie.catalogue(300)
    tree = race_trie.dictionary(codes)
    assert race_trie.same_children(Trie(codes), tree, codes) == 4 * 300
    with pytest.raises(FloatingPointError, match="do not hold the same") as caught:
        race_trie.same_children(Trie(codes[1:]), tree, codes)
    assert len(str(caught.value).splitlines()) == 3
    assert re.match(r"the children of [\d,]+ prefixes", race_trie.check(300))


def test_the_trie_task_has_a_line_for_every_contender():
    lines = race_trie.build_race(2000, 1)
    assert [line[:29].strip() for line in lines] == [*2 * ["ours", "dictionary"], "ours, 8 x 2,048 codes"]
    assert all("bytes an item" in line for line in lines[2:])
    head, *steps = race_trie.step_table(20_000, 1)
    assert [step.split()[0] for step in steps] == ["10,000", "20,000"] and all(step.count(" us") == 4 for step in steps)


def test_checkpoints_are_loaded_alike(tmp_path):
    """Ours and transformers have every tensor byte for byte; a changed weight is noticed; a line for each with its
    memory as a multiple of the file."""
    pytest.importorskip("transformers")
    file = race_load.write_base(race_llama.shape_of("tiny"), tmp_path)
    assert race_load.check(tmp_path) == "38 tensors, byte for byte"
    lines = race_load.load_race(file, 1, "warm")
    assert [line.split()[0] for line in lines] == ["ours", "transformers", "bytes"]
    assert all(re.search(r"GB/s .* memory [\d.]+ x the file$", line) for line in lines)
    weights = race_load.weights_of(race_load.CONTENDERS["ours"](tmp_path))
    with pytest.raises(FloatingPointError, match="1 of 38 tensors differ, the first is model.norm.weight"):
        race_load.same_weights(weights, weights | {"model.norm.weight": 1})


def test_the_training_state_of_the_1b_shape_is_small(tmp_path):
    """Adapters of rank 8 in all projections, moments and best copy: 5.6 million numbers, 16 bytes each, under 150 MB."""
    count, size = race_load.state_bytes(race_llama.shape_of("1b"), tmp_path)
    assert count == 16 * 8 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192)) and 16 * count < size < 16.1 * count
    assert size < 150e6


def test_an_epoch_of_towers_is_a_real_one(monkeypatch, capsys):
    """The epoch learns (its graph has as many edges as drawn, its vectors move), and the ranking ranks everybody asked."""
    moved = []
    real = race_towers.fit
    monkeypatch.setattr(race_towers, "fit", lambda E, *rest: moved.append((real(E, *rest) - E).abs().max().item()))
    for name, value in (("USERS", 40), ("ITEMS", 60), ("EDGES", 300)):
        monkeypatch.setattr(race_towers, name, value)
    runs, ranking = race_towers.contest(40, 60, 300)
    for run in runs.values():
        run()
    assert moved and moved[0] > 1e-3 and len(ranking()) == 40
    monkeypatch.setattr(race_towers, "contest", lambda: (runs, ranking))
    race_towers.run(1)
    *_, ours, bound, ranked = capsys.readouterr().out.splitlines()
    assert ours.startswith("ours ") and bound.startswith("sparse products and Adam ") and " s [" in ranked


def test_rq_vaes_are_compared_on_equal_losses_gradients_and_ids(monkeypatch, capsys):
    """The released shape of the code computes the same; an epoch moves both sides; five lines of times; a codeword moved by
    1 on one side is noticed."""
    for name, value in (("ITEMS", 700), ("WIDTH", 12), ("BATCH", 300), ("STEPS", 2), ("RELEASE_HIDDEN", (16,))):
        monkeypatch.setattr(race_rqvae, name, value)
    race_rqvae.run(1)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"equal: loss to \de[+-]\d\d, gradients of the encoder to \de[+-]\d\d, 100.00% of the IDs$", lines[1]), lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["an", "ours", "released", "IDs", "ours", "released,", "released,"]
    ours, peer, x = race_rqvae.make(700, 12, (16,))
    for side, run in ((ours, "ours"), (peer, "released")):
        before = [p.detach().clone() for p in side.parameters()]
        race_rqvae.contests(ours, peer, x)[0][run]()
        assert all((p != b).any() for p, b in zip(side.parameters(), before)), run
    ours, peer, x = race_rqvae.make(700, 12, (16,))
    peer.books[0].weight.data += 1
    with pytest.raises(FloatingPointError, match="the contenders do not quantise the same"):
        race_rqvae.check(ours, peer, x)
