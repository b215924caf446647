"""Imports go down the floors of docs/architecture.md, never up or in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from megatron_mosa.hf import MODELLING_FILES

PACKAGE = Path(__file__).parents[2] / "megatron_mosa"
FLOORS = [
    {"errors", "entry", "exit_codes", "utils"},
    {"config", "hf", "kernels", "parallel"},
    {"attention", "data", "resilience"},
    {"model"},
    {"checkpoint", "engine", "metrics"},
    {"evaluation", "train"},
    {"decode", "scaling", "slurm"},
    {"cli", "__main__"},
]
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
# On one floor, only in this direction.
SIDEWAYS = {
    ("entry", "errors"),
    ("entry", "exit_codes"),
    ("checkpoint", "engine"),
    ("checkpoint", "metrics"),
    ("__main__", "cli"),
}


def imports(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            if node.level and path.parent.name == "hf":
                continue  # one of its files names another in an exported folder, too
            assert node.level == 0, f"{path}: imports are absolute here"
            # both `from megatron_mosa.train import x` and `from megatron_mosa import train`
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "megatron_mosa" and part[1] != "__version__"}
    return found


def test_arrows_go_down() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in imports(path) - {own}:
            down = FLOOR[other] < FLOOR[own] or (own, other) in SIDEWAYS
            assert down, f"{path.relative_to(PACKAGE.parent)} imports megatron_mosa.{other}"


def test_modelling_code_travels_alone() -> None:
    assert {path.name for path in MODELLING_FILES} == {path.name for path in (PACKAGE / "hf").glob("*_mosa.py")}
    for path in MODELLING_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in {other.name for other in MODELLING_FILES}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                known = {
                    "__future__",
                    "collections",
                    "contextlib",
                    "difflib",
                    "inspect",
                    "typing",
                    "torch",
                    "transformers",
                }
                if path.name == "kernels_mosa.py":
                    known |= {"triton", "functools", "os", "shutil"}  # Triton if it is there
                for name in names:
                    assert name.partition(".")[0] in known, (path, name)


UNNEEDED = {
    "datasets",
    "matplotlib",
    "pandas",
    "rich",
    "scipy",
    "transformers",
}  # wandb, if it is there: by Megatron-core
IMPORTS = f"""
import sys
import megatron_mosa.kernels
print("kernels", *{{"megatron", "deepspeed"}} & set(sys.modules))
import megatron_mosa.train
print("train", *{UNNEEDED} & set(sys.modules))
"""


def test_kernels_need_torch_alone_and_training_nothing_that_is_slow_to_import() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["kernels", "train"]


def _opens_text(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a file or a pipe as text and leaves the encoding to the locale."""
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
        return False  # of a class of ours, or of a library that opens bytes
    return not any(_is_mode(mode) and "b" in mode.value for mode in modes)  # type: ignore[attr-defined]


def _is_mode(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and set(node.value) <= set("rwaxbt+")


def test_text_files_are_utf_8_whatever_the_locale() -> None:
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
