"""Convert an attention layer of the paper authors' PyTorch code (arXiv 2505.00315) to a MosaSelfAttention layer.

Their MoSA module has ``r.0.weight`` [E, h], ``QKV.W`` [E, h, 3h'] and ``O.W`` [E, h', h]. A hybrid has these under
``mosa_heads.``, and the other heads' ``W_QKV.weight`` [3 H h', h] (queries, keys, values of each head) and
``W_O.weight`` [h, H h'] under ``other_heads.``. All tensors already have our layout.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_mosa.errors import RunError, StorageError, UserError
from megatron_mosa.utils import first_line, sync

_MOSA = {"r.0.weight": "router_weight", "QKV.W": "qkv_weight", "O.W": "proj_weight"}
_OTHERS = {"W_QKV.weight": "qkv_weight", "W_O.weight": "proj_weight"}
OTHER_HEADS = ("dense", "local")


def import_layer(
    path: Path, target: Path, *, other_heads: str = "dense", prefix: str = "", force: bool = False
) -> None:
    """Write a file that a MosaSelfAttention layer loads.

    Load it with ``layer.load_state_dict(safetensors.torch.load_file(target), strict=False)``.

    Args:
        path: a state dict, saved by torch.save or as safetensors.
        target: the .safetensors file to create.
        other_heads: the kind of the other heads of a hybrid, "dense" or "local".
        prefix: prefix of the layer's names in the state dict of a whole model.
        force: replace an existing file at ``target``.

    Raises:
        UserError: the file does not exist, tensors are missing, unknown or of incompatible shapes, or the target
            exists.
        RunError: the file cannot be read; nothing in it is executed.
        StorageError: writing the target failed.
    """
    if other_heads not in OTHER_HEADS:
        raise UserError(f"--other-heads must be {' or '.join(OTHER_HEADS)}, got {other_heads}")
    if target.suffix != ".safetensors":
        raise UserError(f"OUT={target} must be a file name that ends in .safetensors")
    if target.exists() and target.resolve() == path.resolve():
        raise UserError(f"OUT={target} is the source itself; choose another file")
    if target.exists() and not (force and target.is_file()):
        raise UserError(f"OUT={target} already exists; choose another file, or pass --force to replace it")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"OUT={target}: '{target.parent}' is not a writable directory; choose a file in a writable directory"
        )
    ours = _renamed(_read(path), prefix, other_heads, path)
    sizes = _checked(ours, other_heads, path)
    _write(ours, target)
    print(f"{target}: {sizes}")


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"'{path}' is not a file; pass a state dict (torch.save or safetensors)")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling an arbitrary file can raise anything
        # What the unpickler says means nothing to a reader, or advises to run the file's code.
        is_told = isinstance(error, SafetensorError | RuntimeError | OSError)
        reason = first_line(error) if is_told else "it holds more than tensors, or torch.save did not write it"
        raise RunError(f"'{path}' cannot be read as tensors ({reason})") from None
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UserError(
            f"'{path}' does not contain a state dict; save that of a module: torch.save(module.state_dict(), FILE)"
        )
    return content


def _renamed(theirs: dict[str, Tensor], prefix: str, other_heads: str, path: Path) -> dict[str, Tensor]:
    """Return the layer's tensors under our names; refuse missing and unknown tensors."""
    found = {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
    is_hybrid = any(name.startswith("mosa_heads.") for name in found)
    names = {f"{'mosa_heads.' * is_hybrid}{name}": f"mosa_heads.{ours}" for name, ours in _MOSA.items()}
    if is_hybrid:
        names |= {f"other_heads.{name}": f"{other_heads}_heads.{ours}" for name, ours in _OTHERS.items()}
    missing = sorted(names.keys() - found.keys())
    unknown = sorted(name for name in found.keys() - names.keys() if not name.endswith("inv_freq"))
    if missing or unknown:
        problem = f"{prefix}{missing[0]} is missing" if missing else f"{prefix}{unknown[0]} is unknown"
        raise UserError(
            f"'{path}' is not a layer of the authors' MoSA: {problem}; expected {', '.join(names)} (see --prefix)"
        )
    return {ours: found[name] for name, ours in names.items()}


def _checked(layer: dict[str, Tensor], other_heads: str, path: Path) -> str:
    """Check that the shapes are consistent; return the layer's configuration as text."""
    router, qkv = layer["mosa_heads.router_weight"], layer["mosa_heads.qkv_weight"]
    heads, width = router.shape if router.dim() == 2 else (0, 0)
    size = qkv.shape[-1] // 3
    expected = {
        "mosa_heads.router_weight": (heads, width),
        "mosa_heads.qkv_weight": (heads, width, 3 * size),
        "mosa_heads.proj_weight": (heads, size, width),
    }
    number = 0
    others = layer.get(f"{other_heads}_heads.proj_weight")
    if others is not None:
        number = others.shape[-1] // max(1, size)
        expected[f"{other_heads}_heads.qkv_weight"] = (3 * number * size, width)
        expected[f"{other_heads}_heads.proj_weight"] = (width, number * size)
    for name, shape in expected.items():
        if layer[name].shape != shape or not layer[name].is_floating_point():
            raise UserError(
                f"'{path}': {name} is {tuple(layer[name].shape)} of {layer[name].dtype}; to match the other tensors it "
                f"must be {shape} of a floating-point dtype"
            )
    kind = f"model.num_{other_heads}_heads={number} " if others is not None else ""
    return f"hidden_size {width}: mosa.num_heads={heads} {kind}model.head_dim={size}"


def _write(layer: dict[str, Tensor], target: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    writing = target.with_name(f".writing-{target.name}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in layer.items()}, writing)
        writing.chmod(0o644)  # safetensors makes files readable by the owner only
        sync(writing)
        os.replace(writing, target)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"could not write to OUT={target}: {error}; free disk space or choose another file"
        ) from None
    finally:
        writing.unlink(missing_ok=True)
