"""``mosa generate`` and ``mosa cache-report``: their output, and a one-line message for every user error."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mosa.__main__ import main
from megatron_mosa.data import train_tokenizer
from megatron_mosa.data.sources import open_source
from megatron_mosa.errors import UserError
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import CACHE
from megatron_mosa.tools.decoding.cache_report import baseline_heads
from megatron_mosa.tools.decoding.commands import parse_lengths
from megatron_mosa.tools.decoding.generation import _Printer
from megatron_mosa.tools.decoding.loading import read_document
from tests.decode.models import build
from tests.decode.test_generate import by_hand


def write(folder: Path, kind: str = "hybrid", selection: str = "threshold", **changes: object) -> Path:
    """Write an exported model with a tokenizer of single letters."""
    model = build(kind, selection, **changes)
    model.save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({chr(32 + number): number for number in range(95)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    letters.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("exported") / "hybrid")


@pytest.fixture
def mosa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run ``mosa WORDS``; return exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mosa", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err  # type: ignore[return-value]

    return call


@torch.no_grad()
def test_generate_prints_the_models_completion(mosa, folder: Path, tmp_path: Path) -> None:
    prompt = torch.tensor([ord(letter) - 32 for letter in "abc d"])
    expected = "".join(chr(32 + number) for number in by_hand(build("hybrid"), prompt, 9)[5:])
    options = ("--max-new-tokens", 9, "--temperature", 0)
    code, printed, _ = mosa("generate", folder, "--prompt", "abc d", *options)
    assert (code, printed) == (0, expected + "\n")
    (tmp_path / "prompt").write_text("abc d")
    assert mosa("generate", folder, "--prompt-file", tmp_path / "prompt", *options)[1] == expected + "\n"
    few = ("generate", folder, "--prompt", "abc d", "--max-new-tokens", 16, "--seed")
    drawn = [mosa(*few, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    more = mosa("generate", folder, "--prompt", "abc d", "--seed", 1)[1]
    assert len(more) > 100 and more.startswith(drawn[0][1].removesuffix("\n"))


def _llama() -> Tokenizer:
    """Marks the space before a word, falls back to bytes, and drops the text's first space."""
    marked = {piece: 256 + number for number, piece in enumerate(["▁", "▁a", "b", "▁▁▁c", "d\n"])}
    found = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)} | marked, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(parts)
    return found


def _word_pieces() -> Tokenizer:
    found = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "c": 2, "##d": 3}, unk_token="a"))
    found.decoder = decoders.WordPiece()
    return found


@pytest.mark.parametrize("build_tokenizer", [_llama, _word_pieces])
def test_new_text_is_printed_as_it_stands_behind_the_prompt(
    build_tokenizer: Callable[[], Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer())
    draw = random.Random(0)
    common = range(256, 261) if len(tokenizer) > 256 else range(len(tokenizer))
    pieces = [[token] for token in common] + [list("é漢🙂".encode())] * (len(tokenizer) > 256)
    for _ in range(50):
        prompt, new = ([*chain(*draw.choices(pieces, k=count))] for count in (4, 30))
        printer = _Printer(tokenizer)
        printer.put(torch.tensor([prompt]))
        printed = tokenizer.decode(prompt)
        for count, token in enumerate(new, start=1):
            printer.put(torch.tensor([token]))
            printed += capsys.readouterr().out
            if not (whole := tokenizer.decode(prompt + new[:count])).endswith("\ufffd"):
                assert printed == whole
        printer.end()
        assert printed + capsys.readouterr().out == tokenizer.decode(prompt + new) + "\n"


def test_prompts_are_read_like_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a byte-order mark and with the line endings of the file; text that is not UTF-8 is refused."""
    file = tmp_path / "prompt.txt"
    for content in (b"\xef\xbb\xbfa = 1\r\nb = 2\r\n", b"caf\xe9"):
        file.write_bytes(content)
        for path in (file, Path("-")):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), errors="surrogateescape"))
            if content.isascii() or content.startswith(b"\xef"):
                ((expected, _),) = open_source(str(file), "text").read()
                assert read_document("--text", path) == expected
            else:
                with pytest.raises(UserError, match=f"could not read --text={path}: it is not UTF-8 text"):
                    read_document("--text", path)


def test_user_errors_of_generate(mosa, folder: Path, tmp_path: Path) -> None:
    expert = write(tmp_path / "expert", selection="expert_choice")
    routing = write(tmp_path / "routing", num_mosa_heads=0, num_routing_heads=2, routing_clusters=2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    prompt = ("--prompt", "abc")
    cases: list[tuple[list[object], str]] = [
        ([folder], "pass either --prompt TEXT or --prompt-file FILE"),
        ([folder, *prompt, "--prompt-file", "x"], "pass either --prompt TEXT or --prompt-file FILE"),
        ([folder, "--prompt", ""], "--prompt is empty; pass at least one token of text"),
        ([folder, "--prompt-file", tmp_path / "none"], "none: No such file or directory; pass a text file"),
        (
            [folder, *prompt, "--temperature", "-1"],
            "--temperature must be between 0.0001 and 100, or 0 (the most likely token), got -1.0",
        ),
        ([folder, *prompt, "--top-p", "0"], "--top-p must be greater than 0 and at most 1, got 0.0"),
        ([folder, *prompt, "--top-k", "-1"], "--top-k must be between 0 (all tokens) and 2147483647, got -1"),
        ([folder, *prompt, "--max-new-tokens", "0"], "--max-new-tokens must be between 1 and 16777216, got 0"),
        ([folder, *prompt, "--device", "abacus"], "--device=abacus is not available; it must be auto, cpu, or cuda"),
        ([folder, *prompt, "--dtype", "int4"], "--dtype must be one of auto, float32, bfloat16, got int4"),
        ([folder, *prompt, "--tokenizer", "x"], "has its own tokenizer; omit --tokenizer"),
        ([folder, *prompt, "--causal-approximation", "prefix"], "is already causal; omit --causal-approximation"),
        ([expert, *prompt], "expert choice (mosa.selection), which looks at the whole sequence, so no token can be"),
        (
            [routing, *prompt],
            "has Routing heads, which look at the whole sequence, so no token can be decoded before the",
        ),
        ([expert, *prompt, "--causal-approximation", "x"], "--causal-approximation must be prefix, got x"),
        ([other, *prompt], "has model_type=gpt2; pass a folder written by mosa checkpoint export --to hf"),
        ([tmp_path / "nothing", *prompt], "nothing' does not exist"),
    ]
    for words, message in cases:
        code, printed, errors = mosa("generate", *words)
        assert code == 2 and printed == "", words
        assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors, errors
    code, printed, _ = mosa("generate", expert, *prompt, "--causal-approximation", "prefix", "--max-new-tokens", 4)
    assert code == 0 and len(printed) > 1


def test_unset_thresholds_are_refused(mosa, tmp_path: Path) -> None:
    model = build("pure")
    model.model.layers[1].self_attn.mosa_heads.thresholds[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    for words in (["generate", tmp_path / "model", "--prompt", "a"], ["cache-report", tmp_path / "model"]):
        code, _, errors = mosa(*words)
        assert code == 2 and "mosa_heads.thresholds of layers 1 are NaN: they are not calibrated" in errors


def test_a_folder_without_a_tokenizer_takes_a_given_one(mosa, folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    words = ["--prompt", "abc", "--max-new-tokens", "4", "--seed", "1"]
    code, _, errors = mosa("generate", bare, *words)
    assert code == 2 and "has no tokenizer.json; pass the model's: --tokenizer PATH" in errors
    assert mosa("generate", bare, *words, "--tokenizer", folder / "tokenizer.json") == mosa("generate", folder, *words)
    train_tokenizer(["words"], 300).save(str(bare / "larger.json"))
    code, _, errors = mosa("generate", bare, *words, "--tokenizer", bare / "larger.json")
    assert code == 2 and "tokens, but the embedding only" in errors


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(temperature: int, mosa, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "diverged")
    weights = load_file(tmp_path / "diverged" / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, tmp_path / "diverged" / "model.safetensors", metadata={"format": "pt"})
    code, printed, errors = mosa("generate", tmp_path / "diverged", "--prompt", "a", "--temperature", temperature)
    assert code == 1 and printed == "" and errors.count("\n") == 1
    assert "diverged' are not finite: its training diverged, or its weights are damaged; export the" in errors


@torch.no_grad()
def test_the_report_measures_the_cache(mosa, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    code, printed, _ = mosa("cache-report", folder, "--lengths", "100,300,2k", "--json", "--output", output)
    assert code == 0
    content = json.loads(printed)
    assert content == json.loads((output / "cache.json").read_text())
    assert (output / "cache.png").read_bytes().startswith(b"\x89PNG")
    rows = content["rows"]
    assert [row["length"] for row in rows] == [100, 300, 2048] and all(row["exact"] for row in rows)
    # feed the same tokens at once, and count
    model, pair = build("hybrid"), 2 * 8 * 4
    tokens = torch.randint(97, (1, 2048), generator=torch.Generator().manual_seed(0))[:, :300]
    cache = model(tokens, use_cache=True)[CACHE]
    selected = sum(int(layer.mosa.counts.sum()) for layer in cache.layers)
    assert rows[1]["used"] == {"dense": 3 * 2 * 300 * pair, "local": 3 * 2 * 6 * pair, "mosa": selected * pair}
    assert rows[1]["total"] == sum(rows[1]["used"].values()) < rows[1]["allocated"]
    assert rows[1]["selected_share"] == pytest.approx(selected / (3 * 6 * 300))
    heads = int(content["baseline"].split()[0])
    assert rows[1]["dense_baseline"] == 3 * heads * 300 * pair


def test_beyond_exact_up_to_dense_heads_see_less(mosa, folder: Path) -> None:
    words = ("cache-report", folder, "--lengths", "100,3000", "--dense-heads", "5", "--exact-up-to")
    table = mosa(*words, "1500")[1]
    short, long = _rows(table)
    assert (short[0], long[0]) == ("100", "3,000*")
    assert "5 dense heads per layer (--dense-heads), keys and values of every token, computed" in table
    exact = _rows(mosa(*words, "4000")[1])
    assert exact[0] == short and exact[1][0] == "3,000"
    assert exact[1][1] == long[1]  # all keys of dense heads are stored


def _rows(table: str) -> list[list[str]]:
    """Return the cells of the rows that begin with a number of tokens."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
    return [row for row in rows if row and row[0][:1].isdecimal()]


def test_the_baseline_matches_the_paper() -> None:
    """Section 4: 9 dense heads cost as much as 4 dense and 276 MoSA heads of sparsity 32; grouped queries cost less."""
    tiny = {"hidden_size": 512, "head_dim": 64, "num_dense_heads": 4, "num_mosa_heads": 276, "sparsity": 32}
    assert baseline_heads(MosaConfig(**tiny), None) == (9, "equal FLOPs at 1024 tokens")
    assert baseline_heads(MosaConfig(**tiny | {"num_mosa_heads": 300}), None)[0] == 10
    assert baseline_heads(MosaConfig(**tiny), 7) == (7, "--dense-heads")
    grouped = {"num_dense_heads": 16, "num_key_value_heads": 4}
    assert (
        baseline_heads(MosaConfig(hidden_size=512, head_dim=64, **grouped), None)[0] == 13
    )  # grouping saves 3 of 16 heads


def test_user_errors_of_cache_report(mosa, folder: Path, tmp_path: Path) -> None:
    expert = write(tmp_path / "expert", selection="expert_choice")
    routing = write(tmp_path / "routing", num_mosa_heads=0, num_routing_heads=2, routing_clusters=2)
    (tmp_path / "text").write_text("abc")
    cases: list[tuple[list[object], str]] = [
        (
            [folder, "--lengths", "1k,many"],
            "--lengths=1k,many: 'many' is not a number of tokens; use a list such as 1000",
        ),
        ([folder, "--lengths", "0"], "'0' is not a number of tokens"),
        ([folder, "--dense-heads", "0"], "--dense-heads must be at least 1 and at most"),
        (
            [folder, "--text", tmp_path / "text", "--lengths", "4"],
            "has only 3 tokens, but --lengths asks for 4; pass a longer",
        ),
        ([folder, "--text", tmp_path / "none"], "none: No such file or directory; pass a text file"),
        ([expert], "nothing can be cached; pass a model with mosa.selection=threshold"),
        ([routing], "has Routing heads: every token changes the selection, so nothing can be cached; pass a"),
    ]
    for words, message in cases:
        code, printed, errors = mosa("cache-report", *words)
        assert code == 2 and printed == "", words
        assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors, errors
    assert parse_lengths("4k,100, 1K") == [100, 1024, 4096]
