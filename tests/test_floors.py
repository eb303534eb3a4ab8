"""The shape of the code: who may import whom, and how long anything may be."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "minipeso").glob("*.py")) if path.stem != "__init__"}
SCRIPTS = {name: ROOT / f"{name}.py" for name in ("train", "eval")}
FLOORS = (
    "parallel",
    "disk signals cache rows progress", "ratings",  # the system below
    "config synthetic reviews metrics llama lora proximal rqvae trie embed journal paper guard lightgcn sasrec download race",  # alone
    "stages semantic_ids tokens hub theory beam checkpoint pisa race_trie",  # two things joined
    "cumulative objective race_data race_rqvae race_towers evaluate prepare report keeper twotower",  # the mechanism
    "continual reopen",
    "evorec recommend export",
    "run explain race_llama race_load",  # using it
    "cells doctor race_growth", "scores bench", "experiments",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
EXTRAS = {"transformers", "peft", "pandas", "polars", "scipy", "matplotlib", "pytest", "hypothesis"}
PACKAGES = {"torch", "numpy", "safetensors", "huggingface_hub", "tokenizers", "tqdm"}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported below `tree`: minipeso.stages, torch.nn, ..."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            whole = node.module != "minipeso"
            names |= {node.module} if whole else {f"minipeso.{alias.name}" for alias in node.names}
    return names


def siblings(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.startswith("minipeso.")}


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: all but the bodies of functions."""
    class Without(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None
    return Without().visit(ast.parse(ast.unparse(tree)))


@pytest.fixture(params=[*FILES, *SCRIPTS])
def module(request) -> tuple[str, str]:
    """(name, source) of every file of the project that is no test."""
    return request.param, (FILES | SCRIPTS)[request.param].read_text()


def functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_every_file_has_a_floor():
    """The table above names every file of the package, once."""
    assert set(FLOOR) == set(FILES), f"not both: {set(FLOOR) ^ set(FILES)}"


def test_a_file_imports_only_lower_floors(module):
    """Never its own floor, never a higher one; the scripts stand on top of all."""
    name, source = module
    wrong = {other for other in siblings(ast.parse(source)) if FLOOR[other] >= FLOOR.get(name, len(FLOORS))}
    assert not wrong, f"{name} (floor {FLOOR.get(name)}) imports {sorted(wrong)}"


def test_only_the_five_packages_are_needed(module):
    """Importing anything needs the standard library and the run-time packages; no extra at module level."""
    name, source = module
    tops = {imported.split(".")[0] for imported in imports(at_import(ast.parse(source)))}
    assert tops <= PACKAGES | {"minipeso", "__future__"} | sys.stdlib_module_names, f"{name}: {tops}"
    assert not tops & EXTRAS
    anywhere = {imported.split(".")[0] for imported in imports(ast.parse(source))}
    assert anywhere <= PACKAGES | EXTRAS | {"minipeso", "__future__"} | sys.stdlib_module_names, f"{name}: {anywhere}"


def test_functions_are_short(module):
    """No function over 50 lines or 8 named arguments (self not counted)."""
    name, source = module
    for node in functions(source):
        lines = node.end_lineno - node.lineno + 1
        named = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
        assert lines <= 50, f"{name}.{node.name} has {lines} lines"
        assert len(named) <= 8, f"{name}.{node.name} has {len(named)} arguments"


def test_files_are_short():
    """A file has at most 300 lines, train.py 180. Not blank are at most 6,300 lines of the package, and 900 of what only
    measures its speed (bench.py, race*.py)."""
    lines = {name: len(path.read_text().splitlines()) for name, path in (FILES | SCRIPTS).items()}
    too_long = {name: n for name, n in lines.items() if n > (180 if name == "train" else 300)}
    assert not too_long, too_long
    filled = {name: sum(bool(line.strip()) for line in path.read_text().splitlines()) for name, path in FILES.items()}
    speed = sum(n for name, n in filled.items() if name.startswith(("bench", "race")))
    assert speed <= 900 and sum(filled.values()) - speed <= 6300, (speed, filled)


def test_every_file_says_what_it_is(module):
    """A module docstring, and no relic: no TODO, no strict=False, no print for debugging, no path of a machine."""
    name, source = module
    assert ast.get_docstring(ast.parse(source)), f"{name} has no docstring"
    for relic in ("TODO", "FIXME", "XXX", "strict=False", "breakpoint(", "/home/", "/root/", "/work/"):
        assert relic not in source, f"{name} has {relic!r}"


def test_the_readme_names_what_there_is():
    """Every test, test file, module and function that the README names in its tables exists; a * stands for an ending."""
    words = re.findall(r"`([\w.*/]+)`", (ROOT / "README.md").read_text())
    sources = {path.name: path.read_text() for path in [*(ROOT / "tests").glob("test_*.py"), *FILES.values(), *SCRIPTS.values()]}
    tests = {name for source in sources.values() for name in re.findall(r"def (test_\w+)", source)}
    for word in words:
        module, _, name = word.partition(".")
        if word.startswith("test_") and not word.endswith(".py"):
            assert any(test.startswith(word.rstrip("*")) if "*" in word else test == word for test in tests), word
        elif word.endswith(".py") and "*" not in word:
            assert (ROOT / "minipeso" / word).exists() or (ROOT / "tests" / word).exists() or (ROOT / word).exists(), word
        elif module in FILES and name:
            assert re.search(rf"^ *(def|class) {name}\b", FILES[module].read_text(), re.M), word


def test_every_module_imports_without_a_warning():
    """Under -W error, in one fresh interpreter, and no extra comes in by the back door."""
    names = [f"minipeso.{name}" for name in FILES] + list(SCRIPTS)
    code = (f"import importlib, sys\n[importlib.import_module(name) for name in {names!r}]\n"
            f"print(sorted(set({sorted(EXTRAS)!r}) & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"imported besides: {done.stdout}"
