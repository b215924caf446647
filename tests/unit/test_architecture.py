"""Imports follow the levels of docs/architecture.md: only downwards, never in a cycle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from megatron_mosa.hf import MODELLING_FILES

PACKAGE = Path(__file__).parents[2] / "megatron_mosa"
LEVELS = [
    {"errors", "entry", "exit_codes", "utils"},
    {"config", "hf", "kernels", "parallel"},
    {"attention", "data", "resilience"},
    {"model"},
    {"checkpoint", "engine", "metrics"},
    {"evaluation", "train"},
    {"decode", "scaling", "slurm"},
    {"cli", "__main__"},
]
LEVEL = {module: number for number, modules in enumerate(LEVELS) for module in modules}
# Allowed imports (importer, imported) within one level.
WITHIN_LEVEL = {
    ("entry", "errors"),
    ("entry", "exit_codes"),
    ("checkpoint", "engine"),
    ("checkpoint", "metrics"),
    ("__main__", "cli"),
}


def imports(path: Path) -> set[str]:
    """Return the top-level modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            if node.level and path.parent.name == "hf":
                continue  # files of hf import each other relatively, also in an exported model
            assert node.level == 0, f"{path}: imports are absolute here"
            # both `from megatron_mosa.train import x` and `from megatron_mosa import train`
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "megatron_mosa" and part[1] != "__version__"}
    return found


def test_modules_import_only_from_lower_levels() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in imports(path) - {own}:
            is_allowed = LEVEL[other] < LEVEL[own] or (own, other) in WITHIN_LEVEL
            assert is_allowed, f"{path.relative_to(PACKAGE.parent)} imports megatron_mosa.{other}"


def test_modelling_code_is_self_contained() -> None:
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
                    known |= {"triton", "functools", "os", "shutil"}  # Triton is optional
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
IMPORTS = f"""
import sys
import megatron_mosa.kernels
print("kernels", *{{"megatron", "deepspeed"}} & set(sys.modules))
import megatron_mosa.train
print("train", *{UNNEEDED} & set(sys.modules))
"""


def test_kernels_need_only_torch_and_training_no_slow_imports() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["kernels", "train"]


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
