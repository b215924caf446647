"""Export: the folder works with transformers alone, and a failed export leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_mosa.__main__ import main
from megatron_mosa.attention import looks_ahead
from megatron_mosa.checkpoint import read_metadata
from megatron_mosa.checkpoint.manifest import files_below, hash_files
from megatron_mosa.config import DataSection
from megatron_mosa.convert.commands import export_hf as export_module
from megatron_mosa.convert.commands.export_fp32 import export_state_dict
from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.convert.commands.export_torch_dist import export_torch_dist
from megatron_mosa.convert.commands.import_model import import_hf
from megatron_mosa.convert.formats import safetensors as safetensors_folder
from megatron_mosa.convert.formats.hf_card import _data, _losses
from megatron_mosa.convert.logits import largest_divergence
from megatron_mosa.data import build_dataset
from megatron_mosa.errors import RunError, StorageError, UserError
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM
from megatron_mosa.hf.sparse_mosa import MosaHeads
from megatron_mosa.hf.tokens_mosa import Tokens, rotary_tables
from megatron_mosa.kernels.naive import select_tokens
from tests.conversion.models import KINDS, Trained


@pytest.fixture(scope="session")
def exported(trained: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export a model of every kind; the export itself checks the logits."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, model in trained.items():
        export_hf(model.checkpoint, folder / kind)
    return {kind: folder / kind for kind in trained}


def load(folder: Path) -> MosaForCausalLM:
    return MosaForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_exported_model_matches_the_megatron_model(
    trained: dict[str, Trained], exported: dict[str, Path], kind: str
) -> None:
    model, loaded = trained[kind], load(exported[kind])
    found = loaded(model.tokens).logits
    assert found.shape == (3, 40, 384)
    card = (exported[kind] / "README.md").read_text()
    assert f"| parameters | {loaded.num_parameters():,}, stored in" in card  # without thresholds, biases and centroids
    assert largest_divergence(model.logits, found) < 1e-9
    torch.testing.assert_close(found, model.logits, rtol=0, atol=1e-4)
    assert model.logits.std() > 0.3  # not a comparison of flat distributions
    half = model.tokens[:, :20]
    if not looks_ahead(model.config):
        torch.testing.assert_close(load(exported[kind])(half).logits, found[:, :20], rtol=0, atol=1e-4)


# Uses the folder on a machine that has transformers but not this project.
ELSEWHERE = """
import sys
class Without:  # hides the packages from find_spec, too: accelerate, if installed, looks for deepspeed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron_mosa", "megatron", "deepspeed"):
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
for name in ("megatron_mosa", "megatron", "deepspeed"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported")
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
for case in torch.load(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(case["folder"], trust_remote_code=True).eval()
    with torch.no_grad():
        found = model(case["tokens"]).logits
        torch.testing.assert_close(found, case["logits"], rtol=0, atol=1e-4)
        states = AutoModel.from_pretrained(case["folder"], trust_remote_code=True).eval()(case["tokens"])
        torch.testing.assert_close(model.lm_head(states.last_hidden_state), found, rtol=0, atol=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(case["folder"])
        batch = tokenizer(["to export 7 and import 49 and back", "back"], padding=True, return_tensors="pt")
        assert tokenizer.decode(batch.input_ids[0]) == "to export 7 and import 49 and back"
        padded = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        count = int(batch.attention_mask[1].sum())
        assert count < batch.input_ids.shape[1]
        alone = model(input_ids=batch.input_ids[1:, :count]).logits
        torch.testing.assert_close(padded[1:, :count], alone, rtol=0, atol=1e-4)
    try:
        longer = model.generate(case["tokens"], max_new_tokens=2, do_sample=False)
        assert longer.shape[1] == case["tokens"].shape[1] + 2 and not model.config.num_mosa_heads
        tokenizer.padding_side = "left"
        batch = tokenizer(["to export 7 and import 49 and back", "back"], padding=True, return_tensors="pt")
        both = model.generate(**batch, max_new_tokens=3, do_sample=False)
        alone = model.generate(**tokenizer("back", return_tensors="pt"), max_new_tokens=3, do_sample=False)
        assert torch.equal(both[1, -3:], alone[0, -3:])
        assert torch.equal(longer[:, -2], case["logits"][:, -1].argmax(-1))
    except ValueError as error:
        assert model.config.num_mosa_heads and "select from the whole sequence" in str(error)
assert not {"megatron_mosa", "megatron", "deepspeed"} & set(sys.modules)
print("done")
"""


def test_it_works_without_this_project(trained: dict[str, Trained], exported: dict[str, Path], tmp_path: Path) -> None:
    cases = [
        {"folder": str(exported[kind]), "tokens": trained[kind].tokens, "logits": trained[kind].logits}
        for kind in ("dense", "hybrid")
    ]
    torch.save(cases, tmp_path / "cases.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE, str(tmp_path / "cases.pt")],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("done")


def test_the_folder_contains_all_files(trained: dict[str, Trained], exported: dict[str, Path]) -> None:
    folder = exported["hybrid"]
    names = [
        "README.md", "arguments_mosa.py", "cache_mosa.py", "config.json", "configuration_mosa.py",
        "dense_kernels_mosa.py", "dense_mosa.py", "fixed_mosa.py", "graph_mosa.py", "heads_mosa.py", "kernels_mosa.py",
        "manifest.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "modeling_mosa.py",
        "room_mosa.py", "routing_mosa.py", "rows_mosa.py", "sparse_mosa.py", "tokenizer.json",
        "tokenizer_config.json", "tokens_mosa.py",
    ]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(
        path.stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777 for path in folder.iterdir()
    )
    card = (folder / "README.md").read_text()
    assert "step 12, 192 sequences of 40 tokens" in card and "fingerprint 0123abcd" in card
    assert "| validation loss | 4.2500 nats per token at step 12 (NON-CAUSAL: heads select tokens" in card
    assert "9.0" not in card  # the loss of a later step
    assert "`generate` is refused unless" in card and "here every sequence is one document" in card
    card = (exported["routing"] / "README.md").read_text()
    assert "4.2500 nats per token at step 12 (NON-CAUSAL" in card and "**Routing heads are not causal.**" in card
    assert "2 dense, 4 Routing (5 clusters) heads of width 8" in card
    assert "NON-CAUSAL" not in (exported["dense"] / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (384, 0)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"


def test_the_card_names_what_the_dataset_was_built_from(trained: dict[str, Trained], tmp_path: Path) -> None:
    """data.sources of the run's configuration may be others: training does not read them."""
    texts, data = tmp_path / "texts.jsonl", tmp_path / "data"
    texts.write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(40)))
    manifest = build_dataset(DataSection(path=str(data), sources=[str(texts)], vocab_size=300, validation_fraction=0.3))
    metadata = read_metadata(trained["dense"].checkpoint)

    def row(path: str, **recorded: object) -> str:
        config = metadata.config | {"data": metadata.config["data"] | {"path": path, "sources": ["stdlib"]}}
        return _data(replace(metadata, config=config, data=metadata.data | recorded))

    fingerprint = manifest.fingerprint
    assert row("gone", sources=["novels"], fingerprint="0123") == "novels (fingerprint 0123)"
    assert row(str(data), fingerprint=fingerprint) == f"{texts} (fingerprint {fingerprint})"
    assert row(str(data), fingerprint="0123") == row("gone", fingerprint="0123") == "fingerprint 0123"
    assert list(_losses(12, Path("/step"), False)) == ["losses"]  # a checkpoint need not be in a run


def test_bfloat16_and_shards(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(safetensors_folder, "_SHARD_BYTES", 20_000)
    export_hf(trained["pure"].checkpoint.parents[1], tmp_path / "out", dtype="bfloat16")
    printed = capsys.readouterr()
    assert "nats on a fixed batch in fp32" in printed.out
    assert "custom code" not in printed.out + printed.err  # transformers does not ask about code that we wrote
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 3 and shards == sorted(set(index["weight_map"].values()))
    assert all((tmp_path / "out" / name).stat().st_size < 22_000 for name in shards)
    for name in shards:
        for key, tensor in load_file(tmp_path / "out" / name).items():
            assert tensor.dtype == torch.bfloat16 and index["weight_map"][key] == name
    embedding = load(tmp_path / "out").model.embed_tokens.weight
    expected = trained["pure"].weights["embedding.word_embeddings.weight"].bfloat16()
    assert torch.equal(embedding.bfloat16(), expected)


@torch.no_grad()
def test_selection_ties_and_padding() -> None:
    config = MosaConfig(hidden_size=8, head_dim=4, num_mosa_heads=3, sparsity=2, include_first_token=True)
    scores = torch.randint(4, (5, 3, 12), generator=torch.Generator().manual_seed(0)) / 4  # full of ties
    heads = MosaHeads(config)
    positions = torch.arange(12)[None]
    whole = Tokens(positions, rotary_tables(positions, config))
    assert torch.equal(heads.select(scores, whole, None), select_tokens(scores, 6, True))
    lengths = [12, 3, 8, 1, 7]
    for side in ("right", "left"):
        starts = [12 - length if side == "left" else 0 for length in lengths]
        first, count = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
        valid = (positions >= first) & (positions < first + count)
        padded = Tokens(positions - first, whole.rotary, valid, valid, lengths)
        found = heads.select(scores, padded, None)
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            count = config.num_selected(length)
            alone = select_tokens(scores[number : number + 1, :, start : start + length], count, True)[0]
            assert torch.equal(found[number, :, :count], alone + start)
            assert (found[number, :, count:] == 12).all()


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(
    trained: dict[str, Trained], exported: dict[str, Path], side: str
) -> None:
    model, tokens = load(exported["hybrid"]), trained["hybrid"].tokens
    mask = torch.ones_like(tokens)
    kept = slice(0, 17) if side == "right" else slice(23, 40)
    mask[1] = 0
    mask[1, kept] = 1
    padded = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, kept], model(tokens[1:2, kept]).logits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(padded[0], trained["hybrid"].logits[0], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"attention_mask is 0 throughout sequence 0; expected a 1 at every token"):
        model(tokens, attention_mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 40, 40\); expected \(3, 40\)"):
        model(tokens, attention_mask=torch.ones(3, 1, 40, 40))
    with pytest.raises(ValueError, match=r"position_ids is not supported"):
        model(tokens, position_ids=torch.zeros_like(tokens))


def test_a_model_built_from_a_configuration_can_be_trained(exported: dict[str, Path]) -> None:
    model = MosaForCausalLM(MosaConfig.from_pretrained(exported["pure"]))
    heads = model.model.layers[0].self_attn.mosa_heads
    for weight, bound in (
        (heads.router_weight, 24**-0.5),
        (heads.qkv_weight, 24**-0.5),
        (heads.proj_weight, (24 * 6) ** -0.5),
    ):
        assert 0.9 * bound < weight.abs().max() <= bound
    tokens = torch.randint(300, (2, 40))
    whole, last = model(tokens, labels=tokens), model(tokens, labels=tokens, logits_to_keep=10)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, 30:39].flatten(0, 1), tokens[:, 31:].flatten())
    assert last.logits.shape[1] == 10 and torch.allclose(last.loss, expected)
    labels = tokens.clone()
    labels[0, 5:] = -100
    rows = [
        model(tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=4 + 39).loss for row in (0, 1)
    ]  # as transformers' Trainer does for each of two micro-batches
    assert torch.allclose(sum(rows), model(tokens, labels=labels).loss)
    whole.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_that_does_not_match_is_not_exported(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = export_module.to_transformers
    monkeypatch.setattr(export_module, "to_transformers", lambda *given: right(*given) | {"rotary_base": 501.0})
    with pytest.raises(
        RunError, match=r"the KL divergence of their logits reaches .* must be at most 1e-06; nothing was"
    ):
        export_hf(trained["hybrid"].checkpoint, tmp_path / "out")
    assert file_names(tmp_path) == []
    export_hf(trained["hybrid"].checkpoint, tmp_path / "out", checks_logits=False)
    assert "not checked against the Megatron model (--no-check)" in capsys.readouterr().out


def test_a_full_file_system(trained: dict[str, Trained], tmp_path: Path) -> None:
    export_hf(trained["pure"].checkpoint, tmp_path / "out", checks_logits=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match=r"^could not write to OUT=.*/out: .*; free disk space"):
            export_hf(trained["dense"].checkpoint, tmp_path / "out", checks_logits=False, force=True)
        with pytest.raises(StorageError, match=r"^could not write to OUT=.*/back: .*; free disk space"):
            import_hf(tmp_path / "out", tmp_path / "back")
        for write in (export_state_dict, export_torch_dist):
            with pytest.raises(StorageError, match=r"^could not write to OUT=.*/new: .*; free disk space"):
                write(trained["dense"].checkpoint, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file_names(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_mosa_heads"] == 6  # the old one


def test_damage_is_named_and_the_source_is_unchanged(trained: dict[str, Trained], tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(trained["pure"].checkpoint.parents[1], source)
    state = source / "checkpoints" / "step-00000012" / "state" / "__0_0.distcp"
    content = bytearray(state.read_bytes())
    content[len(content) // 3] ^= 1
    state.write_bytes(content)
    before = hash_files(source, files_below(source))
    with pytest.raises(RunError, match=r"step-00000012' is damaged: state/__0_0.distcp is corrupt"):
        export_hf(source, tmp_path / "out")
    assert file_names(tmp_path) == ["run"] and hash_files(source, files_below(source)) == before


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run ``mosa checkpoint ...`` and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["mosa", "checkpoint", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code  # type: ignore[return-value]


def test_user_errors(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = trained["dense"].checkpoint, tmp_path / "out"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "tokenizer.json").write_text((checkpoint.parents[2] / "data" / "tokenizer.json").read_text() + "\n")
    cases: list[tuple[list[object], str]] = [
        (["export", checkpoint, out, "--to", "gguf"], "--to must be hf, fp32 or torch-dist, got gguf"),
        (["export", checkpoint, out, "--to", "hf", "--dtype", "int8"], "--dtype must be float32 or bfloat16, got int8"),
        (["export", tmp_path / "none", out, "--to", "hf"], "none' does not exist"),
        (["export", checkpoint, checkpoint / "out", "--to", "hf"], "is inside the source"),
        (
            ["export", checkpoint, tmp_path / "precious" / "file" / "b", "--to", "hf"],
            "file' is not a directory; choose a",
        ),
        (
            ["export", checkpoint, tmp_path / "a" / "b", "--to", "hf", "--tokenizer", tmp_path / "no.json"],
            "could not find the model's tokenizer: '",
        ),
        (["export", checkpoint, tmp_path / "precious", "--to", "hf"], "precious already exists; choose another folder"),
        (["export", checkpoint, tmp_path / "precious", "--to", "hf", "--force"], "--force replaces only model folders"),
        (
            ["export", checkpoint, out, "--to", "hf", "--tokenizer", tmp_path / "tokenizer.json"],
            "is not the model's tokenizer: its SHA-256 is",
        ),
        (
            ["export", checkpoint, out, "--to", "hf", "--tokenizer", tmp_path / "no.json"],
            "pass its tokenizer.json: --tokenizer PATH",
        ),
        (["import", checkpoint, out, "--from", "hf"], "is a megatron_mosa checkpoint; pass a Hugging Face"),
    ]
    for words, message in cases:
        assert command(monkeypatch, *words) == 2, words
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1] and lines[-1].startswith("error: "), lines
    assert file_names(tmp_path) == ["precious", "tokenizer.json"] and file_names(tmp_path / "precious") == ["file"]


def test_force_replaces_a_model(
    trained: dict[str, Trained], exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported["pure"], out)
    words = ["export", trained["dense"].checkpoint, out, "--to", "hf", "--no-check"]
    assert command(monkeypatch, *words) == 2
    assert json.loads((out / "config.json").read_text())["num_mosa_heads"] == 6
    assert command(monkeypatch, *words, "--force") == 0
    assert json.loads((out / "config.json").read_text())["num_mosa_heads"] == 0
    assert file_names(tmp_path) == ["out"]
    (out / "notes").mkdir()  # what no conversion has written stays
    assert command(monkeypatch, *words, "--force") == 2
    (tmp_path / "program").mkdir()
    shutil.copy(out / "config.json", tmp_path / "program")
    assert command(monkeypatch, *words[:2], tmp_path / "program", *words[3:], "--force") == 2
    assert (out / "notes").is_dir() and file_names(tmp_path / "program") == ["config.json"]


def test_weights_that_do_not_match_the_configuration(trained: dict[str, Trained], tmp_path: Path) -> None:
    shutil.copytree(trained["dense"].checkpoint, tmp_path / "step-00000012")
    file = tmp_path / "step-00000012" / "metadata.json"
    content = json.loads(file.read_text())
    content["config"]["model"]["num_query_groups"] = 4
    file.write_text(json.dumps(content | {"format_version": 1}))
    message = r"decoder.layers.0.self_attention.dense_heads.qkv_weight is \(64, 24\), expected \(96, 24\)"
    with pytest.raises(UserError, match=message):
        export_hf(tmp_path / "step-00000012", tmp_path / "out")
