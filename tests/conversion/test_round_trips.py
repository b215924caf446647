"""Import of exports that transformers or PEFT saved again: either what transformers loads, or a one-line error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mosa.checkpoint import read_metadata
from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.convert.commands.import_model import import_hf
from megatron_mosa.convert.commands.inspect import inspect
from megatron_mosa.convert.commands.verify import verify
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.logits import megatron_logits
from megatron_mosa.errors import RunError, UserError
from tests.conversion.models import Trained

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def folders(trained: dict[str, Trained], causal: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export three models: dense with tied embeddings, expert choice, and thresholds."""
    folder = tmp_path_factory.mktemp("exports")
    for kind, model in {"dense": trained["dense"], "hybrid": trained["hybrid"], "causal": causal}.items():
        export_hf(model.checkpoint, folder / kind, checks_logits=False)
    return {kind: folder / kind for kind in ("dense", "hybrid", "causal")}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
def assert_imported(folder: Path, target: Path, expected: Tensor, tokens: Tensor) -> None:
    """Check that the imported checkpoint gives transformers' logits, and that ``verify`` accepts it."""
    import_hf(folder, target)
    source = CheckpointReader.open(target, read_metadata(target))
    found = megatron_logits(source.config, source.vocab_rows, source.read, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    verify(folder, target)


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", ["dense", "hybrid", "causal"])
def test_a_model_saved_over_the_export(
    folders: dict[str, Path], trained: dict[str, Trained], tmp_path: Path, kind: str, max_shard_size: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The export's index or manifest stays behind and refers to files that no longer exist."""
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    model, tokens = load(folder), trained["dense"].tokens
    model.model.norm.weight += 0.1  # another model
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    assert (folder / SINGLE).is_file() == (max_shard_size == "1GB") and (folder / "manifest.json").is_file()
    torch.testing.assert_close(load(folder)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    assert_imported(folder, tmp_path / "back", model(tokens).logits, tokens)
    capsys.readouterr()
    inspect(folder, full=True)
    assert "the checkpoint has no manifest" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_saved_in_half_precision(
    folders: dict[str, Path], causal: Trained, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = load(folders["causal"]).to(dtype)
    model.save_pretrained(tmp_path / "half")
    tensors = load_file(tmp_path / "half" / SINGLE)
    thresholds = [name for name in tensors if name.endswith("thresholds")]
    assert len(thresholds) == 2 and all(tensors[name].dtype == torch.float32 for name in thresholds)
    assert {tensor.dtype for name, tensor in tensors.items() if name not in thresholds} == {dtype}
    loaded = load(tmp_path / "half", dtype=dtype).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in thresholds)  # no precision lost
    expected = load(tmp_path / "half", dtype=torch.float32)(causal.tokens).logits
    assert_imported(tmp_path / "half", tmp_path / "back", expected, causal.tokens)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "hybrid", "causal"])
def test_a_resized_vocabulary(folders: dict[str, Path], trained: dict[str, Trained], tmp_path: Path, kind: str) -> None:
    tokens = trained["dense"].tokens
    for rows in (301, 450):
        folder = tmp_path / f"{rows}-rows"
        shutil.copytree(folders[kind], folder)
        model = load(folder)
        model.resize_token_embeddings(rows)
        model.save_pretrained(folder)
        assert model(tokens).logits.shape[-1] == rows
        assert_imported(folder, tmp_path / f"{rows}", model(tokens).logits, tokens)
        assert read_metadata(tmp_path / f"{rows}").data["vocab_size"] == 300  # the tokenizer's size
    model.resize_token_embeddings(299)
    model.save_pretrained(folder)
    message = (
        r"^'.*': tokenizer.json has 300 tokens, but the embedding only 299 rows; .* to at least 300 rows, or remove"
    )
    with pytest.raises(UserError, match=message):
        import_hf(folder, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    (folder / "tokenizer.json").unlink()
    below = tokens.clamp(max=298)
    assert_imported(folder, tmp_path / "299", model(below).logits, below)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "causal"])
def test_a_model_saved_after_merging_adapters(
    folders: dict[str, Path], trained: dict[str, Trained], tmp_path: Path, kind: str
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    names = ["q_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names, init_lora_weights=False)
    model, tokens = get_peft_model(load(folders[kind]), config), trained["dense"].tokens
    adapted = model(tokens).logits
    merged = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    merged.save_pretrained(tmp_path / "merged")
    assert (adapted - load(folders[kind])(tokens).logits).abs().max() > 0.1
    expected = load(tmp_path / "merged")(tokens).logits
    torch.testing.assert_close(expected, adapted, rtol=0, atol=1e-3)
    assert_imported(tmp_path / "merged", tmp_path / "back", expected, tokens)


@torch.no_grad()
def test_an_embedding_that_is_no_longer_tied(
    folders: dict[str, Path], trained: dict[str, Trained], tmp_path: Path
) -> None:
    """As after merging adapters on the embedding only: the configuration still says that the weights are tied."""
    folder, tokens = tmp_path / "model", trained["dense"].tokens
    load(folders["dense"]).save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.01
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    expected = load(folder)(tokens).logits  # transformers keeps both
    assert (expected - trained["dense"].logits).abs().max() > 1e-3
    message = (
        r"tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight; set tie_word_embed"
    )
    with pytest.raises(UserError, match=message):
        import_hf(folder, tmp_path / "refused")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    assert_imported(folder, tmp_path / "back", expected, tokens)


def test_a_manifest_that_covers_the_files_is_still_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["causal"], folder)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.norm.weight"] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"is corrupt: .*\(if the change is intentional, remove manifest.json\)"):
        import_hf(folder, tmp_path / "back")
