"""Reading: any order and format of a file gives one result; bad rows are counted, never hidden."""
from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeso.files import ratings, rows
from minipeso.files.reviews import dataset_schema, item_text, read_items, read_reviews
from minipeso.stages import ordered
from tests.conftest import draws

T0 = 1_588_687_728_923
ANY_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]))   # half surrogates too
ANY_FIELD = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
                         st.lists, max_leaves=4)


def row(user="u", item="i", time=T0):
    return {"user_id": user, "parent_asin": item, "timestamp": time, "rating": 5.0, "text": "ok"}


def good(n=600):
    """n rows with distinct (user, item), times going up."""
    return [row(f"u{k % 7}", f"i{k}", T0 + k) for k in range(n)]


def write_jsonl(path, rows):
    """Rows that are text or bytes go in raw; everything else as JSON."""
    raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
           for r in rows]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def write_csv(path, rows):
    lines = [f"{r['user_id']},{r['parent_asin']},{r['rating']},{r['timestamp']}" for r in rows]
    path.write_text("\n".join(["user_id,parent_asin,rating,timestamp", *lines]) + "\n")
    return path


def content(x):
    """Everything in an Interactions that a result can depend on."""
    return (x.user.tolist(), x.item.tolist(), x.time.tolist(), x.users, x.items)


def triples(x):
    return [(x.users[u], x.items[i], int(t)) for u, i, t in zip(x.user, x.item, x.time)]


def test_plain_gz_jsonl_csv_and_folder_agree(tmp_path):
    """The same rows give the same arrays from .jsonl, .csv, either packed, by file or by folder."""
    rows = good(50)
    plain = write_jsonl(tmp_path / "C.jsonl", rows)
    table = write_csv(tmp_path / "C.csv", rows)
    want = content(read_reviews(plain))
    assert content(read_reviews(table)) == want
    for path in (plain, table):
        folder = tmp_path / path.suffix[1:]
        folder.mkdir()
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        (folder / "meta_C.jsonl").write_text("{}\n")
        assert content(read_reviews(folder)) == want, f"{path.name}.gz through its folder"
        assert content(read_reviews(folder / f"{path.name}.gz")) == want
        assert dataset_schema(folder) == "reviews"
    assert want[0] == [k % 7 for k in range(50)] and want[4] == sorted(f"i{k}" for k in range(50))
    assert triples(read_reviews(plain))[:2] == [("u0", "i0", T0), ("u1", "i1", T0 + 1)]


@draws(40)
@given(st.lists(st.tuples(st.sampled_from("abcXYZ"), st.sampled_from("pqrstPQ"), st.integers(0, 9)),
                min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_shuffled_file_gives_identical_arrays(tmp_path_factory, events, random):
    """The result is the set of earliest (user, item), sorted by (time, user key, item key)."""
    path = tmp_path_factory.mktemp("r") / "C.jsonl"
    rows = [row(u, i, T0 + t) for u, i, t in events]
    first = read_reviews(write_jsonl(path, rows))
    random.shuffle(rows)
    second = read_reviews(write_jsonl(path, rows))
    earliest = {}
    for u, i, t in events:
        earliest[u, i] = min(T0 + t, earliest.get((u, i), T0 + t))
    want = sorted((t, u, i) for (u, i), t in earliest.items())
    assert triples(first) == [(u, i, t) for t, u, i in want]
    assert content(second) == content(first), "the order of the file changed the result"
    assert first.duplicates == len(events) - len(earliest)


def test_duplicates_keep_the_earliest(tmp_path):
    """Of one user's rows for one item the earliest stays, wherever in the file it is."""
    rows = [row("u", "i", T0 + t) for t in (5, 2, 2)] + [row("v", "i", T0 + 9)]
    x = read_reviews(write_jsonl(tmp_path / "C.jsonl", rows))
    assert triples(x) == [("u", "i", T0 + 2), ("v", "i", T0 + 9)] and x.duplicates == 2


def test_span_of_years_is_half_open_and_follows_the_duplicates(tmp_path):
    """start <= time < end; a repeat inside the span of an earlier event is still a repeat."""
    rows = [row("u", i, T0 + t) for i, t in (("a", 0), ("a", 10), ("b", 10), ("c", 20))]
    path = write_jsonl(tmp_path / "C.jsonl", rows)
    x = read_reviews(path, start=T0 + 10, end=T0 + 20)
    assert triples(x) == [("u", "b", T0 + 10)] and x.items == ["b"]
    with pytest.raises(ValueError, match="covers 2020-05-05 to 2020-05-05"):
        read_reviews(path, start=T0 + 99)


BAD_JSON = {
    "malformed JSON": ['{"user_id": "u", "paren', "\0\0\0", "x" * 1_000_000, "[" * 100_000],
    "not a JSON object": ["[1, 2]", "17", "null", '"text"'],
    "user_id missing, empty or not a text": [
        {"parent_asin": "i", "timestamp": T0}, row(user=None), row(user=""), row(user=" "),
        row(user=7), row(user=["u"]), row(user="a\0"), row(user="\ud800"),
        b'{"user_id": "\xff", "parent_asin": "i", "timestamp": 1588687728923}'],
    "parent_asin missing, empty or not a text": [
        {"user_id": "u", "timestamp": T0}, row(item=None), row(item=""), row(item={"a": 1})],
    "timestamp missing or not an integer": [
        {"user_id": "u", "parent_asin": "i"}, row(time=None), row(time=1588687728923.5),
        row(time=float(T0)), row(time="soon"), row(time=""), row(time=True), row(time=[T0])],
    "timestamp before 1970 or after 2099": [
        row(time=-1), row(time="-1588687728923"), row(time=4_102_444_800_000), row(time=T0 * 1000)],
}


@pytest.mark.parametrize("reason", BAD_JSON)
def test_bad_json_rows_are_counted_by_reason(tmp_path, reason):
    """A row that cannot be used is skipped and counted; the rest reads as if it were not there."""
    rows = good(1000)
    want = content(read_reviews(write_jsonl(tmp_path / "C.jsonl", rows)))
    bad = BAD_JSON[reason]
    x = read_reviews(write_jsonl(tmp_path / "C.jsonl", rows[:300] + bad + rows[300:]))
    assert x.bad == {reason: len(bad)}
    assert content(x) == want


def test_bad_csv_rows_are_counted_and_a_stray_quote_costs_one_row(tmp_path):
    """Damaged CSV lines are counted one by one: an open quote does not swallow what follows it."""
    rows = good(1000)
    path = write_csv(tmp_path / "C.csv", rows)
    want = content(read_reviews(path))
    lines = path.read_text().splitlines()
    bad = ['"u1,i1,5.0,1588687728923', "u1,i1", "u1,i1,5.0,1588687728923,x",
           ",i1,5.0,1588687728923", "u1,i1,5.0,", "u1,i1,5.0,15886877289.5"]
    path.write_text("\n".join(lines[:40] + bad + lines[40:]) + "\n")
    x = read_reviews(path)
    assert content(x) == want
    assert x.bad == {"malformed CSV": 1, "wrong number of fields": 2,
                     "user_id missing, empty or not a text": 1,
                     "timestamp missing or not an integer": 2}


def test_blank_lines_bom_crlf_and_numeric_text_are_fine(tmp_path):
    """What editors do to a file is accepted and not counted as bad."""
    rows = good(20)
    path = write_jsonl(tmp_path / "C.jsonl", rows)
    want = content(read_reviews(path))
    as_text = [json.dumps({**r, "timestamp": str(r["timestamp"])}) for r in rows]
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(as_text) + "\r\n  \r\n").encode())
    x = read_reviews(path)
    assert content(x) == want and x.bad == {}
    table = write_csv(tmp_path / "C.csv", rows)
    table.write_bytes(("\ufeff" + table.read_text().replace("\n", "\r\n\r\n")).encode())
    x = read_reviews(table)
    assert content(x) == want and x.bad == {}


def test_csv_columns_are_found_by_name_and_quotes_are_undone(tmp_path):
    """The header decides; an id may hold commas and quotes."""
    path = tmp_path / "C.csv"
    path.write_text(f'timestamp,user_id,parent_asin\n{T0},"u,1","say ""i"""\n')
    assert triples(read_reviews(path)) == [("u,1", 'say "i"', T0)]
    path.write_text(f"u1,i1,5.0,{T0}\n")
    with pytest.raises(ValueError, match="no header(.|\n)*line 1: 'u1,i1"):
        read_reviews(path)


def test_keys_in_any_script_survive(tmp_path):
    """Japanese, emoji, right-to-left, zero-width, token-like and path-like keys pass unchanged."""
    keys = ["日本語", "🎸", "שלום", "e\u0301", "a\u200db", "<a_1>", "../x", "a,b", 'q"', "two\nlines"]
    x = read_reviews(write_jsonl(tmp_path / "C.jsonl", [row(k, k, T0) for k in keys]))
    assert x.users == x.items == sorted(keys) and x.bad == {}


def test_over_one_percent_bad_is_an_error_with_line_numbers(tmp_path):
    """1 % is the limit; beyond it the message names the count and the first five lines."""
    rows = good(600)
    at_limit = rows[:594] + ["{"] * 6
    assert read_reviews(write_jsonl(tmp_path / "C.jsonl", at_limit)).bad == {"malformed JSON": 6}
    beyond = ["", *rows[:2], *["{"] * 7, *rows[9:]]
    wanted = "7 of 600 rows(.|\n)*lines 4, 5, 6, 7, 8 .malformed JSON: 7"
    with pytest.raises(ValueError, match=wanted):
        read_reviews(write_jsonl(tmp_path / "C.jsonl", beyond))


def test_seconds_are_refused_with_a_hint(tmp_path):
    """Times in seconds are an error that names the line and the cure, not dates in 1970."""
    path = write_jsonl(tmp_path / "C.jsonl", good(3) + [row(time=1_588_687_728)])
    with pytest.raises(ValueError, match="seconds(.|\n)*line 4(.|\n)*1000"):
        read_reviews(path)


def test_nothing_to_read_is_an_error(tmp_path):
    """An empty file, a header alone, a damaged archive and a missing file say what they are."""
    for name, text in (("A.jsonl", ""), ("B.csv", "user_id,parent_asin,rating,timestamp\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="no interactions"):
            read_reviews(tmp_path / name)
    packed = gzip.compress(b"\n".join(json.dumps(r).encode() for r in good(500)))
    (tmp_path / "C.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        read_reviews(tmp_path / "C.jsonl.gz")
    with pytest.raises(FileNotFoundError, match="no such file(.|\n)*absent(.|\n)*expected C.jsonl"):
        read_reviews(tmp_path / "absent")


def test_folders_of_neither_or_both_schemas_are_refused(tmp_path):
    """dataset_schema tells the two layouts apart and says what it found otherwise."""
    (tmp_path / "notes.txt").write_text("x")
    for read in (dataset_schema, read_reviews, read_items):
        with pytest.raises(ValueError, match="notes.txt(.|\n)*expected C.jsonl"):
            read(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        read_reviews(tmp_path / "notes.txt")
    (tmp_path / "X.all.block_1.json").write_text("{}")
    assert dataset_schema(tmp_path) == "release"
    write_jsonl(tmp_path / "A.jsonl", good(3))
    with pytest.raises(ValueError, match="both"):
        dataset_schema(tmp_path)
    write_csv(tmp_path / "B.csv", good(3))
    with pytest.raises(ValueError, match="A.jsonl, B.csv(.|\n)*name the file"):
        read_reviews(tmp_path)


def test_items_keep_only_what_is_asked_and_survive_any_field(tmp_path):
    """Odd or missing fields never raise; `keep` limits the result; a repeated key has one text."""
    metas = [{"parent_asin": "a", "title": "A", "price": "None", "description": ["x" * 100_000]},
             {"parent_asin": "b"}, {"parent_asin": "c", "title": ["C1", "C2"], "categories": None},
             {"parent_asin": "a", "title": "B"}]
    path = write_jsonl(tmp_path / "meta_C.jsonl", metas)
    items = read_items(tmp_path)
    assert list(items) == ["a", "b", "c"]
    assert [item_text(items[k], k) for k in "bc"] == ["b", "C1, C2"]
    assert read_items(path, keep={"c", "z"}) == {"c": items["c"]}
    write_jsonl(path, metas[::-1])
    assert read_items(path) == items, "the order of the lines changed the text of a repeated key"
    write_jsonl(path, metas + ["{"] * 5)
    with pytest.raises(ValueError, match="5 of 9 rows"):
        read_items(path)


@pytest.mark.parametrize("fields, text", [
    ({"title": "Amp &amp; <b>Cab</b>\n  20W", "store": "Fender", "categories": ["Amps", "Guitar"]},
     "Amp & Cab 20W | Fender | Amps, Guitar"),
    ({"title": None, "store": "", "categories": [None, " ", 3.5]}, "KEY"),
    ({}, "KEY"),
    ({"title": 1984, "categories": "Books"}, "1984 | Books"),
    ({"title": "<a_1> &lt;a_2&gt; <|eot|> 5 < 6"}, "5 < 6"),
    ({"title": {"x": 1}, "store": True}, "KEY"),
    ({"title": "half \ud83c pair", "store": "whole \U0001f3b8"}, "half ? pair | whole 🎸"),
    ({"title": "日本 🎸\x00\x1b[0m"}, "日本 🎸 [0m"),
])
def test_item_text_is_one_clean_line(fields, text):
    """Entities, tags, control characters and line ends go; an empty item is called by its key."""
    assert item_text(fields, "KEY") == text


@given(st.dictionaries(st.sampled_from(["title", "store", "categories"]), ANY_FIELD))
def test_item_text_never_raises_and_can_always_be_printed(fields):
    """Whatever JSON holds, the text is one printable UTF-8 line, and not empty."""
    text = item_text(fields, "KEY")
    assert text and text.encode("utf-8") and len(text.splitlines()) == 1


def test_real_reviews(shared_data):
    """Electronics 2019-2023: 131,154 rows, 1,286 of them repeats, every item with a text."""
    x = read_reviews(shared_data / "electronics23")
    assert (len(x.user), x.duplicates, x.bad) == (129_868, 1_286, {})
    assert (len(x.users), len(x.items)) == (15_266, 9_671)
    assert (np.diff(x.time) >= 0).all() and x.users == sorted(x.users)
    items = read_items(shared_data / "electronics23", keep=set(x.items))
    unnamed = [k for k in x.items if item_text(items.get(k, {}), k) == k]
    assert not unnamed, f"{len(unnamed)} items without a text, first {unnamed[:3]}"


# ---- ratings by the block

def outcome(path) -> tuple:
    """What read_reviews makes of a file: everything in it, or the error's text."""
    try:
        found = read_reviews(path)
    except ValueError as error:
        return ("error", str(error))
    return (*content(found), found.bad, found.duplicates, found.core)


def row_by_row(block: bytes, places, n_fields: int, skipped: int) -> ratings.Block:
    """ratings.cut for a file without a single plain line."""
    nothing = np.empty((0, 8), np.uint8)
    lines = list(io.TextIOWrapper(io.BytesIO(block), encoding="utf-8", errors="surrogateescape", newline=""))
    return ratings.Block(nothing, nothing, np.empty(0, np.int64), list(enumerate(lines)), len(lines))


KEY = st.text("ABCDEFGH0123", min_size=1, max_size=30)
PLAIN_ROW = st.builds("{},{},5.0,{}".format, KEY, KEY, st.integers(820_454_400_000, 1_694_000_000_000))
ODD_ROW = st.sampled_from([
    "", " ", "u,i,5.0", "u,i,5.0,1,2", '"u,v",i,5.0,1588687728923', 'u",i,5.0,1588687728923', "u,i,5.0,", ",i,5.0,1588687728923",
    "ü,i,5.0,1588687728923", "u,i,5.0,9999", "u,i,5.0,99999999999999999999", "u,i,5.0,1_588_687_728_923", "u,i,5.0,-1588687728923",
    "u,i,5.0, 1588687728923", "u,i,5.0,00000000009", "u,i,5.0,0x5886877289", "u v,i,5.0,1588687728923", "u\0,i,5.0,1588687728923",
    f"{'u' * 70},i,5.0,1588687728923", "u,i,5.0,4102444800000", "u,i,5.0,1588687728923\r", "a\rb,i,5.0,1588687728923", "\x1c,i,5.0,1588687728923",
    "u,i,5.0,0001588687728"])


@draws(150)
@given(plain=st.lists(PLAIN_ROW, min_size=1, max_size=40), odd=st.lists(st.tuples(st.integers(0, 40), ODD_ROW), max_size=4),
       size=st.sampled_from([1, 50, 300, 1 << 24]), bom=st.booleans(), end=st.sampled_from(["\n", ""]),
       before=st.sampled_from(["", "\n", " \n\n"]), copies=st.sampled_from([1, 30]))
def test_blocks_are_rows(tmp_path_factory, plain, odd, size, bom, end, before, copies):
    """Whatever stands in a CSV: by blocks of any size it gives the arrays, counts and messages of row by row."""
    lines = [row.replace(",5.0", f"{k if k else ''},5.0") for k in range(copies) for row in plain]
    for place, row in odd:
        lines.insert(min(place, len(lines)), row)
    path = tmp_path_factory.mktemp("csv") / "C.csv"
    text = before + "\n".join(["user_id,parent_asin,rating,timestamp", *lines]) + end
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", size)
        found = outcome(path)
        patch.setattr(ratings, "cut", row_by_row)
        assert found == outcome(path)


def test_most_rows_are_plain(tmp_path):
    """Of the Hub's rows none is left to the slow way; of those with a quote, a blank or another time, only they."""
    lines = [b"AE3%024d,B%09d,5.0,15886877289%02d" % (k, k, k) for k in range(90)]
    block = ratings.cut(b"\n".join(lines) + b"\n", (0, 1, 3), 4, 0)
    assert len(block.time) == block.lines == 90 and not block.others and block.user.shape == (90, 32)
    lines[3], lines[7], lines[89] = lines[3].replace(b"AE", b'"E'), lines[7] + b" ", lines[89][:-6]
    block = ratings.cut(b"\n".join(lines) + b"\n", (0, 1, 3), 4, 0)
    assert [k for k, _ in block.others] == [3, 7, 89] and len(block.time) == 87


def test_equal_hashes_are_told_apart(monkeypatch):
    """Keys stay apart by their bytes even where all hashes are equal."""
    keys = ratings.Keys()
    some = np.frombuffer(b"AAAAAAAABBBBBBBBAAAAAAAACCCCCCCC", np.uint8).reshape(4, 8)
    want = keys.of(some)
    real = np.unique
    monkeypatch.setattr(np, "unique", lambda x, axis=None, **rest: real(x if axis == 0 else x * np.uint64(0), axis=axis, **rest))
    assert len(set(want.tolist())) == 3 and (keys.of(some) == want).all() and want[0] == want[2]


@given(st.lists(st.tuples(*3 * [st.integers(-3, 3)]), min_size=1, max_size=50))
def test_ordered_is_lexsort(rows):
    """By the first key, equals by the second, then the third; what is wholly equal in whatever order."""
    a, b, c = np.array(rows).T
    order = ordered(a, b, c)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert np.array_equal(np.array(rows)[order], np.array(rows)[np.lexsort((c, b, a))])
