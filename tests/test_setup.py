"""From files to stages, texts, IDs and model: nothing is mixed up on the way."""
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from minipeso.runs import setup
from minipeso.config import UsageError
from minipeso.semantic_ids import SemanticIDs
from minipeso.tokens import QUESTIONS
from tests.micro import blocks, checkpoint, micro, shared_ids

JANUARY_2020, JANUARY_2021 = 1_577_836_800_000, 1_609_459_200_000  # ms, UTC


def raw(folder: Path) -> tuple[dict[str, list[tuple[int, str]]], dict[str, str]]:
    """{user: [(time, item)]} and {item: title}, read without the package."""
    events = defaultdict(list)
    review_file = next(p for p in folder.glob("*.jsonl") if not p.name.startswith("meta"))
    for line in review_file.read_text().splitlines():
        row = json.loads(line)
        events[row["user_id"]].append((row["timestamp"], row["parent_asin"]))
    meta = map(json.loads, next(folder.glob("meta*")).read_text().splitlines())
    titles = {row["parent_asin"]: row["title"] for row in meta}
    return {user: sorted(taken) for user, taken in events.items()}, titles


def reviews(folder: Path, rows: list[tuple[str, str, int]], bad: str = "") -> Path:
    """A folder in the Hub's schema from (user, item, ms); item x is titled "the x". bad: further lines of metadata."""
    folder.mkdir(exist_ok=True)
    (folder / "R.jsonl").write_text("".join(
        json.dumps({"user_id": u, "parent_asin": i, "timestamp": t}) + "\n" for u, i, t in rows))
    (folder / "meta_R.jsonl").write_text("".join(
        json.dumps({"parent_asin": i, "title": f"the {i}"}) + "\n" for i in sorted({i for _, i, _ in rows})) + bad)
    return folder


@pytest.mark.parametrize("settings", [dict(seed=0), dict(seed=1, min_events=7), dict(seed=2, users=30),
                                      dict(seed=3, split="user-disjoint")], ids=str)
def test_every_number_still_means_its_key_and_its_text(settings, tmp_path):
    """After dropping and renumbering items: in every stage each user's sequence, translated back to raw keys, is a
    stretch of the raw file in time order, and the text of each item is the one of its key."""
    data = setup.load_dataset(micro(tmp_path, **settings), tmp_path / "world")
    events, titles = raw(data.source)
    assert len(data.keys) == len(data.texts) == len(set(data.keys)) <= 60
    assert data.known[-1] == list(range(len(data.keys))), "items that no stage kept are dropped"
    assert all(texts[:2] == (titles[key], "") and texts[2] for key, texts in zip(data.keys, data.texts, strict=True))
    checked = 0
    for stage in data.stages:
        for user, items in stage.current.items():
            told = [key for _, key in events[data.users[user]]]
            keys = [data.keys[i] for i in items]
            if settings.get("split") == "user-disjoint":  # stretches of several stages, with gaps
                assert [key for key in told if key in keys] == keys
            else:
                start = told.index(keys[0])
                assert told[start:start + len(keys)] == keys, f"D{stage.number}, {data.users[user]}"
                past = [data.keys[i] for i in stage.history[user]]
                assert [key for key in told[:start] if key in past] == past
            checked += len(items)
    assert checked > 100


def test_a_subset_of_the_users_keeps_the_whole_catalogue_and_another_split_has_its_own(tmp_path):
    """--users makes the stages smaller, not the problem easier: known items, numbers and texts stay the full data's.
    Where other users are in a stage other items enter with it, and every target is known."""
    full, part, mixed = (setup.load_dataset(micro(tmp_path, **how), tmp_path / "world")
                         for how in ({}, {"users": 20}, {"split": "user-disjoint"}))
    assert part.known == full.known and part.texts == full.texts and part.keys == full.keys
    assert len({u for s in part.stages for u in s.users}) == 20
    for small, large in zip(part.stages, full.stages):
        assert small.current == {u: large.current[u] for u in small.users}
    assert mixed.known != full.known and mixed.known[-1] == full.known[-1]
    for stage, known in zip(mixed.stages, mixed.known):
        assert stage.items <= set(known) and not any(stage.history.values())


def test_years_are_inclusive_to_the_millisecond(tmp_path):
    """--years 2020 takes its first and its last millisecond and nothing beside them; 2020-2021 both years."""
    inside = [(f"u{u}", f"i{k}", JANUARY_2020 + k * 1000) for u in range(2) for k in range(10)]
    inside += [("u0", "last", JANUARY_2021 - 1), ("u1", "last", JANUARY_2021 - 1)]
    outside = [("u0", "before", JANUARY_2020 - 1), ("u0", "after", JANUARY_2021), ("u1", "after", JANUARY_2021)]
    folder = reviews(tmp_path / "data", inside + outside)

    def read(years):
        cfg = micro(tmp_path, dataset=str(folder), years=years, stages=2, min_events=3)
        return setup.load_dataset(cfg, tmp_path).notes[0]
    assert read("2020") == read("2020-2020") == "22 interactions read"
    assert read("2020-2021") == "24 interactions read" and read("") == "25 interactions read"


def test_raw_finds_the_sources_own_line(tmp_path):
    """The line of the file that holds this user and this item; for the release, which has none, their numbers."""
    data = setup.load_dataset(micro(tmp_path), tmp_path / "world")
    user, items = next(iter(data.stages[-1].current.items()))
    row = json.loads(data.raw(user, items[-1]))
    assert (row["user_id"], row["parent_asin"]) == (data.users[user], data.keys[items[-1]])
    release = setup.load_dataset(micro(tmp_path, dataset=str(shared_ids(tmp_path / "blocks"))), tmp_path)
    assert release.raw(3, 4) == "blocks: user 3, item 4"


STAGES = [{1: [0, 1, 2, 3], 2: [3, 2, 1, 0]}, {1: [4, 1, 0, 2]}]


def test_the_release_brings_its_own_ids(tmp_path):
    """Blocks and index file give stages and codes as they stand there; --levels does not matter. An item that only a
    previous_block names needs an ID too."""
    codes = [[i, 2 * i, 3] for i in range(6)]
    cfg = micro(tmp_path, dataset=str(blocks(tmp_path / "data", STAGES, codes)), levels=2, codes=16)
    data = setup.load_dataset(cfg, tmp_path / "world")
    assert data.ids.codes.tolist() == codes and data.ids.n_codes == 16 and data.texts is None
    assert data.stages[1].current == {1: [4, 1, 0, 2]} and data.stages[1].history == {1: [0, 1, 2, 3]}
    assert data.known == [[0, 1, 2, 3], [0, 1, 2, 3, 4]] and not (tmp_path / "world").exists()
    late = {"1": {"previous_block": ["7", "0"], "current_block": ["1", "2", "3"]}}
    (tmp_path / "data" / "C.all.block_1.json").write_text(json.dumps(late))
    with pytest.raises(UsageError, match="has 6 items, the stages name item 7"):
        setup.load_dataset(cfg, tmp_path)


@pytest.mark.parametrize("missing, left", [(0, "D2, D3"), (1, "D1, D3")])
def test_every_block_is_needed(missing, left, tmp_path):
    """Each stage goes on from the one before: a folder that starts later, has a gap, or D_1 alone is refused."""
    folder = blocks(tmp_path / "data", [*STAGES, {2: [0, 1, 4]}], [[i, i] for i in range(5)])
    (folder / f"C.all.block_{missing}.json").unlink()
    with pytest.raises(UsageError, match=f"holds {left}\n"):
        setup.load_dataset(micro(tmp_path, dataset=str(folder)), tmp_path)
    (folder / "C.all.block_2.json").unlink()
    with pytest.raises(UsageError, match="holds D[12]\n"):
        setup.load_dataset(micro(tmp_path, dataset=str(folder)), tmp_path)


def test_a_base_from_scratch_has_the_shape_asked_for(tmp_path):
    """tiny and small are Llamas of the given sizes that know one word; the seed decides their weights."""
    cfg = micro(tmp_path, shape=(24, 2, 4, 2, 20))
    model = setup.load_model(cfg)
    assert model.model.embed_tokens.weight.shape == (1, 24) and len(model.model.layers) == 2
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (12, 24)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (24, 20) and model.lm_head is model.model.embed_tokens
    again, other = (setup.load_model(micro(tmp_path, shape=(24, 2, 4, 1, 16), seed=s)) for s in (0, 1))
    weight = [m.model.layers[0].self_attn.q_proj.weight for m in (model, again, other)]
    assert weight[0].equal(weight[1]) and not weight[0].equal(weight[2])
    assert setup.load_tokenizer(cfg) is None and setup.from_scratch(cfg)


def test_dropout_inside_the_model_is_for_training_from_scratch(tmp_path):
    """A base from scratch drops states while it trains and none in eval(); a checkpoint's Llama never does."""
    words = dict(base=str(checkpoint(tmp_path / "llama")), prompt="paper")
    loaded, plain, scratch = (setup.load_model(micro(tmp_path, **how)) for how in (
        words | dict(base_dropout=0.5), dict(base_dropout=0.0), dict(base_dropout=0.5)))
    ids = torch.arange(8)[None]
    for model in (loaded, plain, scratch):
        model.grow(8, torch.Generator().manual_seed(0), 0.3)
        trained, asked = model.train()(ids), model.eval()(ids)
        assert torch.equal(trained, asked) == (model is not scratch) and torch.equal(model(ids), asked)
    assert torch.equal(scratch(ids), plain(ids)), "the rate has no part in the weights"


def test_prompt_and_base_must_fit(tmp_path):
    """The short prompt needs no words and the sentences do: either mismatch is refused, each match works."""
    scratch, words = micro(tmp_path), micro(tmp_path, base=str(checkpoint(tmp_path / "llama")), prompt="release")
    data = setup.load_dataset(scratch, tmp_path / "world")
    ids, tokenizer = SemanticIDs(torch.zeros(len(data.keys), 2, dtype=torch.long), 8), setup.load_tokenizer(words)
    assert setup.make_template(scratch, ids, None).first_token == 1
    template = setup.make_template(words, ids, tokenizer)
    assert template.first_token == 256 and "chronological" in QUESTIONS["release"]
    assert tokenizer.token_to_id("chronological") in template.tail
    paper = setup.make_template(micro(tmp_path, base=words.base, prompt="paper"), ids, tokenizer)
    assert [template.end, paper.end] == [(2,), ()]
    for prompt, base, words in (("paper", "tiny", None), ("release", "tiny", None), ("short", "DIR", tokenizer)):
        with pytest.raises(UsageError, match="do not fit\nshort is for a base without words"):
            setup.make_template(micro(tmp_path, prompt=prompt, base=base), ids, words)


def test_item_vectors_come_from_the_model_that_has_words(tmp_path):
    """With a checkpoint the RQ-VAE sees the mean of Llama's hidden states over the title's tokens, over the
    description's, and of both (computed here one text at a time); of what is there. --text-width or a base without
    words means title vectors of that width, of all the texts."""
    cfg = micro(tmp_path, base=str(checkpoint(tmp_path / "llama")), prompt="paper", text_width=0)
    data, model, tokenizer = (setup.load_dataset(cfg, tmp_path / "world"), setup.load_model(cfg),
                              setup.load_tokenizer(cfg))
    told, (title, _, rest) = [], data.texts[0]
    data.texts[:4] = [(title, "what it is", rest), (title, "else", rest), ("", "what it is", ""), ("", "", rest)]
    seen = [setup.item_vectors(cfg, data, model, tokenizer, told.append)]
    with torch.no_grad():
        def alone(text):
            return model.model(torch.tensor([tokenizer.encode(text).ids]))[0].mean(0).numpy()
        two, other = ((alone(title) + alone(text)) / 2 for text in ("what it is", "else"))
        wanted = np.stack([two, other, alone("what it is"), alone(rest), *(alone(t) for t, _, _ in data.texts[4:])])
    assert np.allclose(np.asarray(seen[0]), wanted, atol=1e-5), f"off by {np.abs(np.asarray(seen[0]) - wanted).max()}"
    assert sum(told) == len(data.texts) + 2 and seen[0].dtype == torch.float32
    paper = micro(tmp_path, base=cfg.base, prompt="paper", text_width=7)
    seen.append(setup.item_vectors(paper, data, model, tokenizer))
    seen.append(setup.item_vectors(micro(tmp_path, text_width=9), data, None, None))
    assert [v.shape[1] for v in seen[1:]] == [7, 9] and not torch.equal(seen[2][0], seen[2][1])
    with pytest.raises(UsageError, match="--text-width"):
        setup.item_vectors(micro(tmp_path, text_width=0), data, None, None)


def test_own_semantic_ids_are_read_by_the_items_names(tmp_path):
    """--ids FILE: a row for every item by its name in the source (a number, in blocks), in any order, others unread; an
    item without a row is named."""
    path = tmp_path / "ids.json"
    for source in ("demo", str(shared_ids(tmp_path / "C"))):
        names = setup.load_dataset(micro(tmp_path, dataset=source), tmp_path / "world").keys
        rows = {name: [f"<a_{i % 8}>", f"<b_{i // 8}>"] for i, name in enumerate([*names, "else"])}
        path.write_text(json.dumps(dict(reversed(rows.items()))))
        data = setup.load_dataset(cfg := micro(tmp_path, ids=str(path), dataset=source), tmp_path / "world")
        assert data.ids.codes.tolist() == [[i % 8, i // 8] for i in range(len(names))] and data.keys == names
        path.write_text(json.dumps({name: row for name, row in rows.items() if name != names[7]}))
        with pytest.raises(ValueError, match=f"no row for item {names[7]}\n"):
            setup.load_dataset(cfg, tmp_path / "world")


@pytest.mark.parametrize("fewest", [4, 5])
def test_what_is_odd_about_the_data_is_noted(fewest, tmp_path):
    """Bad rows of metadata are counted by reason, as those of the reviews are. Where every user and item has five
    events or more, a 5core file: a warning, for PESO filters per stage; one with four: none."""
    rows = [(f"u{u}", f"i{k}", 10**12 + 10**6 * k + u) for u in range(9) for k in range(400) if u or k < fewest]
    found = []
    for bad in ("", '{\n{"title": "no key"}\n{\n'):
        cfg = micro(tmp_path, dataset=str(reviews(tmp_path / "data", rows, bad)), stages=2)
        found.append(setup.load_dataset(cfg, tmp_path).notes)
    assert [note for note in found[1] if note not in found[0]] == [
        "2 metadata rows skipped: malformed JSON", "1 metadata rows skipped: parent_asin missing, empty or not a text"]
    assert any("5core" in note for note in found[0]) == (fewest == 5), found
