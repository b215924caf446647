"""``mosa generate`` and ``mosa cache-report`` on checkpoints give the same results as on an export."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_mosa.__main__ import main
from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM
from tests.conversion.models import Trained


@pytest.fixture
def mosa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run ``mosa WORDS``; return exit code, stdout and stderr, and check that no temporary folder is left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()  # discard the test's own output
        monkeypatch.setattr(sys, "argv", ["mosa", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert not list(temporary.glob("mosa-*"))
        return ended.value.code, printed.out, printed.err  # type: ignore[return-value]

    return call


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "causal"])
def test_a_checkpoint_is_exported_temporarily(
    mosa, trained: dict[str, Trained], causal: Trained, tmp_path: Path, kind: str
) -> None:
    model = causal if kind == "causal" else trained[kind]
    run = model.checkpoint.parents[1]
    export_hf(run, tmp_path / "exported", checks_logits=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported")
    tokens = tokenizer("to export 7", return_tensors="pt").input_ids
    longer = MosaForCausalLM.from_pretrained(tmp_path / "exported").generate(tokens, max_new_tokens=9, do_sample=False)
    expected = tokenizer.decode(longer[0, tokens.shape[1] :], skip_special_tokens=True)
    words = ("--prompt", "to export 7", "--max-new-tokens", 9, "--temperature", 0)
    for path in (run, model.checkpoint, tmp_path / "exported"):
        code, printed, _ = mosa("generate", path, *words)
        assert code == 0 and printed.rstrip("\n") == expected.rstrip("\n")
    code, printed, _ = mosa("cache-report", run, "--lengths", "30,60", "--json", "--dense-heads", 4)
    rows = json.loads(printed)["rows"]
    assert code == 0 and [row["used"]["dense"] for row in rows] == [2 * 2 * 2 * 8 * 4 * length for length in (30, 60)]
    assert all(("mosa" in row["used"]) == (kind == "causal") for row in rows)


def test_user_errors(mosa, trained: dict[str, Trained], tmp_path: Path) -> None:
    with patch("megatron_mosa.tools.decoding.loading.export_hf") as export:  # refused before this, which may take long
        code, _, errors = mosa("generate", trained["hybrid"].checkpoint, "--prompt", "to")
    assert code == 2 and "selects by expert choice (mosa.selection), which looks at the whole sequence" in errors
    export.assert_not_called()
    run = tmp_path / "run"
    shutil.copytree(trained["dense"].checkpoint.parents[1], run)
    metadata = next(run.glob("checkpoints/*/metadata.json"))
    assert "tokenizer.json" not in {path.name for path in run.rglob("*")} and metadata.is_file()
    code, _, errors = mosa("generate", run, "--prompt", "to", "--tokenizer", tmp_path / "none.json")
    assert code == 2 and "could not find the model's tokenizer: '" in errors and "none.json' does not exist" in errors
