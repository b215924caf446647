"""Imports follow docs/architecture.md: downwards only, through a package's face, and in no circle of files."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_mosa.hf import MODELING_FILES

PACKAGE = Path(__file__).parents[2] / "megatron_mosa"
ROOT = PACKAGE.parent
LEVELS = [
    {"errors", "exit_codes", "utils"},
    {"config", "entry", "hf", "kernels", "options", "parallel"},
    {"attention", "data", "resilience", "sbatch"},
    {"model"},
    {"engine", "metrics"},
    {"checkpoint"},
    {"convert"},
    {"cluster.torchrun", "convert.commands", "train"},
    {"cluster", "commands", "tools"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
# Modules that other packages import directly instead of through the package's face, with the reason.
FACE_EXCEPTIONS = {
    "cluster": "its face is empty: the batch script runs its programs and must not wait for torch",
    "commands": "its face is empty: every start of the command line imports it",
    "tools": "its face is empty: every start of the command line imports it",
    "convert.commands": "one module per command, imported when that command runs",
    "data.commands": "imported when one of its commands runs; training does not need it",
    "hf": "its files are copied into exported models, and importing one loads transformers",
    "kernels.naive": "the reference implementation; its functions are called as naive.NAME",
}


@dataclass(frozen=True)
class Import:
    """An import of one file of the package by another, at the top, in a function or for types alone."""

    importer: str
    """The importing module, without ``megatron_mosa.``."""

    imported: str
    """The module whose file is imported; the package itself if the name comes from its face."""

    line: int

    def __str__(self) -> str:
        return f"megatron_mosa.{self.importer}, line {self.line}, imports megatron_mosa.{self.imported}"


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def _exported(module: str) -> frozenset[str]:
    """Return the names that a package's ``__init__.py`` defines or imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _imports(module: str) -> Iterator[Import]:
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module
            if node.level:
                assert path.parent.name == "hf", f"{path}: imports are absolute here"
                source = f"megatron_mosa.hf.{node.module}"  # files of hf import each other like this in exports, too
            found = [(source, alias.name) for alias in node.names]
        else:
            continue
        for source, name in found:
            top, _, inner = str(source).partition(".")
            if top != "megatron_mosa":
                continue
            below = f"{inner}.{name}".strip(".")
            is_file = below in MODULES and name not in _exported(inner)
            yield Import(module, below if is_file else inner, node.lineno)


IMPORTS = [found for module in MODULES for found in _imports(module) if found.imported != module]


def _within(module: str, packages: set[str]) -> str | None:
    """Return the innermost of ``packages`` that contains the module."""
    parts = module.split(".")
    candidates = (".".join(parts[:number]) for number in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in packages), None)


def test_files_import_only_from_lower_levels() -> None:
    wrong = []
    for found in IMPORTS:
        own, other = (_within(module, set(LEVEL)) for module in (found.importer, found.imported))
        if found.importer == "" or found.imported == "":  # the package itself knows only its version
            continue
        assert own is not None and other is not None, f"{found}: give the new package a level"
        if own != other and LEVEL[other] >= LEVEL[own]:
            wrong.append(str(found))
    assert not wrong, "these point upwards: " + "; ".join(wrong)


def test_no_circle_of_files() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        graph[found.importer].add(found.imported)
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert not circle, "circle of files: " + " <- ".join(circle)


def test_packages_are_imported_through_their_faces() -> None:
    bypassing, used = [], set()
    for found in IMPORTS:
        own, other = found.importer.partition(".")[0], found.imported.partition(".")[0]
        if own == other or "." not in found.imported:
            continue
        exception = _within(found.imported, set(FACE_EXCEPTIONS))
        used.add(exception)
        if exception is None:
            bypassing.append(str(found))
    assert not bypassing, "import the name from the package: " + "; ".join(bypassing)
    assert set(FACE_EXCEPTIONS) <= used, f"not needed any more: {set(FACE_EXCEPTIONS) - used}"


def test_modeling_code_is_self_contained() -> None:
    assert {path.name for path in MODELING_FILES} == {path.name for path in (PACKAGE / "hf").glob("*_mosa.py")}
    for path in MODELING_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in {other.name for other in MODELING_FILES}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                known = {
                    "__future__",
                    "collections",
                    "contextlib",
                    "difflib",
                    "inspect",
                    "itertools",
                    "math",
                    "operator",
                    "typing",
                    "torch",
                    "transformers",
                }
                if path.name.endswith("kernels_mosa.py"):
                    known |= {
                        "triton",
                        "functools",
                        "importlib",
                        "os",
                        "shutil",
                    }  # Triton and this project are optional
                if path.name == "graph_mosa.py":
                    known |= {"functools", "weakref"}
                for name in names:
                    assert name.partition(".")[0] in known, (path, name)


UNNEEDED = {
    "datasets",
    "matplotlib",
    "pandas",
    "rich",
    "scipy",
    "transformers",
}  # not wandb: Megatron-core imports it if installed
START = f"""
import sys
import megatron_mosa.kernels
print("kernels", *{{"megatron", "deepspeed"}} & set(sys.modules))
import pretrain_mosa
import megatron_mosa.train
print("train", *{UNNEEDED} & set(sys.modules))
print("conversion", *(name for name in sys.modules if name.startswith("megatron_mosa.convert")))
"""


def test_kernels_need_only_torch_and_a_start_of_training_imports_nothing_slow_or_of_conversion() -> None:
    command = [sys.executable, "-W", "ignore", "-c", START]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["kernels", "train", "conversion"]


def test_mistakes_in_a_configuration_are_reported_before_torch_is_imported() -> None:
    code = "import sys, pretrain_mosa; print(*{'torch', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "\n"


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, megatron_mosa.cli; print(*{'torch', 'megatron', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "\n"


def test_checks_that_only_read_import_neither_megatron_nor_deepspeed() -> None:
    """``--check-only`` takes little longer than ``import torch``; reading a manifest or an index takes less."""
    code = """if True:
    import sys
    from megatron_mosa.data.commands import inspect, verify
    from megatron_mosa.data import build_dataset, load_manifest
    from megatron_mosa.convert import find_model
    from megatron_mosa.convert.commands.inspect import inspect
    print(*{"torch", "megatron", "deepspeed", "transformers", "datasets"} & set(sys.modules))
    from megatron_mosa.train import check_start
    slow = {"megatron", "deepspeed", "transformers", "datasets", "torch.distributed.checkpoint"}
    print(*slow & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "\n\n"


def _opens_text(call: ast.Call) -> bool:
    """Return whether a call opens, reads or writes a text file or pipe with the locale's encoding."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if {"text", "universal_newlines"} & set(named) and "encoding" not in named:  # of subprocess
        return name in ("run", "Popen", "check_output", "call", "check_call")
    if name not in ("open", "fdopen", "read_text", "write_text") or "encoding" in named:
        return False
    if name in ("read_text", "write_text"):
        return True
    is_method = isinstance(call.func, ast.Attribute) and name == "open"
    modes = [*call.args[0 if is_method else 1 :], *filter(None, [named.get("mode")])]
    if is_method and call.args and not _is_mode(call.args[0]):
        return False  # a method of our own, or of a library, that opens bytes
    return not any(_is_mode(mode) and "b" in mode.value for mode in modes)  # type: ignore[attr-defined]


def _is_mode(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and set(node.value) <= set("rwaxbt+")


def test_text_files_are_utf_8_in_any_locale() -> None:
    files = [
        *PACKAGE.rglob("*.py"),
        *(PACKAGE.parent / "benchmarks").rglob("*.py"),
        PACKAGE.parent / "pretrain_mosa.py",
    ]
    found = [
        f"{file.relative_to(PACKAGE.parent)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _opens_text(node)
    ]
    assert not found, f"these leave the encoding to the locale; give encoding='utf-8': {', '.join(found)}"
