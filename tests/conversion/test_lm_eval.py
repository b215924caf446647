"""Exported models under lm-evaluation-harness: its command on local files, against results computed one by one."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mosa.convert.commands.export_hf import export_hf
from tests.conftest import LAUNCHER
from tests.conversion.conftest import make
from tests.conversion.models import CAUSAL, KINDS
from tests.loaded import loaded_python

# The norm and the gated MLP are for generation: with them, the random model gives a different answer to every prompt.
MODELS = {"causal": [*CAUSAL, "model.normalization=RMSNorm", "model.activation=swiglu"], "expert": KINDS["pure"]}
# Lengths differ, so that batches of two are padded: choices on the right, prompts on the left.
QUESTIONS = {
    "to export 7": ["and back", "and import 49 and back", "49"],
    "import 16": ["to", "back to export", "and and"],
    "to export 12 and import 144": ["and back", "export", "import 7"],
    "back": ["and export 5", "7", "to import 25 and"],
}
PROMPTS = ["to export 7", "to export 12 and import 144 and", "back", "and import 49"]
STOP, NEW_TOKENS = "#", 9
CHOICE = {
    "task": "local_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
GENERATION = {
    "task": "local_generation",
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": [STOP], "max_gen_toks": NEW_TOKENS, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


class Exported:
    """An exported model loaded by transformers, applied to one sequence at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)

    @torch.no_grad()
    def log_likelihood(self, question: str, choice: str) -> float:
        """Return the log-likelihood of the choice's tokens, preceded by a space, given the question's."""
        start = len(self.tokenizer(question).input_ids)
        tokens = self.tokenizer(f"{question} {choice}", return_tensors="pt").input_ids  # [1, T]
        logs = self.model(tokens[:, :-1]).logits.double().log_softmax(-1)[0]  # [T - 1, V]
        return sum(logs[position - 1, tokens[0, position]].item() for position in range(start, tokens.shape[1]))

    def greedy(self, prompt: str) -> str:
        tokens = self.tokenizer(prompt, return_tensors="pt").input_ids
        longer = self.model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
        return self.tokenizer.decode(longer[0, tokens.shape[1] :], skip_special_tokens=True).split(STOP)[0]


def write_task(folder: Path, task: dict, rows: list[dict]) -> str:
    """Write the task's definition and its rows as JSON lines; return the task's name."""
    name, tasks = task["task"], folder / "tasks"
    tasks.mkdir(exist_ok=True)
    data = tasks / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (tasks / f"{name}.yaml").write_text(json.dumps(task | source))  # JSON is YAML
    return name


def lm_eval(model: Path, folder: Path, *tasks: str) -> subprocess.CompletedProcess[str]:
    """Run the command of docs/evaluation.md without a network; results go to ``folder / "out"``."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}  # accelerate reads them
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            loaded_python(), "-m", "lm_eval", "--model", "hf", "--model_args",
            f"pretrained={model},trust_remote_code=True", "--include_path", "tasks", "--tasks", ",".join(tasks),
            "--device", "cpu", "--batch_size", "2", "--output_path", "out", "--log_samples",
        ],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """An exported model, and lm_eval's output for it."""

    model: Exported
    folder: Path
    process: subprocess.CompletedProcess[str]

    def scores(self, task: str) -> dict[str, float]:
        (file,) = self.folder.glob("out/*/results_*.json")
        return json.loads(file.read_text())["results"][task]

    def samples(self, task: str) -> list[dict]:
        """Return the logged samples in the order of the task's rows."""
        (file,) = self.folder.glob(f"out/*/samples_{task}_*.jsonl")
        return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluated]:
    """Evaluate both models, in parallel and only once, because lm_eval takes long to load its own task definitions."""
    folder = tmp_path_factory.mktemp("lm-eval")
    models = {}
    for kind, trained in make(folder, MODELS).items():
        export_hf(trained.checkpoint, folder / kind, checks_logits=False)
        models[kind] = Exported(folder / kind)
    rows = [{"question": question, "choices": choices, "answer": 1} for question, choices in QUESTIONS.items()]
    answers = [models["causal"].greedy(prompt) for prompt in PROMPTS[:3]] + ["and back"]
    prompts = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    tasks = write_task(folder, CHOICE, rows), write_task(folder, GENERATION, prompts)
    work = {"causal": tasks, "expert": tasks[1:]}
    found = {}
    with ThreadPoolExecutor() as pool:
        for kind, names in work.items():
            (folder / f"{kind}-eval").mkdir()
            (folder / f"{kind}-eval" / "tasks").symlink_to(folder / "tasks")
            found[kind] = pool.submit(lm_eval, folder / kind, folder / f"{kind}-eval", *names)
    return {kind: Evaluated(models[kind], folder / f"{kind}-eval", found[kind].result()) for kind in work}


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_choices_are_scored_by_the_log_likelihoods_of_their_tokens(evaluated: dict[str, Evaluated]) -> None:
    done = evaluated["causal"]
    assert done.process.returncode == 0, done.process.stderr
    samples = done.samples("local_choice")
    assert [sample["doc"]["question"] for sample in samples] == list(QUESTIONS)
    right, right_by_length = [], []
    for sample, (question, choices) in zip(samples, QUESTIONS.items(), strict=True):
        expected = [done.model.log_likelihood(question, choice) for choice in choices]
        assert max(expected) - min(expected) > 5  # nats: not a flat distribution
        found = [float(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]]
        assert found == pytest.approx(expected, rel=0, abs=1e-4)
        right.append(best(expected) == 1)
        right_by_length.append(best([value / len(text) for value, text in zip(expected, choices, strict=True)]) == 1)
    assert 0 < sum(right) < len(right) and right != right_by_length  # so neither score is right by chance
    scores = done.scores("local_choice")
    assert scores["acc,none"] == sum(right) / len(right)
    assert scores["acc_norm,none"] == sum(right_by_length) / len(right)


def test_generation_is_greedy(evaluated: dict[str, Evaluated]) -> None:
    done = evaluated["causal"]
    assert done.process.returncode == 0, done.process.stderr
    expected = [done.model.greedy(prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS) and all(len(set(text)) > 2 for text in expected)
    samples = done.samples("local_generation")
    assert [sample["doc"]["prompt"] for sample in samples] == PROMPTS
    assert [sample["filtered_resps"] for sample in samples] == [[text] for text in expected]
    assert done.scores("local_generation")["exact_match,none"] == 0.75  # one answer is deliberately wrong


def test_expert_choice_models_refuse_to_generate(evaluated: dict[str, Evaluated]) -> None:
    done = evaluated["expert"]
    assert done.process.returncode != 0 and not list(done.folder.glob("out/*/results_*"))
    (message,) = [line for line in done.process.stderr.splitlines() if line.startswith("ValueError")]
    assert "cannot generate: num_mosa_heads=6 with selection='expert_choice' select from the whole sequence" in message
    assert message.endswith("or use a causal model, such as one with selection='threshold'")
