"""A finished run, opened again and handed to others: the same ranks, logits and items in transformers and peft."""
import functools
import json
import re
import shutil
import stat
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from minipeso.files import export
from minipeso.runs import report
from minipeso.runs.checkpoints import CheckpointError
from minipeso.config import UsageError
from minipeso.evaluate import Ranker
from minipeso.files.export import export_merged, export_peft, llama_version
from minipeso.lora import adapters
from minipeso.runs.recommend import histories, top_items
from minipeso.runs.reopen import reopen
from minipeso.synthetic import write_world
from minipeso.tokens import QUESTIONS
from tests.micro import checkpoint, llama_checkpoint, micro, run, shared_ids

RUNS = {  # settings, and the methods whose ranks are compared
    "tiny": (dict(compare="single,pretrain,sumlora-latest"), ("", "single", "pretrain", "sumlora-latest")),
    "llama": (dict(prompt="paper"), ("", "single")), "release": (dict(recipe="release"), ("",)),
    "tables first": (dict(first_trains="tables", later_trains="adapter", compare="single,pretrain"),
                     ("", "single", "pretrain")),
    "tables later": (dict(first_trains="rows", later_trains="tables", compare="single,pretrain"), ("", "pretrain")),
    "shared": ({}, ("",))}  # every two items share an ID


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs: a base of their own, a Llama with words, the release's recipe (whole tables), shared IDs."""
    made = tmp_path_factory.mktemp("runs")
    world = write_world(made / "world", 60, 60, 0.5, 0)
    texts = [*QUESTIONS.values(), *(p.read_text() for p in world.glob("meta*"))]
    base = dict(base=str(llama_checkpoint(made / "Llama-3.2-toy", texts, torch.float32)), text_width=0)
    special = {"tiny": {}, "shared": dict(dataset=str(shared_ids(made / "blocks")))}
    for name, (changes, _) in RUNS.items():
        run(micro(made / name, **changes | special.get(name, base)))
    return {name: made / name for name in RUNS}


@pytest.fixture(scope="module")
def opened(runs):
    """reopen, once for each run and stage."""
    return functools.cache(lambda name, stage=0: reopen(runs[name], stage))


def block_of(folder: Path) -> dict:
    """The names that the code in a folder's README defines, run as it stands."""
    names = {"folder": str(folder)}
    exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1], names)  # noqa: S102
    return names


def logits_agree(peer, model) -> bool:
    vocabulary = sum(len(p) for p in (model.lm_head.weight, model.lm_head.rows))
    ids = torch.randint(vocabulary, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (peer(ids).logits - model(ids)).abs().max().item() < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_of_every_method_ranks_as_it_did(runs, name):
    """The folder alone is the whole model: each stage's ranks, of present and absent users, are those the run wrote."""
    for method in RUNS[name][1]:
        folder = runs[name] / method
        ranks, absent = report.load(folder)[1], json.loads((folder / "absent.json").read_text())
        for t in (1, 2, 3):
            again = reopen(folder, t)
            ranker = Ranker(again.ids, again.known, again.template, again.cfg.beams, again.cfg.hit)
            found = ranker.ranks(again.model, *again.questions(t)).tolist()
            assert found == ranks[str(t)].tolist() + absent.get(str(t), []), (name, method, t)
    assert reopen(runs[name]).stage == 3
    with pytest.raises(UsageError, match="D1, D2, D3"):
        reopen(runs[name], 4)


def test_a_run_opens_elsewhere_and_without_its_stages_checkpoints(runs, opened, tmp_path):
    """Nothing in a run remembers where it was; of its checkpoints only the IDs' and a learnt base's are needed."""
    for name, without in (("tiny", "nothing"), ("llama", "*-stage-*")):
        shutil.copytree(runs[name], tmp_path / name, ignore=shutil.ignore_patterns(without))
        again = reopen(tmp_path / name)
        assert torch.equal(next(adapters(again.model))[1].A, next(adapters(opened(name).model))[1].A)


def edit(name: str, change):
    """A function of a run folder that puts change(content) in the place of a JSON file's content."""
    return lambda run: (run / name).write_text(json.dumps(change(json.loads((run / name).read_text()))))


BROKEN = {  # what is done to a copy of a run, and what is said
    "data": (edit("config.json", lambda c: c | {"hashes": c["hashes"] | {"data": "0" * 64}}), UsageError, "other hash"),
    "settings": (edit("config.json", lambda c: c | {"momentum": 0.9}), UsageError, "momentum"),
    "edited": (edit("config.json", lambda c: c | {"alpha": c["alpha"] * 2}), UsageError, "is not what the run wrote"),
    "no object": (edit("config.json", lambda c: []), UsageError, "config.json"),
    "no settings": (lambda run: (run / "config.json").unlink(), FileNotFoundError, "config.json"),
    "base": (lambda run: (run / "checkpoints/base/state.safetensors").write_bytes(b"x"), CheckpointError, "state.safe"),
    "no base": (lambda run: shutil.rmtree(run / "checkpoints/base"), CheckpointError, "checkpoints/base is missing"),
    "adapter": (lambda run: [p.unlink() for p in run.glob("adapters/*/adapter_config.json")], UsageError, "any stage")}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_not_the_run_any_more_is_refused(runs, tmp_path, how):
    """Other data, unknown settings, a damaged base, no adapter: three lines, never another model's numbers."""
    spoil, kind, word = BROKEN[how]
    shutil.copytree(runs["tiny"], tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(kind) as error:
        reopen(tmp_path / "run")
    assert len(str(error.value).splitlines()) == 3 and word in str(error.value), error.value


@pytest.mark.parametrize("name, stage", [("tiny", 3), ("tiny", 1), ("llama", 2), ("release", 3), ("shared", 2)])
def test_the_merged_folder_is_the_model(opened, name, stage, tmp_path):
    """transformers loads it: logits within 1e-5 of the adapted model's; the README's own code finds the items that
    --recommend finds, in its order, with its scores."""
    ours = opened(name, stage)
    export_merged(ours, tmp_path / "out")
    names, keys = block_of(tmp_path / "out"), ours.data.keys
    assert logits_agree(names["model"], ours.model)
    for history in list(histories(ours).values())[:6]:
        best, theirs = top_items(ours, [history])[0], names["recommend"]([keys[item] for item in history])
        flat = [(key, score) for shared, score in theirs for key in sorted(shared, key=keys.index)][:10]
        assert [keys[item] for item, _ in best] == [key for key, _ in flat]
        assert max(abs(a[1] - b[1]) for a, b in zip(best, flat)) < 1e-4


def test_the_merged_weights_are_plain_and_the_tokenizer_knows_every_code(opened, tmp_path):
    """W + s B A by hand; the checkpoint's names and no others; sampling off; readable by whoever may read the rest. A
    code is one token at the id that was trained, adjacent ones come apart, a whole prompt is the template's own ids."""
    from transformers import AutoTokenizer
    ours = opened("llama", 3)
    export_merged(ours, tmp_path / "out")
    tensors, base = (load_file(Path(path) / "model.safetensors") for path in (tmp_path / "out", ours.cfg.base))
    assert tensors.keys() == base.keys()
    for name, layer in adapters(ours.model):
        want = base[f"{name}.weight"] + ours.cfg.alpha / ours.cfg.rank * (layer.B @ layer.A).detach()
        assert torch.allclose(tensors[f"{name}.weight"], want, atol=1e-6), name
    words = len(base["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.embed_tokens.weight"][:words], base["model.embed_tokens.weight"])
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["do_sample"] is False and not {"temperature", "top_p", "top_k"} & generation.keys()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}) == 1
    tokenizer, history = AutoTokenizer.from_pretrained(tmp_path / "out"), [3, 0, 3, 7]
    first, n_codes = ours.template.first_token, ours.ids.n_codes
    names = [f"<{'abcd'[level]}_{code}>" for level in range(ours.ids.codes.shape[1]) for code in range(n_codes)]
    places = list(range(first, first + len(names)))
    assert tokenizer.convert_tokens_to_ids(names) == places
    assert tokenizer("".join(names[::-1]), add_special_tokens=False).input_ids == places[::-1]
    text = QUESTIONS["paper"].format(items=", ".join("".join(
        names[level * n_codes + code] for level, code in enumerate(ours.ids.codes[item].tolist())) for item in history))
    ids = tokenizer(text).input_ids
    assert ids == ours.template.prompt(history).tolist() and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_llamas_licence_goes_with_it(opened, runs, tmp_path):
    """Exports of a Llama carry its notice and say what it is built with; those of a base of our own do not."""
    for name, expected in (("llama", True), ("tiny", False)):
        export_merged(opened(name), tmp_path / f"{name}-merged")
        export_peft(opened(name), runs[name] / "adapters" / "stage-3", tmp_path / f"{name}-peft")
        for kind in ("merged", "peft"):
            folder = tmp_path / f"{name}-{kind}"
            said = "Built with Llama" in (folder / "README.md").read_text()
            assert (folder / "NOTICE").is_file() == expected == said
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License" in (tmp_path / "llama-peft/NOTICE").read_text()


@pytest.mark.parametrize("name, factor, version", [
    ("Llama-3.2-3B", None, "3.2"), ("Llama-3", None, "3"), ("my", 32.0, "3.2"), ("my", 8.0, "3.1"), ("my", None, None)])
def test_a_llama_is_known_in_a_folder_of_any_name(tmp_path, name, factor, version):
    """By the name, else by the rotary factor that only one version has; a base from scratch is none."""
    shape = json.loads((checkpoint(tmp_path / name) / "config.json").read_text())
    scaling = factor and dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=8192)
    (tmp_path / name / "config.json").write_text(json.dumps(shape | {"rope_scaling": scaling}))
    assert llama_version(micro(tmp_path / "run", base=str(tmp_path / name))) == version
    assert llama_version(micro(tmp_path / "run")) is None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings")  # from inside peft
@pytest.mark.parametrize("name, method, stage", [
    ("tiny", "", 3), ("tiny", "sumlora-latest", 3), ("llama", "", 1), ("llama", "single", 3), ("release", "", 3),
    ("tables first", "", 3), ("tables later", "", 1), ("tables later", "", 3)])
def test_peft_loads_the_exported_adapter(runs, name, method, stage, tmp_path):
    """The stage's own files byte for byte; by the README's code, peft's logits are the adapted model's within 1e-5."""
    folder = runs[name] / method
    ours = reopen(folder, stage)
    stored = (runs[name] if stage == 1 else folder) / "adapters" / f"stage-{stage}"
    export_peft(ours, stored, tmp_path / "out")
    for path in stored.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert logits_agree(block_of(tmp_path / "out")["model"].eval(), ours.model)


def test_an_export_never_overwrites_and_leaves_no_half(opened, tmp_path, monkeypatch):
    """A folder with content is left alone; a failure half-way leaves nothing under the name or beside it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="in the way"):
        export_merged(opened("tiny"), tmp_path / "full")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]
    monkeypatch.setattr(export, "save_file", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        export_merged(opened("tiny"), tmp_path / "new")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]
