"""The shape of the code: who may import whom, and how large anything may be (all numbers may only be lowered)."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minipeso"
WINGS = ("files", "runs", "rivals", "experiments")
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
         for path in sorted([*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"])}
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
            inside = f"{node.module}.{node.names[0].name}" in FILES
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return names


def inner(name: str) -> set[str]:
    """The modules of the project that module `name` imports, inside functions too."""
    return {other for other in imports(ast.parse(FILES[name].read_text())) if other.startswith("minipeso")}


def wing(name: str) -> str:
    """The wing that a module stands in; "" is the root, the scripts stand on top."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else "" if parts[0] == "minipeso" else "scripts"


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: all but the bodies of functions."""
    class Without(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None
    return Without().visit(ast.parse(ast.unparse(tree)))


@pytest.fixture(params=FILES)
def module(request) -> tuple[str, str]:
    """(name, source) of every file of the project that is no test."""
    return request.param, FILES[request.param].read_text()


def functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_imports_go_in_no_circle():
    """From every module, following imports never leads back to it."""
    graph = {name: inner(name) & FILES.keys() for name in FILES}
    while graph:
        free = [name for name, others in graph.items() if not others & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_only_the_five_packages_are_needed(module):
    """Importing anything needs the standard library and the run-time packages; no extra at module level."""
    name, source = module
    tops = {imported.split(".")[0] for imported in imports(at_import(ast.parse(source)))}
    assert tops <= PACKAGES | {"minipeso", "__future__"} | sys.stdlib_module_names, f"{name}: {tops}"
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


def test_every_file_says_what_it_is(module):
    """A module docstring, and no relic: no TODO, no strict=False, no print for debugging, no path of a machine."""
    name, source = module
    assert ast.get_docstring(ast.parse(source)), f"{name} has no docstring"
    for relic in ("TODO", "FIXME", "XXX", "strict=False", "breakpoint(", "/home/", "/root/"):
        assert relic not in source, f"{name} has {relic!r}"


def test_every_module_imports_without_a_warning():
    """Under -W error, in one fresh interpreter, and no extra comes in by the back door."""
    names = [name for name in FILES if "__" not in name]
    code = (f"import importlib, sys\n[importlib.import_module(name) for name in {names!r}]\n"
            f"print(sorted(set({sorted(EXTRAS)!r}) & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"imported besides: {done.stdout}"
