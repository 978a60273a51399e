"""Which package may import which, what importing costs, and what no module may do."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import dreambooth_lib

PACKAGE = "dreambooth_lib"
ROOT = Path(dreambooth_lib.__file__).parent

#: What each package may import of the others, lazily too; imports for type checkers are free.
LAYERS = {
    "core": (),
    "data": ("core",),
    "metrics": ("core",),
    "families": ("core",),
    "training": ("core", "data", "metrics", "families"),
    "figures": ("core", "training"),
    "export": ("core", "data", "families", "training", "figures"),
    "evaluation": ("core", "data", "metrics", "families", "training", "figures"),
    "notebook": ("core", "data", "families", "training", "figures"),
}
PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
POSIX = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
TORCHES = ("torch.load", "torch.save", "torch.serialization", "torch.hub", "torch.package")


def module_name(path: Path) -> str:
    """Name a module from the package on: families/base.py is "families.base"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def layer(module: str) -> str:
    return module.partition(".")[0]


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes, without what only type checkers execute."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield from nodes(statement)
        else:
            yield from nodes(child)


def imported(source: str, module: str) -> set[str]:
    """Return the library's modules that ``module`` imports, "__init__" for the package itself."""
    package = f"{PACKAGE}.{module}"
    if SOURCES[module].name != "__init__.py" or module == "__init__":
        package = package.rpartition(".")[0]
    found = set()
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner.removeprefix(f"{PACKAGE}.") in SOURCES else origin)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    inside = {name for name in found if f"{name}.".startswith(f"{PACKAGE}.")}
    return {name.removeprefix(PACKAGE).removeprefix(".") or "__init__" for name in inside}


def forbidden(source: str) -> set[str]:
    """Return what the source uses of pickle, torch's own files and a model repository's code."""
    tree = ast.parse(source)
    names: set[str] = set()  # dotted, by their first names, whatever they are imported as
    first_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            first_names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                head, _, rest = ast.unparse(node).partition(".")
                names.add(f"{first_names.get(head, head)}.{rest}")
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=False)):
                pass  # what a loader would otherwise ask the user
            case ast.keyword(arg=str(name)) | ast.Name(id=name) | ast.Constant(value=str(name)):
                names |= {name} & {"trust_remote_code", "allow_pickle"}
    bad = "|".join([*PICKLES, *TORCHES, "trust_remote_code", "allow_pickle"])
    return {name for name in names if re.match(rf"({bad})(\.|$)", name)}


@pytest.mark.parametrize("module", [m for m in SOURCES if m not in ("__init__", "__main__")])
def test_module_imports_only_packages_below_its_own(module: str) -> None:
    allowed = {layer(module), *LAYERS[layer(module)]}
    extra = {m for m in imported(SOURCES[module].read_text(), module) if layer(m) not in allowed}
    assert not extra, (
        f"{module} imports {', '.join(sorted(extra))}; move what it needs to a package below, or "
        "pass it in. To allow the import, add the package to LAYERS."
    )


def test_no_imports_go_in_circles() -> None:
    list(TopologicalSorter(LAYERS).static_order())
    modules = {m: imported(path.read_text(), m) - {m} for m, path in SOURCES.items()}
    list(TopologicalSorter(modules).static_order())


def test_the_package_itself_imports_nothing_at_once() -> None:
    assert imported(SOURCES["__init__"].read_text(), "__init__") == set()


def test_a_stranger_sees_twelve_entries() -> None:
    entries = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    entries = [path for path in entries if path.name != "bundled"]  # of an installed package
    assert len(entries) <= 12, sorted(path.name for path in entries)
    assert {path.name for path in entries if path.is_dir()} == set(LAYERS)


@pytest.mark.parametrize("module", SOURCES)
def test_module_is_at_most_300_lines_long(module: str) -> None:
    assert len(SOURCES[module].read_text().splitlines()) <= 300


def test_functions_of_the_loop_fit_on_one_screen() -> None:
    tree = ast.parse(SOURCES["training.loop"].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import dreambooth_lib.training.runs", {"training.runs"}),
        ("import dreambooth_lib as db", {"__init__"}),
        ("from dreambooth_lib.training import runs, loop", {"training.runs", "training.loop"}),
        ("from dreambooth_lib import train", {"__init__"}),
        ("from dreambooth_lib.families import base", {"families.base"}),
        ("def f():\n    from dreambooth_lib.core.files import save_png", {"core.files"}),
        ("from .base import Family", {"families.base"}),
        ("from .. import core", {"core"}),
        ("from ..training.runs import Run", {"training.runs"}),
        ("import importlib\nimportlib.import_module('dreambooth_lib.core')", {"core"}),
        ("if TYPE_CHECKING:\n    from dreambooth_lib import core\nelse:\n    import torch", set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from dreambooth_lib import core", {"core"}),
        ("import dreambooth_library, torch", set()),
    ],
)
def test_imports_are_found(source: str, expected: set[str]) -> None:
    assert imported(source, "families.stable_diffusion") == expected


@pytest.mark.parametrize("module", SOURCES)
def test_no_pickle_and_no_remote_code(module: str) -> None:
    assert forbidden(SOURCES[module].read_text()) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", {"pickle"}),
        ("def f():\n    from pickle import loads", {"pickle.loads"}),
        ("import torch\ntorch.save({}, 'x')", {"torch.save"}),
        ("import torch as t\nread = t.load", {"torch.load"}),
        ("from torch import load as read", {"torch.load"}),
        ("from torch import serialization", {"torch.serialization"}),
        ("from torch.serialization import load", {"torch.serialization.load"}),
        ("f(x, trust_remote_code=False)", set()),
        ("f(x, trust_remote_code=None)", {"trust_remote_code"}),
        ("f(x, trust_remote_code=True)", {"trust_remote_code"}),
        ("f(**{'trust_remote_code': True})", {"trust_remote_code"}),
        ("np.load(path, allow_pickle=True)", {"allow_pickle"}),
        ('"""No pickle, no torch.load."""\nload(path)\nimage.save(path)', set()),
        ("from safetensors.torch import load_file, save_file", set()),
    ],
)
def test_forbidden_things_are_found(source: str, expected: set[str]) -> None:
    assert forbidden(source) == expected


@pytest.mark.parametrize("module", SOURCES)
def test_no_import_fails_on_windows(module: str) -> None:
    """Allow ``resource`` in one place only, which knows its unit on each system."""
    tree = ast.parse(SOURCES[module].read_text())
    at_once = {name for node in tree.body for name in names_imported(node)}
    assert at_once.isdisjoint(POSIX)
    anywhere = {name for node in ast.walk(tree) for name in names_imported(node)}
    assert "resource" not in anywhere or module == "core.made_with"


def names_imported(node: ast.AST) -> list[str]:
    """Name the modules of an import; none for other nodes."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, dreambooth_lib; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(done.stdout.split())
    assert PACKAGE in modules
    assert not modules & {"torch", "transformers", "diffusers", "accelerate", "matplotlib"}


def test_names_of_the_package_are_where_it_says() -> None:
    for name in dreambooth_lib.__all__:
        module = importlib.import_module(f"{PACKAGE}.{dreambooth_lib._HOME[name]}")
        assert getattr(dreambooth_lib, name).__module__ == module.__name__
    typed = {
        (alias.name, node.module)
        for node in ast.walk(ast.parse(SOURCES["__init__"].read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}.")
        for alias in node.names
    }
    assert dreambooth_lib.__all__ == sorted(dreambooth_lib._HOME)
    assert typed == {(name, f"{PACKAGE}.{home}") for name, home in dreambooth_lib._HOME.items()}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dreambooth_lib.no_such_name
