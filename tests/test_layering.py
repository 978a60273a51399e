"""Who may import whom, what importing costs, and what no module may do: read from the sources."""

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

#: What each module may import of the library, lazily too; imports for type checkers are free.
ALLOWED = {
    "config": (),
    "state": (),
    "words": (),
    "alike": ("config", "runs"),
    "allocations": (),
    "pictures": ("config",),
    "identifiers": (),
    "data": ("config", "pictures"),
    "noise": (),
    "losses": ("noise",),
    "families.precision": (),
    "families.inference": (),
    "families.base": ("memory", "noise", "notices", "families.inference", "families.precision"),
    "families.tokens": ("families.base",),
    "families.stable_diffusion": ("config", "noise", "families.base", "families.inference"),
    "families.stable_diffusion_xl": ("noise", "families.base", "families.inference"),
    "families.stable_diffusion_3": ("noise", "families.base", "families.inference"),
    "families.flux": ("noise", "families.base", "families.inference"),
    "families.z_image": ("noise", "families.base", "families.inference"),
    "quantizers": (),
    "families": ("config", "families.base", "families.inference", "quantizers"),
    "lora": ("config", "families", "families.base", "families.tokens", "quantizers"),
    "distill": ("batches", "config", "families.base", "lora", "noise", "pictures"),
    "latents": ("config", "data", "pictures", "families.base", "families.precision", "state"),
    "optim": ("config",),
    "runs": ("config", "state"),
    "weights": ("config", "families", "families.base", "families.tokens", "lora", "runs", "state"),
    "sampling": ("config", "families", "families.base", "families.inference", "families.precision",
                 "memory", "processes", "runs", "weights"),
    "heldout": ("config", "families.base", "latents", "losses", "noise", "pictures", "weights"),
    "watch": ("config", "encoders", "families", "families.base", "heldout", "metrics", "runs",
              "sampling", "state", "weights"),
    "choice": ("runs", "watch"),
    "sweep": ("alike", "config", "choice", "levels", "memory", "prior", "runs", "sampling", "state",
              "tables", "training", "watch", "words"),
    "originals": (),
    "packages": (),
    "colab": ("pictures", "state"),
    "copies": ("state",),
    "exports": ("originals", "state"),
    "hub": ("choice", "colab", "config", "families", "families.tokens", "pages", "pictures",
            "plots", "runs", "sampling", "state", "watch"),
    "kept": ("copies", "families", "families.precision", "hub", "lora", "runs", "state", "weights",
             "words"),
    "mirrors": ("choice", "config", "copies", "pictures", "runs", "state", "watch"),
    "memory": (),
    "bases": ("allocations", "families", "levels", "memory", "words"),
    "needs": ("bases", "levels", "memory", "mirrors"),
    "preflight": ("bases", "colab", "families", "levels", "memory", "needs", "packages", "words"),
    "notices": (),
    "processes": (),
    "prior": ("config", "families", "families.base", "sampling", "state"),
    "encoders": ("state",),
    "metrics": ("encoders",),
    "tables": ("evaluation", "state", "words"),
    "evaluation": ("config", "data", "dreambench", "encoders", "metrics", "pictures"),
    "pace": ("config", "levels", "memory", "processes", "runs", "training"),
    "dreambench": ("alike", "config", "data", "levels", "pictures", "runs", "sampling", "training",
                   "families.base", "state", "watch"),
    "pages": ("state",),
    "plots": ("choice", "state", "watch", "words"),
    "batches": ("config", "data", "pictures", "latents", "noise", "families.base"),
    "estimate": ("allocations", "config", "families", "families.base", "lora", "memory", "optim",
                 "sampling", "watch", "weights"),
    "levels": ("config", "estimate", "memory", "processes", "runs", "state"),
    "updates": ("batches", "config", "lora", "optim", "weights"),
    "training": ("batches", "config", "choice", "data", "distill", "estimate", "families",
                 "families.base", "families.inference", "families.precision", "heldout", "levels",
                 "lora", "losses", "pictures", "prior", "processes", "runs", "state", "updates",
                 "watch", "weights"),
}  # fmt: skip
PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
TORCHES = ("torch.load", "torch.save", "torch.serialization", "torch.hub", "torch.package")


def module_name(path: Path) -> str:
    """As in the table: families/base.py is "families.base", the package itself "__init__"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
#: What may import everything; ``__main__`` alone may import ``demo``, and nothing the others.
TOP = ("demo", "__main__", *(name for name in SOURCES if name.split(".")[0] == "widgets"))


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, without what only type checkers execute."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield from nodes(statement)
        else:
            yield from nodes(child)


def imported(source: str, module: str) -> set[str]:
    """The library's modules that ``module`` imports, "__init__" for the package itself."""
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
    """What the source uses of pickle, torch's own files and code from a model's repository."""
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
            case ast.keyword(arg=str(name)) | ast.Name(id=name) | ast.Constant(value=str(name)):
                names |= {name} & {"trust_remote_code", "allow_pickle"}
    bad = "|".join([*PICKLES, *TORCHES, "trust_remote_code", "allow_pickle"])
    return {name for name in names if re.match(rf"({bad})(\.|$)", name)}


@pytest.mark.parametrize("module", [m for m in SOURCES if m not in TOP])
def test_module_imports_only_what_it_may(module: str) -> None:
    allowed = {"__init__": ()} | ALLOWED
    assert module in allowed, (
        f"{module} is not in ALLOWED; add it there with the modules that it may import."
    )
    extra = imported(SOURCES[module].read_text(), module) - set(allowed[module]) - {module}
    assert not extra, (
        f"{module} imports {', '.join(sorted(extra))}; move what it needs to a module that it may "
        "import, or pass it in. To allow the import, add it to ALLOWED."
    )


def test_table_is_of_modules_and_has_no_cycle() -> None:
    assert set(ALLOWED) <= set(SOURCES), "a module of ALLOWED is gone; remove it."
    # A package and its modules know each other: it loads them only when it is asked for a base.
    graph = {m: set(may) - {"families.stable_diffusion"} for m, may in ALLOWED.items()}
    list(TopologicalSorter(graph).static_order())


def test_only_main_imports_the_top() -> None:
    assert not any(set(TOP) & set(may) for may in ALLOWED.values())
    for module in TOP:
        own = "widgets" if module.startswith("widgets") else module
        above = {name for name in TOP if not name.startswith(own)} - {"demo"}
        assert not above & imported(SOURCES[module].read_text(), module), module


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import dreambooth_lib.runs", {"runs"}),
        ("import dreambooth_lib as db", {"__init__"}),
        ("from dreambooth_lib import runs, families", {"runs", "families"}),
        ("from dreambooth_lib import train", {"__init__"}),
        ("from dreambooth_lib.families import base, load", {"families", "families.base"}),
        ("def f():\n    from dreambooth_lib.state import load_state", {"state"}),
        ("from .base import rows", {"families.base"}),
        ("from .. import noise", {"noise"}),
        ("from ..runs import Run", {"runs"}),
        ("import importlib\nimportlib.import_module('dreambooth_lib.demo')", {"demo"}),
        ("if TYPE_CHECKING:\n    from dreambooth_lib import runs\nelse:\n    import torch", set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from dreambooth_lib import runs", {"runs"}),
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
        ("f(x, trust_remote_code=False)", {"trust_remote_code"}),
        ("f(**{'trust_remote_code': True})", {"trust_remote_code"}),
        ("np.load(path, allow_pickle=True)", {"allow_pickle"}),
        ('"""No pickle, no torch.load."""\nload(path)\nimage.save(path)', set()),
        ("from safetensors.torch import load_file, save_file", set()),
    ],
)
def test_forbidden_things_are_found(source: str, expected: set[str]) -> None:
    assert forbidden(source) == expected


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
    assert typed == {(name, f"{PACKAGE}.{home}") for name, home in dreambooth_lib._HOME.items()}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dreambooth_lib.no_such_name
