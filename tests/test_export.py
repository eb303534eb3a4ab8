"""A finished run, opened again and handed to others: the same ranks, the same logits, the same items in transformers and peft."""
from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipeso.files import export
from minipeso.runs import report
from minipeso.runs.checkpoint import CheckpointError, write
from minipeso.config import UsageError
from minipeso.evaluate import Ranker
from minipeso.files.export import export_merged, export_peft, llama_version
from minipeso.lora import adapters
from minipeso.objective import answer_loss
from minipeso.runs.recommend import histories, top_items
from minipeso.runs.reopen import reopen
from minipeso.stages import examples
from minipeso.synthetic import write_world
from minipeso.tokens import QUESTIONS, collate, sequences
from tests.micro import checkpoint, llama_checkpoint, micro, run, shared_ids

RUNS = {
    "tiny": dict(compare="single,pretrain,sumlora-latest"),
    "llama": dict(prompt="paper"),
    "release": dict(recipe="release"),
    "tables first": dict(first_trains="tables", later_trains="adapter", compare="single,pretrain"),
    "tables later": dict(first_trains="rows", later_trains="tables", compare="single,pretrain"),
    "shared": {},  # every two items share an ID
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs: a base of their own, a Llama with words, the release's recipe (whole tables), shared IDs."""
    made = tmp_path_factory.mktemp("runs")
    world = write_world(made / "world", 60, 60, 0.5, 0)
    base = llama_checkpoint(made / "Llama-3.2-toy", [*QUESTIONS.values(), *(p.read_text() for p in world.glob("meta*"))],
                            torch.float32)
    for name, changes in RUNS.items():
        more = dict(base=str(base), layers=0, text_width=0) if name in ("llama", "release", "tables first", "tables later") else {}
        more |= dict(dataset=str(shared_ids(made / "blocks"))) if name == "shared" else {}
        run(micro(made / name, **{"codes": 8, **changes, **more}))
    return {name: made / name for name in RUNS}


@pytest.fixture(scope="module")
def opened(runs):
    """reopen, once for each run and stage."""
    made = {}

    def look(name: str, stage: int = 0):
        if (name, stage) not in made:
            made[name, stage] = reopen(runs[name], stage)
        return made[name, stage]
    return look


def block_of(folder: Path) -> dict:
    """The names that the code in a folder's README defines, run as it stands."""
    names = {"folder": str(folder)}
    exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1], names)  # noqa: S102
    return names


def some_ids(model, n: int = 3, l: int = 12) -> torch.Tensor:
    vocabulary = sum(len(p) for p in (model.lm_head.weight, model.lm_head.rows))
    return torch.randint(vocabulary, (n, l), generator=torch.Generator().manual_seed(1))


# -- opened again -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, methods", [("tiny", ("", "single", "pretrain", "sumlora-latest")), ("llama", ("", "single")),
                                           ("release", ("",)), ("shared", ("",)),
                                           ("tables first", ("", "single", "pretrain")), ("tables later", ("", "pretrain"))])
def test_every_stage_of_every_method_ranks_as_it_did(runs, name, methods):
    """The folder alone is the whole model: each stage's ranks are those that the run wrote."""
    for method in methods:
        folder = runs[name] / method
        ranks = report.load(folder)[1]
        for t in (1, 2, 3):
            again = reopen(folder, t)
            test = examples(again.data.stages[t - 1], "test", again.cfg.window)
            ranker = Ranker(again.ids, again.known, again.template, again.cfg.beams, again.cfg.hit)
            assert torch.equal(ranker.ranks(again.model, test), ranks[str(t)]), (name, method, t)
    assert reopen(runs[name]).stage == 3


def test_a_folder_that_was_moved_opens(runs, tmp_path):
    """Nothing in a run of the demo remembers where it was."""
    (tmp_path / "elsewhere").mkdir()
    moved = runs["tiny"].rename(tmp_path / "elsewhere" / "run")
    again = reopen(moved)
    moved.rename(runs["tiny"])
    assert torch.equal(next(adapters(again.model))[1].A, next(adapters(reopen(runs["tiny"]).model))[1].A)


def test_a_llamas_run_opens_without_its_checkpoints(runs, opened, tmp_path):
    """They are for going on alone; only a base that the run has learnt lies there."""
    shutil.copytree(runs["llama"], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert torch.equal(next(adapters(reopen(tmp_path / "run").model))[1].A, next(adapters(opened("llama").model))[1].A)


def broken(folder: Path, how: str) -> None:
    """Spoils a copy of a run."""
    settings = json.loads((folder / "config.json").read_text())
    if how == "data":
        (folder / "config.json").write_text(json.dumps(settings | {"hashes": settings["hashes"] | {"data": "0" * 64}}))
    if how == "settings":
        (folder / "config.json").write_text(json.dumps(settings | {"momentum": 0.9}))
    if how == "no settings":
        (folder / "config.json").unlink()
    if how == "no object":
        (folder / "config.json").write_text("[]")
    if how == "base":
        (folder / "checkpoints" / "base" / "state.safetensors").write_bytes(b"x")
    if how == "other base":
        write(folder / "checkpoints" / "base", {"model.norm.weight": torch.ones(16)}, {})
    if how == "edited":
        (folder / "config.json").write_text(json.dumps(settings | {"alpha": settings["alpha"] * 2}))
    if how == "tokens":
        tokens = json.loads((folder / "tokens.json").read_text())
        (folder / "tokens.json").write_text(json.dumps(tokens | {"<a_3>": tokens["<a_4>"], "<a_4>": tokens["<a_3>"]}))
    if how == "no tokens":
        (folder / "tokens.json").unlink()
    if how == "adapter":
        for place in folder.glob("adapters/*/adapter_config.json"):
            place.unlink()


@pytest.mark.parametrize("how, kind, word", [
    ("data", UsageError, "000000000000"), ("settings", UsageError, "momentum"), ("no settings", FileNotFoundError, "config.json"),
    ("no object", UsageError, "config.json"), ("base", CheckpointError, "state.safetensors"),
    ("other base", CheckpointError, "is not the base"), ("adapter", UsageError, "any stage"),
    ("edited", UsageError, "is not what the run wrote"), ("tokens", UsageError, "<a_3>"), ("no tokens", FileNotFoundError, "tokens.json")])
def test_what_is_not_the_run_any_more_is_refused(runs, tmp_path, how, kind, word):
    """Other data, unknown settings, a damaged base, no adapter: three lines, never another model's numbers."""
    shutil.copytree(runs["tiny"], tmp_path / "run")
    broken(tmp_path / "run", how)
    with pytest.raises(kind) as error:
        reopen(tmp_path / "run")
    assert len(str(error.value).splitlines()) == 3 and word in str(error.value), error.value


def test_a_stage_that_is_not_there_is_refused(runs):
    """The stages that are there are named."""
    with pytest.raises(UsageError, match="D1, D2, D3"):
        reopen(runs["tiny"], 4)


# -- merged -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, stage", [("tiny", 3), ("tiny", 1), ("llama", 2), ("release", 3), ("shared", 2)])
def test_the_merged_folder_is_the_model(opened, name, stage, tmp_path):
    """transformers loads it: logits within 1e-5 of the adapted model's; the README's own code finds the items that
    --recommend finds, in its order, with its scores."""
    ours = opened(name, stage)
    export_merged(ours, tmp_path / "out")
    names = block_of(tmp_path / "out")
    peer, ids = names["model"], some_ids(ours.model)
    with torch.no_grad():
        error = (peer(ids).logits - ours.model(ids)).abs().max().item()
    assert error < 1e-5, f"logits differ by {error:.1e}"
    known = histories(ours)
    for user in list(known)[:6]:
        found = top_items(ours, [known[user]])[0]
        theirs = names["recommend"]([ours.data.keys[item] for item in known[user]])
        flat = [(key, score) for keys, score in theirs for key in sorted(keys, key=ours.data.keys.index)][:10]
        assert [ours.data.keys[item] for item, _ in found] == [key for key, _ in flat]
        assert max(abs(a[1] - b[1]) for a, b in zip(found, flat)) < 1e-4


def test_the_merged_weights_are_plain(opened, tmp_path):
    """W + s B A by hand; the checkpoint's names and no others; sampling off; readable by whoever may read the rest."""
    ours = opened("llama", 3)
    export_merged(ours, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(Path(ours.cfg.base) / "model.safetensors")
    assert tensors.keys() == base.keys()
    for name, layer in adapters(ours.model):
        want = base[f"{name}.weight"] + ours.cfg.alpha / ours.cfg.rank * (layer.B @ layer.A).detach()
        assert torch.allclose(tensors[f"{name}.weight"], want, atol=1e-6), name
    words = len(base["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.embed_tokens.weight"][:words], base["model.embed_tokens.weight"])
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["do_sample"] is False and not {"temperature", "top_p", "top_k"} & generation.keys()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, modes


def test_the_exported_tokenizer_knows_every_code(opened, runs, tmp_path):
    """Every code is one token at the id that was trained and written down, adjacent codes come apart, and the whole prompt as one text
    is the template's own ids."""
    from transformers import AutoTokenizer
    ours = opened("llama")
    export_merged(ours, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    first, n_codes = ours.template.first_token, ours.ids.n_codes
    names = [f"<{'abcd'[level]}_{code}>" for level in range(ours.ids.codes.shape[1]) for code in range(n_codes)]
    assert json.loads((runs["llama"] / "tokens.json").read_text()) == dict(zip(names, range(first, first + len(names))))
    assert tokenizer.convert_tokens_to_ids(names) == list(range(first, first + len(names)))
    assert tokenizer("".join(names[::-1]), add_special_tokens=False).input_ids == list(range(first, first + len(names)))[::-1]
    history = [3, 0, 3, 7]
    text = QUESTIONS["paper"].format(items=", ".join(
        "".join(f"<{'abcd'[level]}_{code}>" for level, code in enumerate(ours.ids.codes[item].tolist())) for item in history))
    ids = tokenizer(text).input_ids
    assert ids == ours.template.prompt(history).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_llamas_licence_goes_with_it(opened, runs, tmp_path):
    """Exports of a Llama carry its notice and say what it is built with; those of a base of our own do not."""
    for name, expected in (("llama", True), ("tiny", False)):
        export_merged(opened(name), tmp_path / f"{name}-merged")
        export_peft(opened(name), runs[name], tmp_path / f"{name}-peft")
        for kind in ("merged", "peft"):
            folder = tmp_path / f"{name}-{kind}"
            assert (folder / "NOTICE").is_file() == expected == ("Built with Llama" in (folder / "README.md").read_text())
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License" in (tmp_path / "llama-peft" / "NOTICE").read_text()


@pytest.mark.parametrize("name, factor, version", [("Llama-3.2-3B", None, "3.2"), ("mine", 32.0, "3.2"), ("mine", 8.0, "3.1"),
                                                   ("mine", None, None), ("Llama-3", None, "3")])
def test_a_llama_is_known_in_a_folder_of_any_name(tmp_path, name, factor, version):
    """By the name, else by the rotary factor that only one version has; a base from scratch is none."""
    shape = json.loads((checkpoint(tmp_path / name) / "config.json").read_text())
    scaling = factor and dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=8192)
    (tmp_path / name / "config.json").write_text(json.dumps(shape | {"rope_scaling": scaling}))
    assert llama_version(micro(tmp_path / "run", base=str(tmp_path / name))) == version
    assert llama_version(micro(tmp_path / "run")) is None


# -- peft -------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings")  # from inside peft
@pytest.mark.parametrize("name, method, stage", [("tiny", "", 3), ("tiny", "sumlora-latest", 3), ("llama", "", 1),
                                                 ("llama", "single", 3), ("release", "", 3),
                                                 ("tables first", "", 3), ("tables later", "", 1), ("tables later", "", 3)])
def test_peft_loads_the_exported_adapter(runs, name, method, stage, tmp_path):
    """The stage's own files byte for byte; by the README's code, peft's logits are the adapted model's within 1e-5."""
    folder = runs[name] / method
    ours = reopen(folder, stage)
    export_peft(ours, folder, tmp_path / "out")
    stored = (runs[name] if stage == 1 else folder) / "adapters" / f"stage-{stage}"
    for path in stored.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    peer, ids = block_of(tmp_path / "out")["model"].eval(), some_ids(ours.model)
    with torch.no_grad():
        error = (peer(ids).logits - ours.model(ids)).abs().max().item()
    assert error < 1e-5, f"logits differ by {error:.1e}"


# -- whole or not at all ----------------------------------------------------------------------------

def test_an_export_never_overwrites_and_leaves_no_half(opened, tmp_path, monkeypatch):
    """A folder with content is left alone; a failure half-way leaves nothing under the name or beside it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="in the way"):
        export_merged(opened("tiny"), tmp_path / "full")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError):
        export_merged(opened("tiny"), tmp_path / "new")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]


# -- the release's objective, term by term ----------------------------------------------------------

def test_the_release_recipe_is_the_authors_objective(runs):
    """methods.md 1.3-1.6, written out: cross-entropy of codes and <|end_of_text|> at temperature 0.8, over the mean of
    all answer tokens, plus lambda * (mean over modules of KL(A) + mean over modules of KL(B)), both by log_softmax of the
    flattened matrices against the state before; embedding, head and LoRA are what trains."""
    from minipeso.continual import choose_trainable
    from minipeso.objective import stage_loss
    ours = reopen(runs["release"], 2)
    model, cfg = ours.model.double().eval(), ours.cfg
    model.model.rotary.speed = model.model.rotary.speed.double()
    draw = torch.Generator().manual_seed(3)
    for _, layer in adapters(model):  # a step away from the anchor
        layer.anchor()
        with torch.no_grad():
            for M in layer.trained():
                M += 0.1 * torch.randn(M.shape, generator=draw, dtype=M.dtype)
    pairs = examples(ours.data.stages[1], "train", cfg.window)[:7]
    batch = collate(sequences(pairs, ours.template))
    loss = stage_loss(model, batch, "kl", cfg.lam, cfg.temperature, cfg.groups, cfg.reduction, cfg.prox_scale)

    ce, tokens, L, V = 0.0, 0, ours.ids.codes.shape[1], ours.tokenizer.get_vocab_size()
    end = ours.tokenizer.token_to_id("<|end_of_text|>")
    for pair in pairs:  # one row a pair, nothing shared, nothing cached
        codes = [V + level * ours.ids.n_codes + int(c) for level, c in enumerate(ours.ids.codes[pair.target])]
        prompt = ours.template.prompt(pair.history).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *codes]]))[0] / 0.8
        for k, token in enumerate([*codes, end]):
            ce -= logits[len(prompt) - 1 + k].log_softmax(-1)[token].item()
            tokens += 1
    layers = [layer for _, layer in adapters(model)]

    def kl(now, before):
        log_p, log_q = now.flatten().log_softmax(0), before.flatten().log_softmax(0)
        return (log_p.exp() * (log_p - log_q)).sum().item()
    prox = sum(kl(m.A, m.A_prev) for m in layers) / len(layers) + sum(kl(m.B, m.B_prev) for m in layers) / len(layers)
    assert tokens == len(pairs) * (L + 1)
    assert loss.ce.item() == pytest.approx(ce / tokens, rel=1e-9) == pytest.approx(
        answer_loss(model, batch, 0.8).item(), rel=1e-9)
    assert loss.prox.item() == pytest.approx(prox, rel=1e-6) and prox > 0
    assert loss.total.item() == pytest.approx(ce / tokens + cfg.lam * prox, rel=1e-6)
    for what in (cfg.first_trains, cfg.later_trains):
        choose_trainable(model, what)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        tables = {f"{table}.{part}" for table in ("model.embed_tokens", "lm_head") for part in ("weight", "rows")}
        assert trained == tables | {f"{name}.{M}" for name, _ in adapters(model) for M in "AB"}
    assert (cfg.lr, cfg.later_lr, cfg.hit) == (1e-3, 0.5, "id")  # rate and factor: micro's; the recipe's own in test_config
