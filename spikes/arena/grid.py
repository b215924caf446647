"""grid.py CORPUS OUT [--shrink]: configs/grids/$GRID.yaml (paper_tiny) with one corpus, the most valuable members first.

ARENA_STEPS=N: steps of a run. ARENA_MEMBERS="dense threshold": these alone. ARENA_RATES="0.001 0.002": rates that are tried.
ARENA_SEEDS=1: seeds of every member.
"""
import json
import os
import sys

import yaml

corpus, out, *flags = sys.argv[1:]
tree = yaml.safe_load(open(f"configs/grids/{os.environ.get('GRID', 'paper_tiny')}.yaml"))
tree["corpora"] = {corpus: tree["corpora"][corpus]}
tokens = json.load(open(f"data/{corpus}/manifest.json"))["splits"]["train"]["tokens"]
asked = tree["corpora"][corpus]["train.steps"]
fit = tokens // 65536
if fit < asked:  # one pass
    print(f"{corpus} has {tokens:,} training tokens: {fit} steps instead of {asked}")
    tree["corpora"][corpus]["train.steps"] = fit
steps = os.environ.get("ARENA_STEPS")
if steps:
    tree["corpora"][corpus]["train.steps"] = int(steps)
    tree["overrides"]["optimizer.warmup_steps"] = min(tree["overrides"]["optimizer.warmup_steps"], int(steps) // 3)
tree["overrides"].setdefault("mosa.capacity_factor", 2.0)  # as it was by default when the first of these ran
first = ["dense", "threshold", "expert_choice", "dense_gate", "token_choice", "fixed", "routing"]
only = os.environ.get("ARENA_MEMBERS", "").split()
names = [n for n in first if n in tree["members"]] + [n for n in tree["members"] if n not in first]
tree["members"] = {n: tree["members"][n] for n in names if not only or n in only}
rates = os.environ.get("ARENA_RATES")
for member in tree["members"].values():
    if os.environ.get("ARENA_SEEDS"):
        member["seeds"] = [int(seed) for seed in os.environ["ARENA_SEEDS"].split()]
    if rates and "learning_rates" in member:
        member["learning_rates"] = [float(rate) for rate in rates.split()]
    rho = member.get("sparsity")
    if isinstance(rho, list) and member.get("tune_at") in rho:
        member["sparsity"] = [member["tune_at"], *(r for r in rho if r != member["tune_at"])]
if "--shrink" in flags:
    tree["overrides"] |= {
        "train.micro_batch_size": 2, "train.global_batch_size": 2, "data.sequence_length": 128, "validation.num_samples": 4,
        "optimizer.warmup_steps": 1, "train.precision": "fp32", "data.num_workers": 0, "parallel.sequence_parallel": False,
    }
    tree["sizes"] = {"tiny": {"model.num_layers": 1, "model.hidden_size": 64, "model.head_dim": 16}}
    tree["corpora"][corpus]["train.steps"] = int(steps or 2)
    tree["evaluate"] = {"samples": 2, "calibration_samples": 2, "decode": [1], "decode_context": 64}
    for member in tree["members"].values():
        if member["kind"] == "threshold":
            member["overrides"] |= {"mosa.threshold_warmup_steps": 1}
yaml.safe_dump(tree, open(out, "w"), sort_keys=False)
