"""``mosa bench`` as a user runs it, on a CPU."""

from __future__ import annotations

import json

from tests.integration.conftest import Runner


def test_bench_measures_writes_and_compares(runner: Runner) -> None:
    command = ["bench", runner.config, *runner.overrides, "parallel.tensor_model_parallel_size=1", "--steps", "2"]
    result = runner.folder / "bench" / "now.json"
    done = runner.mosa(*command, "--warmup", "1", "--output", str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TP 1 x DP 1, ZeRO 1, 4 micro-batches of 2 x 64, on cpu" in done.stdout
    found = json.loads(result.read_text())
    assert len(found["milliseconds"]) == 2 and found["tokens_per_step"] == 8 * 64 and found["profile"] is None

    result.write_text(json.dumps(found | {"milliseconds": [time / 100 for time in found["milliseconds"]]}))
    done = runner.mosa(*command, "--compare", str(result))
    assert done.returncode == 1 and "slower: step: " in done.stdout, done.stdout + done.stderr

    result.write_text(json.dumps(found | {"device": "NVIDIA H100"}))
    for words, message in (
        (
            ["--compare", str(result)],
            "was measured with device=NVIDIA H100 (now cpu); compare",
        ),
        (["--compare", runner.config], "not a result of mosa bench --output"),
        (["--steps", "0"], "--steps must be at least 1 and at most 1000000, got 0"),
        (["parallel.tensor_model_parallel_size=2"], "world size 1 is not divisible by"),
    ):
        done = runner.mosa(*command, *words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not done.stdout  # refused before anything is measured
