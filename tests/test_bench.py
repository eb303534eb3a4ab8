"""The benchmark compares like with like: the same loss, gradients, items and scores on both sides."""
from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch

from minipeso import bench, race, race_llama
from minipeso.config import UsageError, guard, resolve
from minipeso.llama import LlamaConfig
from minipeso.tokens import rows
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
    case_rows = rows(drawn[:200], race_llama.Template.short([[1, 2, 3, 4]] * 1000, 256))
    assert len(case_rows) == len({pair.user for pair in drawn[:200]})


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
