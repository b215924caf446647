"""Import of attention layers of the authors' PyTorch code: our layer against a reference on their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from megatron_mosa.attention import MosaSelfAttention, MosaTransformerConfig
from megatron_mosa.cli import app
from megatron_mosa.convert.formats.mosa_pytorch import import_layer
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.parallel import destroy_parallel, initialize_parallel
from tests.kernels.reference import mosa_reference, rotate

WIDTH, SIZE, HEADS, OTHERS, LENGTH = 24, 8, 5, 3, 32


def upstream_layer(is_hybrid: bool) -> dict[str, Tensor]:
    """Return random tensors with the authors' names and shapes."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"r.0.weight": (HEADS, WIDTH), "QKV.W": (HEADS, WIDTH, 3 * SIZE), "O.W": (HEADS, SIZE, WIDTH)}
    if is_hybrid:
        shapes = {f"mosa_heads.{name}": shape for name, shape in shapes.items()}
        shapes["other_heads.W_QKV.weight"] = (3 * OTHERS * SIZE, WIDTH)
        shapes["other_heads.W_O.weight"] = (WIDTH, OTHERS * SIZE)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def dense_reference(states: Tensor, qkv_weight: Tensor, proj_weight: Tensor) -> Tensor:
    """Compute causal heads on states [T, h], token by token."""
    output = torch.zeros_like(states)
    for head in range(OTHERS):
        first = 3 * SIZE * head
        query, key, value = (states @ qkv_weight[first + i * SIZE : first + (i + 1) * SIZE].T for i in range(3))
        query, key = (torch.stack([rotate(row, t, 0.5, 1e4) for t, row in enumerate(part)]) for part in (query, key))
        for t in range(len(states)):
            weights = (key[: t + 1] @ query[t] / math.sqrt(SIZE)).softmax(0)
            output[t] += proj_weight[:, head * SIZE : (head + 1) * SIZE] @ (weights @ value[: t + 1])
    return output


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Initialize Megatron's process groups in this process."""
    initialize_parallel(1, seed=1)
    yield
    destroy_parallel()


@pytest.mark.parametrize("is_hybrid", [False, True])
@pytest.mark.parametrize("file", ["layer.pt", "layer.safetensors"])
@torch.no_grad()
def test_the_imported_layer_matches_the_reference(tmp_path: Path, is_hybrid: bool, file: str) -> None:
    theirs = upstream_layer(is_hybrid)
    whole_model = {f"layers.0.att.{name}": tensor for name, tensor in theirs.items()} | {"norm": torch.ones(3)}
    if file.endswith(".pt"):
        torch.save(whole_model, tmp_path / file)
    else:
        save_file(whole_model, tmp_path / file)
    out = tmp_path / "ours.safetensors"
    command = ["checkpoint", "import", str(tmp_path / file), str(out), "--from", "mosa-pytorch"]
    done = CliRunner().invoke(app, [*command, "--prefix", "layers.0.att."])
    assert done.exit_code == 0, done.output
    assert f"mosa.num_heads={HEADS} " in done.output and f"model.head_dim={SIZE}" in done.output
    config = MosaTransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=OTHERS if is_hybrid else 0, kv_channels=SIZE,
        num_mosa_heads=HEADS, mosa_sparsity=4.0, mosa_include_first_token=True, mosa_rotary_percent=0.5,
        use_cpu_initialization=True, add_bias_linear=False, attention_dropout=0.0,
    )  # fmt: skip
    layer = MosaSelfAttention(config)
    layer.load_state_dict(load_file(out), strict=False)
    states = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(4))
    found = layer(states[:, None], None)[0][:, 0]
    prefix = "mosa_heads." * is_hybrid
    mosa = [theirs[f"{prefix}{name}"] for name in ("r.0.weight", "QKV.W", "O.W")]
    expected = mosa_reference(
        states[None], *mosa, num_selected=8, include_first_token=True, rotary_percent=0.5, rotary_base=1e4
    )[0]
    if is_hybrid:
        expected = expected + dense_reference(
            states, theirs["other_heads.W_QKV.weight"], theirs["other_heads.W_O.weight"]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_invalid_files_and_arguments_are_refused(tmp_path: Path) -> None:
    file, out = tmp_path / "layer.pt", tmp_path / "ours.safetensors"
    layer = upstream_layer(True)
    for change, message in (
        ({"mosa_heads.O.W": None}, r"mosa_heads\.O\.W is missing"),
        ({"other_heads.bias": torch.ones(2)}, r"other_heads\.bias is unknown; expected mosa_heads\.r\.0\.weight"),
        ({"mosa_heads.QKV.W": torch.ones(HEADS, WIDTH, 25)}, r"mosa_heads\.qkv_weight is \(5, 24, 25\).*\(5, 24, 24\)"),
        ({"other_heads.W_QKV.weight": torch.ones(9, WIDTH)}, r"dense_heads\.qkv_weight is \(9, 24\).*\(72, 24\)"),
    ):
        changed = {name: tensor for name, tensor in (layer | change).items() if tensor is not None}
        torch.save(changed, file)
        with pytest.raises(UserError, match=message):
            import_layer(file, out)
    torch.save(layer, file)
    for arguments, message in (
        ((tmp_path / "nothing", out), "is not a file"),
        ((file, tmp_path / "ours.bin"), r"ends in \.safetensors"),
        ((file, tmp_path / "no" / "ours.safetensors"), "is not a writable directory"),
    ):
        with pytest.raises(UserError, match=message):
            import_layer(*arguments)
    with pytest.raises(UserError, match="--other-heads must be dense or local, got sparse"):
        import_layer(file, out, other_heads="sparse")
    import_layer(file, out, other_heads="local")
    assert "local_heads.qkv_weight" in load_file(out)
    with pytest.raises(UserError, match="already exists; choose another file, or pass --force"):
        import_layer(file, out)
    import_layer(file, out, force=True)
    torch.save({"mosa_heads.O.W": ForeignCode()}, file)
    for text in ("<html>\n", "Entry not found", "G\n", "import torch\n"):  # read as a pickle, each fails in its own way
        (tmp_path / "text.pt").write_text(text)
        with pytest.raises(RunError, match=r"text.pt' cannot be read as tensors \(.*torch.save did not write it\)$"):
            import_layer(tmp_path / "text.pt", tmp_path / "new.safetensors")
    (tmp_path / "text.pt").unlink()
    with pytest.raises(RunError, match="cannot be read as tensors"):
        import_layer(file, tmp_path / "new.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer.pt", "ours.safetensors"]


class ForeignCode:
    """Prints a message when unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)
