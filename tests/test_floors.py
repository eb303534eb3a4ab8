"""The shape of the code: who may import whom, and how large anything may be.

The budgets below are the sizes that were reached, rounded up to 50. They may only be lowered: a feature pays for its
lines by what it lets one delete."""
import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from minipeso.config import Config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minipeso"
WINGS = {"files": {"", "files"}, "rivals": {"", "rivals"}, "runs": {"", "files", "runs"},  # who may import from where
         "experiments": {"", "files", "runs", "rivals", "experiments"}}
LINES = {"": 2500, "files": 850, "runs": 1450, "rivals": 850, "experiments": 500}
READING_PATH = ("minipeso.lora", "minipeso.proximal", "minipeso.objective", "minipeso.continual", "train")
MATHS = ("lora", "proximal", "objective", "theory", "llama", "rqvae", "tokens", "beam", "trie")
SHAPE = re.compile(r"\((?:[\w.+*/ -]+, ?)+[\w.+*/ -]*\)|\(\)")
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


def test_who_may_import_whom(module):
    """The root imports from no wing, methods.py alone excepted; a wing imports from the root and from lower wings."""
    name, _ = module
    own, others = wing(name), {wing(other) for other in inner(name) & FILES.keys()}
    if name != "minipeso.methods" and own != "scripts":
        assert others <= WINGS.get(own, {""}), f"{name} imports from {others}"


def test_functions_are_short(module):
    """No function over 45 lines, nor 6 named arguments in the root and 8 elsewhere (self not counted). Of all of them
    the median has 8 lines at most, nine of ten have 20."""
    name, source = module
    most = 8 if wing(name) else 6
    for node in functions(source):
        named = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
        lines = node.end_lineno - node.lineno + 1
        assert lines <= 45, f"{name}.{node.name} has {lines} lines"
        assert len(named) <= most, f"{name}.{node.name} has {len(named)} arguments"
    sizes = [node.end_lineno - node.lineno + 1 for path in FILES.values() for node in functions(path.read_text())]
    assert statistics.median(sizes) <= 8 and (tenths := statistics.quantiles(sizes, n=10))[-1] <= 20, tenths


def count(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_budgets_are_kept():
    """Raw lines of the root, of every wing, of the package, of the reading path and its files, of tests and races; the
    modules that a reader of one stage meets; the fields of Config (a rival's stand beside its code)."""
    sizes = {name: count(path) for name, path in FILES.items()}
    for place, most in LINES.items():
        assert (total := sum(n for name, n in sizes.items() if wing(name) == place)) <= most, (place, total)
    assert sum(n for name, n in sizes.items() if name.startswith("minipeso")) <= 6100
    assert sum(sizes[name] for name in READING_PATH) <= 600 and max(sizes[name] for name in READING_PATH) <= 150
    assert sum(map(count, (ROOT / "tests").glob("*.py"))) <= 8450
    assert sum(map(count, (ROOT / "tests/bench").glob("*.py"))) <= 800
    assert count(ROOT / "README.md") <= 100
    assert len(inner("minipeso.continual")) <= 8, sorted(inner("minipeso.continual"))
    assert len(Config.__dataclass_fields__) <= 60


@pytest.mark.parametrize("name", MATHS)
def test_shapes_are_noted(name):
    """At least four notes of shapes per 100 lines of a maths file."""
    lines = FILES[f"minipeso.{name}"].read_text().splitlines()
    noted = sum(bool(SHAPE.search(line.partition("#")[2]))
                or '"""' not in line and bool(SHAPE.search(line)) and "=" not in line for line in lines)
    assert noted >= 0.04 * len(lines), f"{name}: {noted} in {len(lines)}"


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


def test_the_readme_names_what_there_is():
    """Every test, file and function that README and docs name in their tables exists; a * stands for an ending."""
    sources = {path: path.read_text() for path in [*(ROOT / "tests").rglob("*.py"), *FILES.values()]}
    tests = {name for source in sources.values() for name in re.findall(r"def (test_\w+)", source)}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for word in re.findall(r"`([\w.*/]+)`", page.read_text()):
            module, _, name = word.partition(".")
            if word.startswith("test_") and not word.endswith(".py"):
                assert any(re.fullmatch(word.replace("*", ".*"), test) for test in tests), (page.name, word)
            elif word.endswith(".py") and "*" not in word:
                assert any(path.match(f"*/{word}") for path in sources), (page.name, word)
            elif f"minipeso.{module}" in FILES and name not in ("", "py", "json", "jsonl"):
                source = sources[FILES[f"minipeso.{module}"]]
                assert re.search(rf"^ *((def|class) )?{name}\b", source, re.M), (page.name, word)
