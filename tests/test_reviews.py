"""Reading: any order and format of a file gives one result; bad lines are counted, never hidden."""
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeso.files.reviews import dataset_schema, item_texts, read_items, read_reviews
from tests.conftest import draws

T0 = 1_588_687_728_923
ANY_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]))   # half surrogates too


def review(user="u", item="i", time=T0):
    return {"user_id": user, "parent_asin": item, "timestamp": time, "rating": 5.0, "text": "ok"}


def good(n):
    """n reviews with distinct (user, item), times going up."""
    return [review(f"u{k % 7}", f"i{k}", T0 + k) for k in range(n)]


def write_jsonl(path, reviews):
    """What is text or bytes goes in raw; everything else as JSON."""
    raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in reviews]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def write_csv(path, reviews):
    lines = [f"{r['user_id']},{r['parent_asin']},{r['rating']},{r['timestamp']}\n" for r in reviews]
    path.write_text("".join(["user_id,parent_asin,rating,timestamp\n", *lines]))
    return path


def content(x):
    """Everything in an Interactions that a result can depend on."""
    return (x.user.tolist(), x.item.tolist(), x.time.tolist(), x.users, x.items)


def triples(x):
    return [(x.users[u], x.items[i], int(t)) for u, i, t in zip(x.user, x.item, x.time)]


def test_plain_gz_jsonl_csv_and_folder_agree(tmp_path):
    """The same reviews give the same arrays from .jsonl, .csv, either packed, by file or by folder; what editors do to
    a file (blank lines, CRLF, a byte-order mark, numbers as texts) is accepted and not counted as bad."""
    reviews = good(50)
    plain, table = write_jsonl(tmp_path / "C.jsonl", reviews), write_csv(tmp_path / "C.csv", reviews)
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
    as_text = [json.dumps({**r, "timestamp": str(r["timestamp"])}) for r in reviews]
    plain.write_bytes(("\ufeff" + "\r\n\r\n".join(as_text) + "\r\n  \r\n").encode())
    table.write_bytes(("\ufeff" + table.read_text().replace("\n", "\r\n\r\n")).encode())
    for x in map(read_reviews, (plain, table)):
        assert content(x) == want and x.bad == {}


@draws(40)
@given(st.lists(st.tuples(st.sampled_from("abcXYZ"), st.sampled_from("pqrstPQ"), st.integers(0, 9)),
                min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_shuffled_file_gives_identical_arrays(tmp_path_factory, events, random):
    """The result is the set of earliest (user, item), sorted by (time, user key, item key)."""
    path, reviews = tmp_path_factory.mktemp("r") / "C.jsonl", [review(u, i, T0 + t) for u, i, t in events]
    first = read_reviews(write_jsonl(path, reviews))
    random.shuffle(reviews)
    second = read_reviews(write_jsonl(path, reviews))
    earliest = {(u, i): T0 + t for u, i, t in sorted(events, key=lambda e: -e[2])}
    assert triples(first) == [(u, i, t) for t, u, i in sorted((t, *key) for key, t in earliest.items())]
    assert content(second) == content(first), "the order of the file changed the result"
    assert first.duplicates == len(events) - len(earliest)


def test_span_of_years_is_half_open_and_follows_the_duplicates(tmp_path):
    """start <= time < end; a repeat inside the span of an earlier event is still a repeat."""
    reviews = [review("u", i, T0 + t) for i, t in (("a", 0), ("a", 10), ("b", 10), ("c", 20))]
    path = write_jsonl(tmp_path / "C.jsonl", reviews)
    x = read_reviews(path, start=T0 + 10, end=T0 + 20)
    assert triples(x) == [("u", "b", T0 + 10)] and x.items == ["b"]
    with pytest.raises(ValueError, match="covers 2020-05-05 to 2020-05-05"):
        read_reviews(path, start=T0 + 99)


BAD_JSON = {
    "malformed JSON": ['{"user_id": "u", "paren', "\0\0\0", "x" * 1_000_000, "[" * 100_000],
    "not a JSON object": ["[1, 2]", "17", "null", '"text"'],
    "user_id missing, empty or not a text": [
        {"parent_asin": "i", "timestamp": T0}, *map(review, (None, "", " ", 7, ["u"], "a\0", "\ud800")),
        b'{"user_id": "\xff", "parent_asin": "i", "timestamp": 1588687728923}'],
    "parent_asin missing, empty or not a text": [
        {"user_id": "u", "timestamp": T0}, review(item=None), review(item=""), review(item={"a": 1})],
    "timestamp missing or not an integer": [
        {"user_id": "u", "parent_asin": "i"},
        *(review(time=time) for time in (None, 1588687728923.5, float(T0), "soon", "", True, [T0]))],
    "timestamp before 1970 or after 2099": [
        review(time=-1), review(time="-1588687728923"), review(time=4_102_444_800_000), review(time=T0 * 1000)]}


@pytest.mark.parametrize("reason", BAD_JSON)
def test_bad_json_lines_are_counted_by_reason(tmp_path, reason):
    """A line that cannot be used is skipped and counted; the rest reads as if it were not there."""
    reviews, bad = good(1000), BAD_JSON[reason]
    want = content(read_reviews(write_jsonl(tmp_path / "C.jsonl", reviews)))
    x = read_reviews(write_jsonl(tmp_path / "C.jsonl", reviews[:300] + bad + reviews[300:]))
    assert content(x) == want and x.bad == {reason: len(bad)}


def test_bad_csv_lines_are_counted_and_a_stray_quote_costs_one(tmp_path):
    """Damaged CSV lines are counted one by one: an open quote does not swallow what follows it."""
    path = write_csv(tmp_path / "C.csv", good(1000))
    want, lines = content(read_reviews(path)), path.read_text().splitlines()
    bad = ['"u1,i1,5.0,1588687728923', "u1,i1", "u1,i1,5.0,1588687728923,x", "u\0,i1,5.0,1588687728923",
           ",i1,5.0,1588687728923", "u1,i1,5.0,", "u1,i1,5.0,15886877289.5", "u1,i1,5.0,99999999999999999999"]
    path.write_text("\n".join(lines[:40] + bad + lines[40:]) + "\n")
    x = read_reviews(path)
    assert content(x) == want
    assert x.bad == {"malformed CSV": 1, "wrong number of fields": 2, "user_id missing, empty or not a text": 2,
                     "timestamp missing or not an integer": 2, "timestamp before 1970 or after 2099": 1}


def test_csv_columns_are_found_by_name_and_keys_in_any_script_survive(tmp_path):
    """The header decides; an id may hold commas, quotes, Japanese, emoji, right-to-left, zero-width, tokens, paths."""
    path = tmp_path / "C.csv"
    path.write_text(f'timestamp,user_id,parent_asin\n{T0},"u,1","say ""i"""\n')
    assert triples(read_reviews(path)) == [("u,1", 'say "i"', T0)]
    path.write_text(f"u1,i1,5.0,{T0}\n")
    with pytest.raises(ValueError, match="no header(.|\n)*line 1: 'u1,i1"):
        read_reviews(path)
    keys = ["日本語", "🎸", "שלום", "e\u0301", "a\u200db", "<a_1>", "../x", "a,b", 'q"', "two\nlines"]
    x = read_reviews(write_jsonl(tmp_path / "C.jsonl", [review(k, k, T0) for k in keys]))
    assert x.users == x.items == sorted(keys) and x.bad == {}


def test_what_cannot_be_read_is_an_error(tmp_path):
    """1 % bad lines is the limit, beyond it the message names the count and the first five; an empty file, a header
    alone, a damaged archive, times in seconds and a missing file say what they are."""
    reviews = good(600)
    assert read_reviews(write_jsonl(tmp_path / "C.jsonl", reviews[:594] + ["{"] * 6)).bad == {"malformed JSON": 6}
    path = write_jsonl(tmp_path / "C.jsonl", ["", *reviews[:2], *["{"] * 7, *reviews[9:]])
    with pytest.raises(ValueError, match="7 of 600 lines(.|\n)*lines 4, 5, 6, 7, 8 .malformed JSON: 7"):
        read_reviews(path)
    whole = write_jsonl(tmp_path / "D.jsonl", good(3) + [review(time=1_588_687_728)]).read_bytes()
    packed = gzip.compress(b"\n".join(json.dumps(r).encode() for r in good(500)))
    for name, raw, message in (("A.jsonl", b"", "no interactions"), ("C.jsonl.gz", packed[:-20], "damaged or incompl"),
                               ("B.csv", b"user_id,parent_asin,rating,timestamp\n", "no interactions"),
                               ("D.jsonl", whole, "seconds(.|\n)*line 4(.|\n)*1000")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            read_reviews(tmp_path / name)
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
    write_csv(tmp_path / "B.csv", good(3))
    for read, message in ((dataset_schema, "both"), (read_reviews, "A.jsonl, B.csv(.|\n)*name the file")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_items_keep_only_what_is_asked_and_survive_any_field(tmp_path):
    """Odd or missing fields never raise; `keep` limits the result; a repeated key has one text."""
    metas = [{"parent_asin": "a", "title": "A", "price": "None", "description": ["x" * 100_000]},
             {"parent_asin": "b"}, {"parent_asin": "c", "title": ["C1", "C2"], "categories": None},
             {"parent_asin": "a", "title": "B"}]
    path, items = write_jsonl(tmp_path / "meta_C.jsonl", metas), read_items(tmp_path)
    assert list(items) == ["a", "b", "c"]
    assert [item_texts(items[k], k) for k in "bc"] == [("b", "", ""), ("C1 C2", "", "")]
    assert read_items(path, keep={"c", "z"}) == {"c": items["c"]}
    write_jsonl(path, metas[::-1])
    assert read_items(path) == items, "the order of the lines changed the text of a repeated key"
    write_jsonl(path, metas + ["{"] * 5)
    with pytest.raises(ValueError, match="5 of 9 lines"):
        read_items(path)


@pytest.mark.parametrize("fields, text", [
    ({"title": "Amp &amp; <b>Cab</b>\n  20W", "store": "Fender", "categories": ["Amps", "Guitar"]},
     "Amp & Cab 20W | Fender | Amps, Guitar"),
    ({"title": None, "store": "", "categories": [None, " ", 3.5]}, "KEY"), ({}, "KEY"),
    ({"title": 1984, "categories": "Books"}, "1984 | Books"), ({"title": {"x": 1}, "store": True}, "KEY"),
    ({"title": "<a_1> &lt;a_2&gt; <|eot|> 5 < 6"}, "5 < 6"), ({"title": "日本 🎸\x00\x1b[0m"}, "日本 🎸 [0m"),
    ({"title": "half \ud83c pair", "store": "whole \U0001f3b8"}, "half ? pair | whole 🎸"),
    ({"description": ["First.", "<br>", "Then."], "title": "T", "categories": ["C"]}, "T | First. Then. | C")])
def test_item_texts_are_clean_lines(fields, text):
    """Entities, tags, control characters and line ends go; an empty item is called by its key."""
    assert " | ".join(filter(None, item_texts(fields, "KEY"))) == text
    assert item_texts(fields, "KEY")[0] == ("KEY" if text == "KEY" else text.split(" | ")[0])


@given(st.dictionaries(st.sampled_from(["title", "store", "categories", "description"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT, st.lists, max_leaves=4)))
def test_item_texts_never_raise_and_can_always_be_printed(fields):
    """Whatever JSON holds, the texts are printable UTF-8 on one line, and not all empty."""
    text = " ".join(item_texts(fields, "KEY")).strip()
    assert text and text.encode("utf-8") and len(text.splitlines()) == 1


def test_real_reviews(shared_data):
    """Electronics 2019-2023: 131,154 reviews, 1,286 of them repeats, every item with a text."""
    x = read_reviews(shared_data / "electronics23")
    assert (len(x.user), x.duplicates, x.bad, len(x.users), len(x.items)) == (129_868, 1_286, {}, 15_266, 9_671)
    assert (np.diff(x.time) >= 0).all() and x.users == sorted(x.users)
    items = read_items(shared_data / "electronics23", keep=set(x.items))
    assert not [k for k in x.items if item_texts(items.get(k, {}), k)[0] == k], "items without a text"
