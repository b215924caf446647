"""What people do wrong, over all commands: one line, the right exit code, no traceback, nothing lost.

Each command is a start of the loaded Python, in a directory with a dataset (data), a run (runs/a), an exported model
(hf), and what ``damage`` writes below ``bad``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import Runner
from tests.loaded import loaded_python

RUN = "pretrain CONFIG run.name=new"
CHECK = f"{RUN} --check-only"
BUILD = "data build CONFIG data.path=built"
SUBMIT = "submit CONFIG run.name=new --gpus-per-node 1 --dry-run"
RANKS = "WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511"

GENERATE = "generate --prompt a --max-new-tokens 1 --causal-approximation prefix"
LONG = "a" * 300

GRIDS = "bad/grids"
GRID = {
    "name": "g",
    "base": "config.yaml",
    "sizes": {"mini": {"model.num_layers": 1}},
    "corpora": {"c": {"data.path": "data"}},
    "members": {"dense": {"kind": "dense"}},
}
# by name: what is changed in GRID, and words of the answer
BAD_GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"members": {"dense": {"kind": ["dense"]}}}, "members.dense.kind must be one of"),
    "sparsity": (
        {"members": {"dense": {"kind": "dense"}, "t": {"kind": "threshold", "sparsity": []}}},
        "members.t.sparsity is missing",
    ),
    "rates": ({"learning_rates": [10**400]}, "learning_rates must be different numbers of at least 1e-12"),
    "rate": ({"learning_rates": [0]}, "learning_rates must be different numbers of at least 1e-12"),
    "passes": ({"passes": 10**400}, "passes must be a number above 0 and at most"),
    "samples": ({"evaluate": {"samples": 10**30}}, "evaluate.samples must be"),
    "decode": ({"evaluate": {"decode": [10**30]}}, "evaluate.decode must be"),
    "seeds": ({"seeds": [10**30]}, "seeds must be different integers"),
    "relative": ({"relative_to": {"a": 1}}, "relative_to must be one of dense"),
    "long": ({"name": "g" * 300}, "name must be a name of at most 64 letters"),
    "unicode": ({"name": "größe"}, "name must be a name of at most 64 letters"),
    "tune": (
        {"members": {"dense": {"kind": "dense"}, "t": {"kind": "threshold", "sparsity": 8, "tune_at": [4]}}},
        "members.t.tune_at must be a sparsity of this member",
    ),
    "source": (
        {"members": {"dense": {"kind": "dense", "learning_rate_of": ["dense"]}}},
        "members.dense.learning_rate_of must be a member with learning_rates",
    ),
    "both": (
        {"members": {"dense": {"kind": "dense", "learning_rate_of": "dense", "learning_rates": [0.1]}}},
        "stands in place of learning_rates",
    ),
    "itself": (
        {"learning_rates": [0.1], "members": {"dense": {"kind": "dense", "learning_rate_of": "dense"}}},
        "learning_rate_of must be a member with learning_rates",
    ),
    "equal": (
        {"members": {"dense": {"kind": "dense"}, "t": {"kind": "threshold", "sparsity": [8, 8.0]}}},
        "members.t.sparsity must be different numbers",
    ),
    "twice": ({"evaluate": {"decode": [1, 1]}}, "evaluate.decode must be different integers"),
    "home": ({"base": "~nobody9/x"}, "base=~nobody9/x refers to the home directory of an unknown user"),
    "nul": ({"base": "a\0b"}, "base must be a configuration's file"),
    "folder": ({"base": "data"}, "configuration file 'data' is a directory"),
}
# by name: the value of base, and words of the answer
BAD_BASES = {
    "itself": ("itself.yaml", "is based on this file itself"),
    "circle": ("circle2.yaml", "base=circle.yaml is based on this file itself"),
    "circle2": ("circle.yaml", "base=circle2.yaml is based on this file itself"),
    "nothing": ("none.yaml", "nothing.yaml: base=none.yaml: configuration file"),
    "folder": ("..", "is a directory"),
    "link": ("../loop", "does not exist"),
    "nul": ("a\0b", "base must be the path of another YAML file"),
    "list": (["a"], "base must be the path of another YAML file"),
    "zero": ("/dev/zero", "is not a regular file"),
    "chain": ("chain20.yaml", "is file 21 of a chain; the most are 20"),
}

ROW = {
    "cell": "a", "size": "s", "corpus": "c", "member": "m", "kind": "dense", "sparsity": None, "heads": 1,
    "dense_heads": 1, "heads_given": True, "seed": 1, "learning_rate": 0.1, "status": "done", "causal": True,
    "equal": "paper_flops", "relative_to": "m", "budget_share": 1.0, "paper_flops": 1, "executed_flops": 1,
    "parameters": 1, "kv_bytes_8k": 1, "steps": 1, "tokens": 1, "loss": 1.0, "perplexity": 2.7,
}  # fmt: skip
# by name: content of a grid's results.jsonl, and words of the answer
BAD_RESULTS = {
    "empty": ("", "results.jsonl is empty"),
    "nested": ("[" * 100_000, "line 1 is not a result of mosa isoflop run: it is nested too deeply"),
    "list": ("[]", "it is not a JSON object"),
    "short": ("{}", "it has no cell"),
    "type": (json.dumps(ROW | {"loss": "low"}), "loss has a value of another type"),
    "mapping": (json.dumps(ROW | {"decode_ms": 3}), "decode_ms has a value of another type"),
    "huge": (json.dumps(ROW | {"sparsity": 10**30}), "sparsity has a value of another type"),
    "nul": (json.dumps(ROW | {"device": "a\0b"}), "device has a value of another type"),
    "place": (json.dumps(ROW | {"size": "../../s"}), "size is not a name"),
    "budget": (json.dumps(ROW | {"equal": "x"}), "equal is not one of paper_flops"),
    "half": (json.dumps(ROW | {"perplexity": None}), "a loss without a perplexity"),
    "batches": (json.dumps(ROW | {"decode_ms": {"a": 1}}), "decode_ms has a key that is not a number"),
    "empty_cell": (json.dumps(ROW | {"not_measured": {"a": "b"}}), "not_measured has the unknown key a"),
    "infinite": (json.dumps(ROW) + "\n" + json.dumps(ROW | {"loss": math.inf}), "line 2 is not a result"),
}

# by name: a value with a tag or of a size that does not fit it, and words of the answer
BAD_TAGS = {
    "date": ("!!timestamp x", "is not valid YAML"),
    "bool": ("!!bool x", "is not valid YAML"),
    "large": (f"0x{'f' * 5000}", "train.steps must be of type int, got a number of thousands of digits"),
}
# by name: a key of a Hugging Face folder's config.json, its value, and words of the answer
BAD_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "base": ({"rotary_base": ["x"]}, "rotary_base has a value of another type"),
    "zero": ({"rotary_base": 0}, "rotary_base must be"),
    "epsilon": ({"norm_eps": None}, "norm_eps has a value of another type"),
    "vocabulary": ({"vocab_size": {}}, "vocab_size has a value of another type"),
    "end": ({"eos_token_id": "x"}, "eos_token_id must be a token from 0 to"),
    "length": ({"max_position_embeddings": []}, "max_position_embeddings has a value of another type"),
    "gate": ({"attention_gate": True}, "does not match the model described in its config.json"),
    "heads": ({"num_mosa_heads": 3}, "does not match the model described in its config.json"),
}
# by name: a section and key of the configuration in a checkpoint's metadata.json, its value, and words of the answer
BAD_METADATA: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "section": (("model",), 3, "config.model: it is not a JSON object"),
    "missing": (("mosa",), {}, "config.mosa has no num_heads"),
    "type": (("mosa", "selection"), {"a": 1}, "selection has a value of another type"),
    "layers": (("model", "num_layers"), "two", "num_layers has a value of another type"),
    "seed": (("run",), {"name": "a"}, "config.run has no seed"),
}
# by name: content of a run's metrics.jsonl
BAD_JOURNALS = {
    "tokens": '{"step": 1, "loss": 1.0}',
    "digits": f'{{"step": 1, "tokens": 1, "loss": {"9" * 400}}}',
    "steps": f'{{"step": {10**30}, "tokens": 1, "loss": 1.0}}',
    "slow": '{"step": 1, "tokens": 1, "loss": 1.0, "tokens_per_second": 1e-300}',
}
# by name: what is changed in a result of mosa bench, and words of the answer
BAD_BENCHES: dict[str, tuple[dict[str, Any], str]] = {
    "profile": ({"profile": {"kinds": 3}}, "kinds has a value of another type"),
    "keys": ({"profile": {"kinds": {}}}, "profile has no busy"),
    "times": ({"milliseconds": []}, "milliseconds has no times"),
    "none": ({"milliseconds": [0.0]}, "milliseconds has no times"),
    "rules": ({"flops_per_step": {}}, "flops_per_step has no executed"),
    "peak": ({"peak_flops": 0.0}, "peak_flops is not above 0"),
}
BENCH = {
    "name": "a", "layout": "", "device": "cpu", "versions": {}, "acceleration": "", "milliseconds": [1.0],
    "tokens_per_step": 1, "flops_per_step": {"executed": 1.0, "usual": 1.0}, "peak_flops": 1.0, "parameters": 1,
    "allocated_gib": 1.0, "reserved_gib": 0.0, "seconds_to_build": 1.0, "seconds_of_first_steps": [], "losses": [1.0],
}  # fmt: skip

# (command, exit code, words of its line): environment variables may precede the command.
MISUSES: list[tuple[str, int, str]] = [
    # The command line
    ("", 2, ""),
    ("foo", 2, "No such command 'foo'"),
    ("data bild", 2, "Did you mean 'build'"),
    ("--foo", 2, "No such option: --foo"),
    ("pretrain", 2, "Missing argument 'config'"),
    ("status", 2, "Missing argument 'RUN'"),
    ("checkpoint export runs/a", 2, "Missing argument 'OUT'"),
    ("checkpoint export runs/a out", 2, "Missing option '--to'"),
    ("evaluate runs/a --samples x", 2, "--samples must be a whole number, got 'x'; see mosa evaluate --help"),
    ("evaluate runs/a --samples 1", 2, "--samples must be at least 2"),
    ("status runs/a --interval 0", 2, "--interval must be at least 0.1"),
    ("status runs/a --interval ''", 2, "--interval must be a number, got ''"),
    ("isoflop run --jobs", 2, "requires an argument; see mosa isoflop run --help"),
    ("COLUMNS=99999999999999999999 status none", 2, "none"),
    ("config diff configs/quickstart.yaml", 2, "Missing argument 'B'"),
    ("data sample CONFIG x", 2, "N must be a whole number, got 'x'; see mosa data sample --help"),
    # Configuration files
    ("config show none.yaml", 2, "'none.yaml' does not exist"),
    ("config show bad", 2, "'bad' is a directory"),
    ("config show bad/binary.yaml", 2, "is not valid YAML"),
    ("config show bad/list.yaml", 2, "must hold keys"),
    ("config show bad/empty.yaml", 2, "run.name is missing"),
    ("config show bad/twice.yaml", 2, "is not valid YAML"),
    ("config show bad/bomb.yaml", 2, "is not valid YAML"),
    ("config show /dev/zero", 2, "is not a regular file"),
    ("config show bad/itself.yaml", 2, "line 1 contains an alias of itself"),
    (f"config show {LONG}", 2, "File name too long"),
    *[(f"config show bad/tags/{name}.yaml", 2, words) for name, (_, words) in BAD_TAGS.items()],
    ("config list none", 2, "'none' is not a directory"),
    ("config diff CONFIG none.yaml", 2, "'none.yaml' does not exist"),
    ("config show CONFIG train.steps", 2, "not of the form section.key=value"),
    ("config show CONFIG steps=1", 2, "not of the form section.key=value"),
    ("config show CONFIG train.step=1", 2, "did you mean 'steps'"),
    ("config show CONFIG trian.steps=1", 2, "did you mean 'train'"),
    ("config show CONFIG train.steps=[", 2, "the value is not valid YAML"),
    ("config show CONFIG train.steps=ten", 2, "train.steps must be of type int, got 'ten'"),
    ("config show CONFIG train.steps=1e3", 2, "train.steps must be of type int"),
    ("config show CONFIG train.steps=null", 2, "train.steps must be of type int, got None"),
    ("config show CONFIG run.name=../x", 2, "run.name must contain only"),
    ("config show CONFIG run.name=", 2, "run.name must contain only"),
    ("config show CONFIG 'data.sources=[]'", 2, "data.sources is empty"),
    ("config show CONFIG data.path=null", 2, "data.path is missing"),
    ("config show CONFIG data.path=~nobody9/x", 2, "unknown user"),
    ("config show CONFIG train.steps=010", 2, "override 'train.steps=010': 010 has a leading zero or colons"),
    ("config show CONFIG resilience.hang_timeout=1:30.5", 2, "1:30.5 has a leading zero or colons, so YAML takes it"),
    ("config show CONFIG data.path=???", 2, "override 'data.path=???': ??? marks a missing value; give one"),
    ("config show CONFIG train.steps=???", 2, "override 'train.steps=???': ??? marks a missing value; give one"),
    ("config show CONFIG train.steps=1,000", 2, "got '1,000'; a number has no commas between thousands, write 1000"),
    ("config show CONFIG train.skip_steps=[1:30]", 2, "1:30 has a leading zero or colons, so YAML takes it for"),
    (f"{BUILD} data.sources=[~nobody9/x]", 2, "data.sources=~nobody9/x refers to the home"),
    (f"{BUILD} data.tokenizer=~nobody9/x", 2, "data.tokenizer=~nobody9/x refers to the home directory of an"),
    (f"{CHECK} data.path=null 'data.blend=[1 ~nobody9/x]'", 2, "data.blend=~nobody9/x refers to the home directory"),
    (f"{CHECK} data.path=null 'data.blend=[1 none]'", 2, "data.blend=none does not exist; build it with"),
    ("config show CONFIG 'data.blend=[1 data]'", 2, "are both given"),
    ("config show CONFIG data.path=null 'data.blend=[much data]'", 2, "data.blend"),
    # Values
    *[
        (f"config show CONFIG {override}", 2, words)
        for override, words in {
            f"run.name={LONG}": "run.name must have at most 200 characters",
            "train.skip_steps=[0]": "train.skip_steps must be at least 1",
            "resilience.hang_timeout=1e300": "resilience.hang_timeout must be at least 0 and at most",
            "resilience.rendezvous_timeout=1e300": "resilience.rendezvous_timeout must be",
            "mosa.sparsity=1e300": "mosa.sparsity must be at least 1 and at most",
            "run.seed=-1": "run.seed must be at least 0",
            "run.seed=4294967296": "at most 4294967295",
            "model.num_layers=0": "model.num_layers must be at least 1",
            "model.num_layers=1000000000": "at most 10000",
            "model.hidden_size=1000000000000": "model.hidden_size must be",
            "model.hidden_size=10000000": "at most 1048576",
            "model.head_dim=7": "model.head_dim must be even",
            "model.num_dense_heads=-1": "model.num_dense_heads must be at least 0",
            "model.num_query_groups=3": "does not divide",
            "model.activation=relu": "must be one of gelu, swiglu",
            "model.normalization=layernorm": "did you mean 'LayerNorm'",
            "model.rotary_percent=2": "at most 1",
            "model.layernorm_epsilon=0": "greater than 0",
            "model.local_window=8": "no local heads",
            "mosa.num_heads=1000000": "at most 65536",
            "mosa.sparsity=0.5": "mosa.sparsity must be at least 1",
            "mosa.sparsity=.inf": "finite number",
            "mosa.selection=topk": "must be one of expert_choice, threshold",
            "mosa.backend=cuda": "must be one of auto, naive, triton",
            "parallel.tensor_model_parallel_size=0": "at least 1",
            "parallel.tensor_model_parallel_size=4": "is not divisible",
            "parallel.zero_stage=4": "must be one of 0, 1, 2, 3",
            "parallel.pipeline_model_parallel_size=2": "pipeline parallelism is not implemented",
            "parallel.context_parallel_size=2": "context parallelism is not implemented",
            "data.sequence_length=1": "at least 2",
            "data.sequence_length=100000000000": "at most 16777216",
            "data.num_workers=100000": "at most 256",
            "data.num_workers=-1": "at least 0",
            "data.validation_fraction=0": "greater than 0",
            "data.validation_fraction=1": "less than 1",
            "data.index_samples=0": "at least 1",
            "train.steps=0": "train.steps must be at least 1",
            "train.steps=10000000000": "at most 1000000000",
            "train.micro_batch_size=3": "must be divisible by train.micro_batch_size=3",
            "train.global_batch_size=0": "at least 1",
            "train.precision=fp16": "must be one of fp32, bf16",
            "train.recompute=yes": "must be one of none, attention, full",
            "'train.profile_steps=[11]'": "train.profile_steps must be at most",
            "optimizer.learning_rate=0": "greater than 0",
            "optimizer.learning_rate=.nan": "must be greater than 0",
            "optimizer.min_learning_rate=1": "exceeds optimizer.learning_rate",
            "optimizer.beta1=1": "less than 1",
            "optimizer.warmup_steps=-1": "at least 0",
            "optimizer.schedule=cos": "did you mean 'cosine'",
            "validation.interval=0": "at least 1",
            "checkpoint.keep_last=0": "at least 1",
            "checkpoint.resume=yes": "must be one of auto, never",
            "resilience.on_spike=stop": "must be one of log, rewind",
            "fault_injection.fault=fire": "must be one of null, kill",
            "logging.interval=0": "at least 1",
            "logging.peak_tflops=-1": "greater than 0",
        }.items()
    ],
    # Runs
    (f"{RUN} --world-size 2", 2, "needs --check-only"),
    (f"{CHECK} --world-size 0", 2, "--world-size must be at least 1"),
    (f"{CHECK} --world-size 3 parallel.tensor_model_parallel_size=2", 2, "world size 3 is not divisible"),
    (f"{CHECK} optimizer.warmup_steps=11", 2, "optimizer.warmup_steps must be at most train.steps=10"),
    (f"{CHECK} train.stop_after_step=11", 2, "train.stop_after_step must be at most train.steps=10"),
    (f"{CHECK} train.steps=1000000000", 2, "but one shuffled pass holds at most"),
    (f"{CHECK} model.hidden_size=1000000 model.ffn_hidden_size=4000000", 2, "but this machine has"),
    (f"{RUN} model.hidden_size=1000000 model.ffn_hidden_size=4000000", 2, "but this machine has"),
    (f"{CHECK} train.micro_batch_size=16777216 train.global_batch_size=16777216", 2, "have logits of"),
    ("pretrain CONFIG run.name=odd --check-only", 2, "metrics.jsonl is not a file"),
    (f"{CHECK} data.path=none", 2, "data.path=none does not exist; build it with"),
    (f"{CHECK} data.path=bad", 2, "is not a dataset"),
    (f"{RUN} data.path=bad/data", 2, "is damaged"),
    (f"{CHECK} data.sequence_length=1048576", 2, "data.sequence_length must be at most"),
    (f"{CHECK} data.tokenizer=gpt2", 2, "was built with another tokenizer"),
    (f"{CHECK} run.directory=texts.jsonl", 2, "is not a directory"),
    (f"{CHECK} run.directory=/dev/null/x", 2, "cannot be written"),
    (f"{CHECK} run.directory=/proc/x", 2, "no file can be created in '/proc'"),
    (f"{CHECK} run.directory={LONG}", 2, "File name too long"),
    ("pretrain CONFIG run.name=a --check-only checkpoint.resume=never", 2, "already holds a run"),
    ("pretrain CONFIG run.name=a --check-only model.num_layers=3", 2, "model.num_layers"),
    ("pretrain CONFIG run.name=a --check-only data.index_samples=5", 2, "would reshuffle its data"),
    ("pretrain CONFIG run.name=file --check-only", 2, "checkpoints is not a directory"),
    (f"{CHECK} checkpoint.initialize_from=none", 2, "'none' does not exist"),
    (f"{CHECK} checkpoint.initialize_from=bad", 2, "does not contain a model"),
    (f"{CHECK} train.apex=always", 2, "needs a GPU"),
    (f"{CHECK} mosa.backend=triton", 2, "does not run here"),
    (f"MOSA_BACKEND=cuda {CHECK}", 2, "MOSA_BACKEND=cuda"),
    (f"RANK=0 {RUN}", 2, "RANK is set, but WORLD_SIZE and LOCAL_RANK not"),
    (f"WORLD_SIZE=2 {RUN}", 2, "WORLD_SIZE is set, but RANK and LOCAL_RANK not"),
    (f"{RANKS} RANK=2 LOCAL_RANK=0 {RUN}", 2, "RANK in the environment must be a whole number between 0 and 1"),
    (f"{RANKS} RANK=x LOCAL_RANK=0 {RUN}", 2, "got 'x'"),
    (f"{RANKS} RANK=0 LOCAL_RANK=x {RUN}", 2, "LOCAL_RANK in the environment"),
    (f"{RANKS} RANK=0 LOCAL_RANK=0 MASTER_PORT=0 {RUN}", 2, "MASTER_PORT in the environment must be"),
    (f"{RANKS} RANK=0 LOCAL_RANK=0 MASTER_PORT=http {RUN}", 2, "got 'http'"),
    (f"{RANKS} RANK=0 LOCAL_RANK=0 MASTER_ADDR= {RUN}", 2, "MASTER_ADDR must be"),
    (f"{RANKS} RANK=0 LOCAL_RANK=0 'MASTER_ADDR=a b' {RUN}", 2, "MASTER_ADDR in the environment must be a name"),
    ("SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=2 " + RUN, 2, "SLURM_PROCID in the environment"),
    # Datasets
    (f"{BUILD}1 data.sources=[none.txt]", 2, "none.txt"),
    (f"{BUILD}2 data.sources=[bad/empty.txt]", 2, ""),
    (f"{BUILD}3 data.sources=[bad/latin.txt]", 2, ""),
    (f"{BUILD}4 data.sources=[bad/broken.jsonl]", 2, "broken.jsonl"),
    (f"{BUILD}5 data.sources=[bad/broken.parquet]", 2, "broken.parquet"),
    (f"{BUILD}6 data.sources=[bad/numbers.jsonl]", 2, "text"),
    (f"{BUILD}7 data.sources=[texts.jsonl] data.text_field=body", 2, "body"),
    (f"{BUILD}8 data.sources=[texts.jsonl] data.vocab_size=10", 2, "data.vocab_size must be at least 257"),
    (f"{BUILD}9 data.sources=[texts.jsonl] data.tokenizer=none.json", 2, "none.json"),
    (f"{BUILD}10 data.sources=[texts.jsonl] data.tokenizer=bad/tokenizer.json", 2, "tokenizer.json"),
    (f"{BUILD}11 data.sources=[/dev/zero]", 2, "/dev/zero"),
    (f"{BUILD}12 data.sources=[bad/saved]", 2, "save_to_disk"),
    ("data build CONFIG data.vocab_size=500 data.sources=[texts.jsonl]", 2, "was built from"),
    ("data build CONFIG data.path=bad data.sources=[texts.jsonl]", 2, "bad"),
    ("data build CONFIG data.path=texts.jsonl data.sources=[texts.jsonl]", 2, "texts.jsonl"),
    ("data build CONFIG data.path=data/inner data.sources=[texts.jsonl]", 2, "is inside the dataset"),
    ("data build CONFIG data.path=/ --force data.sources=[texts.jsonl]", 2, "is the root directory"),
    ("data build CONFIG data.path=bad/loop/x data.sources=[texts.jsonl]", 2, "Too many levels of symbolic links"),
    ("data build CONFIG data.path=/proc/x data.sources=[texts.jsonl]", 2, "/proc"),
    ("data build CONFIG data.path=/proc data.sources=[texts.jsonl]", 2, "is a mount point"),
    ("data inspect none", 2, "'none' does not exist"),
    ("data inspect bad", 2, "is not a dataset"),
    ("data inspect bad/data train.steps=1", 2, "overrides such as train.steps=1"),
    ("data verify bad/data", 1, "is damaged"),
    ("data verify bad/nested_data", 1, "it is nested too deeply"),
    ("data verify none", 2, "'none' does not exist"),
    ("data sample CONFIG 100000", 2, "sample must be 0 to 79"),
    ("data index CONFIG data.path=none", 2, "does not exist"),
    ("data index CONFIG data.index_path=/proc/x", 2, "could not write the sample index"),
    ("data index CONFIG data.index_path=texts.jsonl", 2, "is not a directory"),
    ("data index CONFIG train.steps=1000000000", 2, "but one shuffled pass holds at most"),
    # Checkpoints
    ("checkpoint inspect none", 2, "'none' does not exist"),
    ("checkpoint inspect bad", 2, "does not contain a model"),
    ("checkpoint inspect runs", 2, "does not contain a model"),
    ("checkpoint inspect bad/truncated", 1, "is damaged"),
    ("checkpoint inspect bad/metadata", 1, "damaged"),
    ("checkpoint inspect bad/index", 1, "damaged"),
    ("checkpoint inspect bad/hf", 1, "damaged"),
    ("checkpoint inspect bad/nested", 1, "it is nested too deeply"),
    ("checkpoint inspect bad/manifest", 1, "manifest.json is damaged"),
    ("checkpoint inspect bad/piped", 1, "manifest.json cannot be read (Not a regular file)"),
    ("checkpoint inspect bad/unlisted", 1, "it lists no tensors in weight_map"),
    (f"checkpoint inspect {LONG}", 2, "File name too long"),
    ("checkpoint export bad/truncated out --to hf", 1, "damaged"),
    ("checkpoint export runs/a out --to onnx", 2, "--to must be hf, fp32 or torch-dist, got onnx"),
    ("checkpoint export runs/a out --to hf --dtype float16", 2, "float16"),
    ("checkpoint export runs/a out --to fp32 --no-check", 2, "apply only to --to hf"),
    ("checkpoint export runs/a hf --to hf", 2, "already exists"),
    ("checkpoint export runs/a runs/a/checkpoints/step-00000010/out --to hf", 2, "inside the source"),
    ("checkpoint export runs/a texts.jsonl/out --to hf", 2, "is not a directory"),
    ("checkpoint export runs/a bad --to hf --force", 2, "is not a model folder"),
    ("checkpoint export runs/a out --to torch-dist", 2, "dense"),
    ("checkpoint export runs/a out --to hf --tokenizer none.json", 2, "none.json"),
    ("checkpoint import hf out --from gguf", 2, "--from must be"),
    ("checkpoint import none out --from hf", 2, "does not exist"),
    ("checkpoint import bad/hf out --from hf", 1, "damaged"),
    ("checkpoint import texts.jsonl out.safetensors --from mosa-pytorch", 1, "cannot be read as tensors"),
    ("checkpoint reshard runs/a out --tensor-parallel 4", 2, "divi"),
    ("checkpoint reshard runs/a out --tensor-parallel 0", 2, "--tensor-parallel must be at least 1"),
    ("checkpoint causalize hf out", 2, "pass a megatron_mosa checkpoint"),
    ("checkpoint causalize runs/a out --data none", 2, "none"),
    ("checkpoint verify runs/a none", 2, "does not exist"),
    ("checkpoint verify runs/a hf --tolerance -1", 2, "tolerance"),
    *[(f"checkpoint inspect bad/described/{name}", 1, words) for name, (_, _, words) in BAD_METADATA.items()],
    ("checkpoint inspect bad/pipes", 1, "cannot be read (Not a regular file)"),
    ("checkpoint inspect bad/models/architectures", 0, ""),
    # Evaluation and decoding
    ("evaluate none", 2, "'none' does not exist"),
    ("evaluate runs/a --device tpu", 2, "--device must be cpu"),
    ("evaluate runs/a --dtype int8", 2, "--dtype must be float32 or bfloat16"),
    ("evaluate runs/a --lengths 1,2", 2, "--lengths must be"),
    ("evaluate hf", 2, "does not record its dataset"),
    ("evaluate bad/truncated", 1, "damaged"),
    ("evaluate runs/a --data bad", 2, "is not a dataset"),
    ("evaluate runs/a --output bad", 2, "--output=bad is a directory"),
    ("evaluate runs/a --output texts.jsonl/x.json", 2, "--output=texts.jsonl/x.json"),
    ("generate hf", 2, "pass either --prompt TEXT or --prompt-file FILE"),
    ("generate hf --prompt ''", 2, "--prompt is empty"),
    ("generate hf --prompt-file none.txt", 2, "could not read --prompt-file=none.txt"),
    ("generate hf --prompt-file /dev/zero", 2, "--prompt-file=/dev/zero is not a file"),
    ("generate hf --prompt-file pipe", 2, "--prompt-file=pipe is not a file"),
    ("generate hf --prompt a --device meta", 2, "--device=meta is not available"),
    ("generate hf --prompt a --temperature 1e300", 2, "--temperature must be"),
    ("generate hf --prompt a --temperature nan", 2, "--temperature must be"),
    ("generate hf --prompt a --seed -1", 2, "--seed must be between"),
    ("generate hf --prompt a --seed 99999999999999999999", 2, "--seed must be between"),
    ("generate hf --prompt a --top-p 0", 2, "--top-p must be"),
    ("generate hf --prompt a --top-k 99999999999", 2, "--top-k must be"),
    ("generate hf --prompt a --max-new-tokens 0", 2, "--max-new-tokens must be"),
    ("generate hf --prompt a --dtype fp8", 2, "--dtype must be one of"),
    ("generate hf --prompt a --device cuda", 2, "--device=cuda is not available"),
    ("generate none --prompt a", 2, "'none' does not exist"),
    ("generate hf --prompt a", 2, ""),
    ("generate bad/hf --prompt a --causal-approximation prefix", 1, "damaged"),
    ("generate bad/unlisted --prompt a --causal-approximation prefix", 1, "it lists no tensors in weight_map"),
    ("generate bad/unset --prompt a", 1, "'bad/unset' is damaged: config.json is damaged"),
    ("generate bad/words --prompt a --causal-approximation prefix", 1, "tokenizer.json"),
    *[(f"{GENERATE} bad/models/{name}", 1, words) for name, (_, words) in BAD_MODELS.items()],
    (f"{GENERATE} bad/models/tokenizer", 1, "tokenizer.json' is damaged"),
    (f"{GENERATE} bad/pipes", 1, "cannot be read (Not a regular file)"),
    ("checkpoint import bad/models/activation out --from hf", 2, "a value has another type"),
    ("cache-report none", 2, "'none' does not exist"),
    ("cache-report hf", 2, "nothing can be cached"),
    ("cache-report hf --lengths x", 2, "--lengths"),
    ("cache-report hf --lengths 99999999999k", 2, "the longest may be"),
    ("cache-report hf --output texts.jsonl/report", 2, "--output=texts.jsonl/report"),
    ("decode-bench none", 2, "'none' does not exist"),
    ("decode-bench hf", 2, "nothing can be cached"),
    ("decode-bench hf --batch 0", 2, "--batch must be numbers of sequences from 1 to"),
    ("decode-bench hf --context 1k,2k", 2, "--context must be one number of tokens"),
    ("decode-bench hf --steps 0", 2, "--steps must be"),
    ("decode-bench hf --output texts.jsonl/x.json", 2, "--output=texts.jsonl/x.json"),
    # Measurements
    ("bench CONFIG --steps 0", 2, "--steps must be"),
    ("bench CONFIG --warmup 0", 2, "--warmup must be"),
    ("bench CONFIG --steps 99999999999", 2, "at most 1000000"),
    ("bench CONFIG --compare none.json", 2, "none.json"),
    *[(f"bench CONFIG --compare bad/bench/{name}.json", 2, words) for name, (_, words) in BAD_BENCHES.items()],
    ("bench CONFIG --output texts.jsonl/x.json", 2, "--output=texts.jsonl/x.json"),
    ("isoflop CONFIG --sparsity two", 2, "'two' is not a number"),
    ("isoflop CONFIG mosa.num_heads=0 --sparsity 0", 2, "sparsity"),
    ("isoflop CONFIG --dense-heads -1", 2, "dense"),
    ("sweep CONFIG --steps 0", 2, "--steps must be at least 1"),
    ("sweep CONFIG --processes 0", 2, "--processes must be at least 1"),
    ("sweep CONFIG --steps 100000000000000000000", 2, "--steps must be at least 1 and at most 1000000"),
    ("sweep CONFIG --processes 100000000", 2, "--processes must be at least 1 and at most 100000"),
    ("sweep CONFIG --processes 1,1000000000000", 2, "--processes must be at least 1 and at most 100000"),
    ("sweep CONFIG --memory nan", 2, "--memory must be greater than 0 and at most"),
    ("sweep CONFIG --time-limit inf", 2, "--time-limit must be greater than 0 and at most"),
    ("sweep CONFIG --layout tp=100000000000000000000", 2, "tp must be at least 1 and at most 100000"),
    ("sweep CONFIG --layout processes=100000000", 2, "processes must be at least 1 and at most 100000"),
    ("sweep CONFIG --slurm --gpus-per-node 100000000", 2, "--gpus-per-node must be at least 0 and at most 1024"),
    ("sweep CONFIG --slurm --gpus-per-node 1 --sbatch-argument --nodes=3", 2, "follows from the number of processes"),
    ("isoflop run none.yaml --jobs 100000000", 2, "--jobs must be at least 1 and at most"),
    ("isoflop run none.yaml --measure --steps 100000000000", 2, "--steps must be at least 1 and at most"),
    ("isoflop run none.yaml --slurm --gpus-per-node 1 --partition 'a b'", 2, "--partition must be"),
    ("isoflop CONFIG --dense-heads 100000000000", 2, "--dense-heads must be at least 0 and at most"),
    ("isoflop CONFIG mosa.num_heads=0 --sparsity 1e400", 2, "sparsity"),
    ("evaluate runs/a --samples 100000000000000000000", 2, "--samples must be at least 2 and at most"),
    ("evaluate runs/a --lengths 2,99999999999", 2, "--lengths must be"),
    ("status runs/a --interval nan", 2, "--interval must be"),
    ("generate none --prompt a --max-new-tokens 100000000000000000000", 2, "--max-new-tokens must be"),
    ("cache-report none --exact-up-to 100000000000", 2, "--exact-up-to must be"),
    ("data sample CONFIG 100000000000000000000", 2, "N must be at least 0 and at most"),
    ("checkpoint reshard runs/a out --tensor-parallel 100000000", 2, "--tensor-parallel must be"),
    ("checkpoint causalize runs/a out --load-feedback nan", 2, "--load-feedback must be"),
    ("checkpoint causalize runs/a out --samples 100000000000", 2, "--samples must be"),
    ("checkpoint verify runs/a hf --tolerance inf", 2, "--tolerance must be"),
    ("checkpoint import hf out --from hf --add-mosa-heads 100000000", 2, "--add-mosa-heads must be"),
    ("checkpoint import hf out --from hf --prefix a.", 2, "--prefix apply only to --from mosa-pytorch, got --from hf"),
    ("checkpoint import a out --from mosa-pytorch --add-mosa-heads 8", 2, "--add-mosa-heads applies only to --from hf"),
    (
        "checkpoint import hf out --from hf --sparsity 8",
        2,
        "--sparsity=8 applies only with --add-mosa-heads; add",
    ),
    (f"{CHECK} --world-size 100000000", 2, "--world-size must be"),
    ("sweep CONFIG --layout tp=x", 2, "tp"),
    ("sweep CONFIG --layout pp=2", 2, "pp"),
    ("bench CONFIG --output /proc/x.json", 2, "no file can be created in '/proc'"),
    (f"isoflop run {GRIDS}/good.yaml --steps 3", 2, "--steps=3 is for what is measured; give --measure"),
    (f"isoflop run {GRIDS}/good.yaml --output texts.jsonl", 2, "--output=texts.jsonl is a file"),
    ("isoflop run /dev/zero", 2, "grid '/dev/zero' is not a regular file"),
    ("isoflop run data", 2, "grid 'data' is a directory"),
    ("isoflop run bad/bomb.yaml", 2, "its aliases expand to more than"),
    ("isoflop run CONFIG", 2, "is not a grid: it has no members"),
    *[(f"isoflop run {GRIDS}/{name}.yaml --dry-run", 2, words) for name, (_, words) in BAD_GRIDS.items()],
    *[(f"config show bad/bases/{name}.yaml", 2, words) for name, (_, words) in BAD_BASES.items()],
    ("sweep CONFIG --processes ''", 2, "--processes=: '' is not an integer"),
    ("config show CONFIG data.path=", 2, "data.path is empty"),
    (f"config show CONFIG optimizer.learning_rate=1{'0' * 400}", 2, "optimizer.learning_rate must be of type float"),
    *[(f"report bad/results/{name}", 2, words) for name, (_, words) in BAD_RESULTS.items()],
    ("isoflop match bad/results/type", 2, "loss has a value of another type"),
    ("isoflop match bad", 2, "bad has no results.jsonl"),
    ("report none --output /proc/x", 2, "--output=/proc/x cannot be written"),
    (f"isoflop run {GRIDS}/good.yaml --output bad/folder", 2, "its grid.json is damaged"),
    ("sweep CONFIG --layout tp=1 --processes 1 --output bad/folder", 2, "its request.json is damaged or not that of"),
    ("sweep CONFIG --layout tp=1 --processes 1 --output /proc/x", 2, "--output=/proc/x cannot be written"),
    ("sweep CONFIG --layout tp=1 --processes 1 --output s --beside s", 2, "--beside=s is --output itself"),
    ("sweep CONFIG --layout processes=0", 2, "processes must be at least 1 and at most"),
    ("sweep CONFIG --processes 100000 --dry-run", 2, "set --processes=16, or train.global_batch_size"),
    ("decode-bench hf --batch 1,1", 2, "1 is given twice"),
    ("decode-bench hf --output x.txt", 2, "--output must be a file name that ends in .json"),
    ("bench CONFIG --output x.png", 2, "--output must be a file name that ends in .json"),
    ("bench CONFIG model.hidden_size=65536 model.ffn_hidden_size=262144", 2, "but this machine has"),
    ("evaluate runs/a --data none", 2, "--data=none does not exist"),
    ("evaluate runs/a --data texts.jsonl", 2, "--data=texts.jsonl is not a directory"),
    ("checkpoint inspect bad/step", 1, "step has a value of another type"),
    ("checkpoint inspect runs/early", 2, "is a run without a checkpoint yet"),
    ("checkpoint exprt runs/a out", 2, "Did you mean 'export'? See mosa checkpoint --help"),
    ("generate hf --prompt \udc80", 2, "--prompt is not UTF-8 text"),
    (f"{CHECK} 'data.path=a\n\x1b[2Jb'", 2, "data.path must be UTF-8 text without control characters"),
    (f"{CHECK} data.path=a\udcff", 2, "data.path must be UTF-8 text without control characters"),
    ("evaluate runs/a --output data/manifest.json", 2, "would replace a file of a run, a dataset or a model"),
    ("evaluate runs/a --output runs/a/metrics.jsonl", 2, "would replace a file of a run, a dataset or a model"),
    ("bench CONFIG --output hf/config.json", 2, "would replace a file of a run, a dataset or a model"),
    ("doctor --json runs/a/status.json", 2, "would replace a file of a run, a dataset or a model"),
    ("checkpoint import bad/keys.pt out.safetensors --from mosa-pytorch", 2, "does not contain a state dict"),
    ("cache-report hf --lengths ٣", 2, "is not a number of tokens"),
    ("compare 'runs/\x1b[2J'", 2, "runs/\\x1b[2J"),
    ("checkpoint export runs/a out\udcff --to hf", 2, "must be UTF-8 text without control characters"),
    ("evaluate runs/a --output 'o\x1b.json'", 2, "must be UTF-8 text without control characters"),
    # Runs side by side
    ("compare", 2, "Missing argument"),
    ("compare none", 2, "'none' has no metrics.jsonl with finite losses"),
    ("compare runs/none", 2, "runs there: [b]$^, a"),
    ("compare runs/a runs/a", 2, "each run once"),
    ("compare bad/odd", 2, "has no metrics.jsonl with finite losses"),
    ("status bad/odd", 2, "has no status.json that can be read"),
    *[(f"compare bad/runs/{name}", 2, "has no metrics.jsonl with finite losses") for name in BAD_JOURNALS],
    ("compare 'runs/[b]$^' runs/a --output markup.png", 0, ""),
    ("status 'runs/[b]$^'", 0, ""),
    ("compare bad/loop", 2, "'bad/loop' has no metrics.jsonl"),
    (f"compare {LONG}", 2, "File name too long"),
    ("compare runs/a --output x.jpg", 2, "ends in .png"),
    ("compare runs/a --output texts.jsonl/x.png", 2, "--output=texts.jsonl/x.png"),
    # Jobs
    ("status none", 2, "none"),
    ("status bad", 2, "bad"),
    ("status bad/pipe", 2, "has no status.json that can be read"),
    ("status bad/deep", 2, "has no status.json that can be read"),
    (f"{SUBMIT} --nodes 0", 2, "--nodes must be at least 1 and"),
    (f"{SUBMIT} --time 99999999999", 2, "--time must be MINUTES"),
    (f"{SUBMIT} --time soon", 2, "--time must be MINUTES"),
    (f"{SUBMIT} --time '1:00\n#SBATCH --wrap=id'", 2, "--time must be MINUTES"),
    (f"{SUBMIT} --partition 'a b'", 2, "--partition must be"),
    (f"{SUBMIT} --account 'x;id'", 2, "--account must be"),
    (f"{SUBMIT} --qos -x", 2, "--qos must be"),
    (f"{SUBMIT} --exclude 'n1 n2'", 2, "--exclude must be"),
    (f"{SUBMIT} --sbatch-argument mem=0", 2, "is not an option of sbatch"),
    (f"{SUBMIT} --sbatch-argument '--comment=a\nid'", 2, "is not an option of sbatch"),
    *[
        (f"{SUBMIT} --sbatch-argument {shlex.quote(option)}", 2, words)
        for option, words in {
            "--comment=a b": "not read it as one option",
            "--mail-user=a --wrap=id": "not read it as one option",
            '--comment="a': "not read it as one option",
            "--comment=a#b": "not read it as one option",
            "--comment=a\u2028b": "is not an option of sbatch",
            "--nodes=7": "use --nodes",
            "-N7": "use --nodes",
            "--wrap=id": "leave it out",
            "--array=0-9": "use --chain",
            "--time=soon": "--time must be MINUTES",
            "-tsoon": "--time must be MINUTES",
            "--mem=lots": "--mem must be a number of megabytes",
            "--exclude=n[5-1]": "--exclude must be names of nodes",
            "--signal=soon": "--signal must be",
        }.items()
    ],
    *[
        (f"{SUBMIT} --exclude {shlex.quote(nodes)}", 2, "--exclude must be names of nodes")
        for nodes in ("n[5-1]", "n[1-9999999999]", "n[1-65536],x", "n[1-300]x[1-300]", "n[1--3]", f"n[{'9' * 5000}]")
    ],
    (f"{SUBMIT} --sbatch-argument '--nodelist=n[1-9999999999]'", 2, "at most 65,536"),
    *[
        (f"{SUBMIT} {shlex.quote(f'run.directory={path}')}", 2, f"contains {sign!r}, which a path in an #SBATCH line")
        for path, sign in {
            "a b": " ",
            "it's": "'",
            'a"b': '"',
            "a#b": "#",
            "a\\b": "\\",
        }.items()
    ],
    (f"{SUBMIT} --chain 0", 2, "--chain must be at least 1 and"),
    ("submit CONFIG run.name=new --gpus-per-node 1 optimizer.warmup_steps=11 --dry-run", 2, "optimizer.warmup_steps"),
    ("doctor --timeout -1", 2, "timeout"),
    ("doctor --timeout 1e300", 2, "at most 86400"),
    ("doctor --minimum-disk nan", 2, "minimum-disk"),
    ("doctor --slow inf", 2, "--slow must be greater than 1"),
    ("doctor --json bad", 2, "--json=bad is a directory"),
    ("doctor --json /proc/x.json", 2, "no file can be created in '/proc'"),
    ("doctor --json texts.jsonl/x.json", 2, "--json=texts.jsonl/x.json cannot be written"),
]


@pytest.fixture(scope="module")
def place(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dataset, a run and an exported model, whole and damaged."""
    folder = tmp_path_factory.mktemp("misuse") / "place"
    folder.mkdir()
    shutil.copytree(runner.folder / "data", folder / "data")
    shutil.copy(runner.folder / "texts.jsonl", folder / "texts.jsonl")
    one = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", "data.num_workers=0"]
    values = [*(o for o in runner.overrides if not o.startswith(("data.path", "run.directory"))), *one]
    config = subprocess.run(
        [loaded_python(), "-m", "megatron_mosa", "config", "show", runner.config, *values, "data.path=data"],
        cwd=folder, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    (folder / "config.yaml").write_text(config)
    for command in ("pretrain config.yaml run.name=a", "checkpoint export runs/a hf --to hf"):
        done = subprocess.run(
            [loaded_python(), "-m", "megatron_mosa", *command.split()], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    damage(folder)
    return folder


def damage(folder: Path) -> None:
    """Write what is broken below ``bad``, and a run whose checkpoints/ is a file."""
    bad = folder / "bad"
    bad.mkdir()
    (bad / "binary.yaml").write_bytes(bytes(range(256)))
    (bad / "list.yaml").write_text("- a\n- b\n")
    (bad / "empty.yaml").write_text("run: {}\n")
    (bad / "twice.yaml").write_text("run: {name: a}\nrun: {name: b}\n")
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (bad / "bomb.yaml").write_text("l0: &l0 [x]\n" + levels)
    (bad / "empty.txt").write_text("")
    (bad / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (bad / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (bad / "broken.parquet").write_bytes(b"PAR1 and no more")
    (bad / "numbers.jsonl").write_text('{"text": 7}\n' * 20)
    (bad / "tokenizer.json").write_text("no tokenizer")
    (bad / "saved").mkdir()
    (bad / "saved" / "dataset_info.json").write_text("{}")
    (bad / "saved" / "state.json").write_text("{}")
    (bad / "saved" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    shutil.copytree(folder / "data", bad / "data")
    cut(bad / "data" / "train.bin", same_size=True)
    newest = sorted((folder / "runs" / "a" / "checkpoints").glob("step-*"))[-1]
    for name, file in (
        ("truncated", "state/__0_0.distcp"),
        ("metadata", "metadata.json"),
        ("index", "state/.metadata"),
    ):
        shutil.copytree(newest, bad / name)
        cut(bad / name / file)
    shutil.copytree(folder / "hf", bad / "hf")
    cut(next((bad / "hf").glob("*.safetensors")))
    shutil.copytree(folder / "hf", bad / "words")
    (bad / "words" / "tokenizer.json").write_text("no tokenizer")
    for copy, name, content in (
        ("nested", "metadata.json", "[" * 100_000),
        ("manifest", "manifest.json", "[" * 100_000),
        ("piped", "manifest.json", None),
        ("nested_data", "manifest.json", "[" * 100_000),
        ("unlisted", "model.safetensors.index.json", "{}"),
        ("unset", "config.json", "[]"),
        ("pipe", "status.json", None),
        ("deep", "status.json", "[" * 100_000),
    ):
        origin = {"nested_data": folder / "data", "unlisted": folder / "hf", "unset": folder / "hf"}.get(copy, newest)
        shutil.copytree(origin, bad / copy)
        (bad / copy / name).unlink(missing_ok=True)
        if content is None:
            os.mkfifo(bad / copy / name)
        else:
            (bad / copy / name).write_text(content)
    (bad / "itself.yaml").write_text("run: &r\n  name: a\n  x: *r\n")
    (bad / "grids").mkdir()
    for name, (changes, _) in {"good": ({}, ""), **BAD_GRIDS}.items():
        (bad / "grids" / f"{name}.yaml").write_text(json.dumps(GRID | changes))  # JSON is YAML, too
    (bad / "bases").mkdir()
    chain = {"chain0": "../../config.yaml"} | {f"chain{number}": f"chain{number - 1}.yaml" for number in range(1, 21)}
    for name, base in (chain | {name: base for name, (base, _) in BAD_BASES.items()}).items():
        (bad / "bases" / f"{name}.yaml").write_text(json.dumps({"base": base}))
    for name, (content, _) in BAD_RESULTS.items():
        (bad / "results" / name).mkdir(parents=True)
        (bad / "results" / name / "results.jsonl").write_text(content)
    (bad / "folder").mkdir()
    (bad / "folder" / "grid.json").write_text("[" * 100_000)
    (bad / "folder" / "request.json").write_text('{"request": 3}')
    damage_below(folder, newest)
    shutil.copytree(newest, bad / "step")
    metadata = json.loads((bad / "step" / "metadata.json").read_text()) | {"step": "last"}
    (bad / "step" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "runs" / "early" / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "config.yaml", folder / "runs" / "early")
    (bad / "loop").symlink_to("loop")
    (bad / "odd").mkdir()
    (bad / "odd" / "status.json").write_text('{"state": "running", "updated": 1, "step": "a", "seconds_per_step": "b"}')
    (bad / "odd" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": "low", "tokens": "many", "tokens_per_second": "x"}\n'
    )
    (folder / "pipe").symlink_to("bad/pipe/status.json")
    (folder / "runs" / "odd" / "metrics.jsonl").mkdir(parents=True)
    (folder / "runs" / "file").mkdir()
    (folder / "runs" / "file" / "checkpoints").write_text("")


def damage_below(folder: Path, newest: Path) -> None:
    """Write files whose damage is below their top level, and a model whose weights are a pipe."""
    bad = folder / "bad"
    torch.save({3: torch.zeros(1)}, bad / "keys.pt")
    for name in ("tags", "models", "bench", "described"):
        (bad / name).mkdir()
    for name, (value, _) in BAD_TAGS.items():
        (bad / "tags" / f"{name}.yaml").write_text(f"base: ../../config.yaml\ntrain: {{steps: {value}}}\n")
    for name, (changes, _) in BAD_BENCHES.items():
        (bad / "bench" / f"{name}.json").write_text(json.dumps(BENCH | changes))
    for name, content in BAD_JOURNALS.items():
        (bad / "runs" / name).mkdir(parents=True)
        (bad / "runs" / name / "metrics.jsonl").write_text(content)
    marked = folder / "runs" / "[b]$^"
    marked.mkdir()
    shutil.copy(folder / "runs" / "a" / "metrics.jsonl", marked)
    shutil.copy(folder / "runs" / "a" / "status.json", marked)
    rewrite(marked / "status.json", {"host": "[/b]"})
    others = {"architectures": {"architectures": [3]}, "activation": {"hidden_act": [None]}, "tokenizer": {}}
    for name, changes in (others | {name: changes for name, (changes, _) in BAD_MODELS.items()}).items():
        shutil.copytree(folder / "hf", bad / "models" / name)
        rewrite(bad / "models" / name / "config.json", changes)
    rewrite(bad / "models" / "tokenizer" / "tokenizer_config.json", {"model_max_length": ["x"]})
    for name, (keys, value, _) in BAD_METADATA.items():
        shutil.copytree(newest, bad / "described" / name)
        config = json.loads((newest / "metadata.json").read_text())["config"]
        section = config if len(keys) == 1 else config[keys[0]]
        section[keys[-1]] = value
        rewrite(bad / "described" / name / "metadata.json", {"config": config})
    shutil.copytree(folder / "hf", bad / "pipes")
    weights = next((bad / "pipes").glob("*.safetensors"))
    weights.unlink()
    (bad / "pipes" / "manifest.json").unlink()
    os.mkfifo(weights)


def rewrite(file: Path, changes: dict[str, Any]) -> None:
    """Replace values of the object in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path, *, same_size: bool = False) -> None:
    """Keep half of a file, or change a byte in its middle."""
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :] if same_size else content[:half])


def start(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "MOSA_BACKEND")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    words = shlex.split(command.replace("CONFIG", "config.yaml"))
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    arguments = [loaded_python(), "-m", "megatron_mosa", *words]
    try:
        return subprocess.run(
            arguments, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=20, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", "it did not end within 20 s")


def judge(command: str, code: int, words: str, done: subprocess.CompletedProcess[str]) -> str | None:
    """Return what is wrong with an answer, or None."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    problem = (
        "has a traceback" if "Traceback" in done.stdout + done.stderr
        else f"exits with {done.returncode}, not {code}" if done.returncode != code
        else "has no line that begins with error:" if command and code and len(errors) != 1
        else f"does not say {words!r}" if words not in " ".join(errors)
        else None
    )  # fmt: skip
    return problem and f"{command!r} {problem}: {done.stderr[-600:]}"


def test_every_misuse_is_answered_in_one_line(place: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file() and "cache" not in str(file)}
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda misuse: start(misuse[0], place), MISUSES))
    wrong = [
        problem
        for (command, code, words), done in zip(MISUSES, answers, strict=True)
        if (problem := judge(command, code, words, done))
    ]
    assert len(MISUSES) >= 150
    assert not wrong, f"{len(wrong)} of {len(MISUSES)}:\n" + "\n\n".join(wrong)
    changed = [str(file) for file, time in before.items() if not file.exists() or file.stat().st_mtime_ns != time]
    assert not changed and not (place / "out").exists(), changed
