"""Every command in README.md and docs/ is run as documented except for sizes, or listed with the reason why not.

The commands of a document run in order in a copy of a directory that looks like a clone of the repository, with a
dataset, three small runs and a ``.venv`` whose Python is the loaded one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

from megatron_mosa.cli import app
from tests.conversion.test_upstream import upstream_layer
from tests.integration.conftest import ROOT, TINY, Runner
from tests.loaded import loaded_python

DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
PROGRAMS = {
    "make", "mosa", ".venv/bin/mosa", "python", "launch/torchrun/local.sh", "sbatch", "srun", "torchrun", "lm_eval",
    "export", "enroot", "apptainer",
}  # fmt: skip
# First lines of blocks without commands: trees, drawings, files.
NO_COMMANDS = {
    "README.md": ["runs/NAME/"],
    "docs/architecture.md": [
        "9 cli.py one table of all commands of `mosa` pretrain_mosa.py",
        "input, [T, B, h] or its sequence slice",
    ],
    "docs/checkpoints.md": ["runs/NAME/checkpoints/step-00000300/"],
    "docs/containers.md": ["FROM IMAGE"],
    "docs/data.md": ["data.path/", "data:"],
    "docs/doctor.md": ["│ matrix product │ 0.0248 TFLOP/s to 0.0375 TFLOP/s │ warning: n2 │"],
    "docs/slurm.md": ["runs/NAME/submit/TIME/"],
}
SMALL = " ".join(
    [*TINY, "train.steps=2", "optimizer.warmup_steps=1", "train.global_batch_size=4", "data.num_workers=0"]
)
ONE = "parallel.tensor_model_parallel_size=1"
FIRST = "train.global_batch_size=512 --nodes 4 --gpus-per-node 8"
SBATCH = "sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8"


@dataclass(frozen=True)
class Way:
    """A way to run a command: replaced parts and appended words."""

    replaced: tuple[tuple[str, str], ...] = ()
    added: str = ""
    before: str = ""
    """A command that creates what this one reads."""

    reason: str = ""
    """Why the command cannot do its real work here; what runs instead checks its arguments as far as possible."""

    instead: str = ""
    """The command to run in its place."""


def instead(reason: str, command: str = "true") -> Way:
    """Run ``command`` in place of the documented one."""
    return Way(reason=reason, instead=command)


GPU, CLUSTER, NETWORK = "needs a GPU", "needs a cluster", "needs a network"
JOB = (SBATCH + " --time=24:00:00 launch/slurm/pretrain.sbatch", "python pretrain_mosa.py")
CHECKED = "--check-only --world-size 32 run.name=large"
TABLE: dict[str, dict[str, Way]] = {
    "README.md": {
        "make pretrain": Way(added=f"ARGS='{SMALL} run.name=first data.sources=[TEXTS]'"),
        "make test": instead("are these tests", "make -n test"),
        "make setup TORCH=... PIP_ARGS=...": instead(NETWORK, "make -n setup TORCH=... PIP_ARGS=..."),
        ".venv/bin/mosa data build configs/first_gpu_run.yaml 'data.sources=[/data/my_text]'": Way(
            (("/data/my_text", "TEXTS"),), "data.path=data/mine data.vocab_size=400 data.validation_fraction=0.2"
        ),
        "launch/torchrun/local.sh configs/first_gpu_run.yaml": Way(
            (("launch/", "NPROC=1 launch/"),), SMALL, reason="uses every visible GPU; here one process"
        ),
        f"mosa submit configs/first_gpu_run.yaml {FIRST} --time 24:00:00": Way(
            added="--dry-run run.name=large", reason="needs a cluster to submit to"
        ),
        f"{SBATCH} --time=24:00:00 launch/slurm/pretrain.sbatch configs/first_gpu_run.yaml "
        "train.global_batch_size=512": Way((JOB,), CHECKED, reason=CLUSTER),
        "mosa checkpoint inspect runs/NAME": Way(),
        "mosa checkpoint export runs/NAME OUT --to hf": Way(),
        "mosa checkpoint import FOLDER OUT --from hf": Way((("FOLDER OUT", "OUT imported"),)),
        "mosa checkpoint verify A B": Way((("A B", "runs/quickstart imported"),)),
        "mosa status runs/NAME [--watch]": Way(),
        "mosa evaluate runs/NAME": Way(added="--samples 2 --calibration-samples 2"),
        "mosa compare runs/A runs/B": Way((("runs/A", "runs/quickstart"), ("runs/B", "runs/dense"))),
        "mosa bench CONFIG": Way(added=f"{SMALL} {ONE} --steps 1 --warmup 1"),
    },
    "docs/causal.md": {
        "mosa checkpoint causalize runs/NAME OUT --samples 256": Way((("256", "2"),)),
        "python pretrain_mosa.py configs/paper/tiny_mosa.yaml data.validation_fraction=0.02 "
        "data.tokenizer_bytes=30000000 mosa.num_heads=276 mosa.sparsity=32 mosa.selection=threshold "
        "mosa.load_feedback=0 mosa.capacity_factor=2 train.steps=1500 train.micro_batch_size=64 "
        "optimizer.learning_rate=1e-3 optimizer.min_learning_rate=1e-4 "
        "optimizer.warmup_steps=100 optimizer.gradient_clipping=1.0 validation.interval=500 "
        "validation.num_samples=1024 run.seed=1234": Way(added=f"{SMALL} data.path=data/quickstart"),
    },
    "docs/checkpoints.md": {
        "mosa checkpoint inspect runs/quickstart": Way(),
        "mosa checkpoint reshard runs/quickstart smaller --tensor-parallel 1 --drop-optimizer": Way(),
        "mosa checkpoint export runs/quickstart exported/quickstart --to hf": Way(),
        "mosa checkpoint import exported/quickstart imported/quickstart --from hf": Way(),
        "mosa checkpoint export checkpoints-of-deepspeed weights --to fp32": Way(
            (("checkpoints-of-deepspeed", "runs/quickstart"),)
        ),
        "mosa checkpoint export runs/dense exported/dense --to torch-dist": Way(),
        "mosa checkpoint import exported/dense imported/dense --from torch-dist": Way(),
        "mosa checkpoint import model.pt layer.safetensors --from mosa-pytorch --prefix layers.0.attention.": Way(),
        "mosa checkpoint verify runs/quickstart exported/quickstart": Way(),
    },
    "docs/configuration.md": {
        "mosa config list": Way(),
        "mosa config show configs/scale/1b_mosa.yaml": Way(),
        "mosa config diff configs/paper/tiny.yaml configs/paper/tiny_mosa.yaml": Way(),
    },
    "docs/containers.md": {
        "enroot import -o mosa.sqsh dockerd://mosa": instead(CLUSTER),
        'export MOSA_SRUN_ARGUMENTS="--container-image=$PWD/mosa.sqsh --container-mounts=$PWD,/data '
        '--container-workdir=$PWD"': Way(),
        f"mosa submit configs/first_gpu_run.yaml {FIRST} --time 24:00:00": Way(added="--dry-run", reason=CLUSTER),
        "apptainer build mosa.sif docker-daemon://mosa:latest": instead(CLUSTER),
        'export MOSA_PYTHON="apptainer exec --nv --bind $PWD,/data mosa.sif python"': Way(),
    },
    "docs/data.md": {
        "mosa data build CONFIG [section.key=value ...] [--force]": Way(
            added="data.path=data/new data.sources=[TEXTS] data.vocab_size=400 data.validation_fraction=0.2 --force"
        ),
        "mosa data index CONFIG [section.key=value ...]": Way(added=SMALL),
        "mosa data inspect data/quickstart": Way(),
        "mosa data verify data/quickstart": Way(),
        "mosa data sample configs/quickstart.yaml 0": Way(added=SMALL),
    },
    "docs/decoding.md": {
        "mosa checkpoint export runs/NAME exported/NAME --to hf": Way((("NAME", "thresholds"),)),
        'mosa generate exported/NAME --prompt "def main(" --max-new-tokens 200 --temperature 0.8 --top-p 0.95 '
        "--seed 1": Way((("NAME", "thresholds"), ("200", "4"))),
        "mosa generate runs/NAME --prompt-file - < prompt.txt": Way((("NAME", "thresholds"),), "--max-new-tokens 4"),
        "mosa cache-report exported/NAME --text some_text.txt --output report": Way(
            (("NAME", "thresholds"),), "--lengths 20,50"
        ),
        "mosa decode-bench exported/NAME --data data/NAME --batch 1,64 --context 8k": Way(
            (("exported/NAME", "exported/thresholds"), ("1,64", "1,3"), ("8k", "50")), "--steps 2"
        ),
    },
    "docs/doctor.md": {
        "mosa doctor": Way(),
        "srun --ntasks-per-node=8 --gpus-per-node=8 mosa doctor --run-directory /shared/runs --json doctor.json": Way(
            (("srun --ntasks-per-node=8 --gpus-per-node=8 ", ""), ("/shared/runs", "runs")), reason=CLUSTER
        ),
        "torchrun --nnodes=2 --nproc-per-node=8 ... -m megatron_mosa doctor": Way(
            (("torchrun --nnodes=2 --nproc-per-node=8 ... ", "python "),), "--help", reason=CLUSTER
        ),
    },
    "docs/evaluation.md": {
        "mosa evaluate runs/NAME": Way(added="--samples 2 --calibration-samples 2"),
        "mosa evaluate EXPORTED --data data/NAME": Way(
            (("EXPORTED", "out"),), "--samples 2 --calibration-samples 2",
            before="mosa checkpoint export runs/thresholds out --to hf --no-check",
        ),
        "mosa checkpoint export runs/NAME exported/NAME --to hf": Way(added="--no-check"),
        "lm_eval --model hf --model_args pretrained=exported/NAME,trust_remote_code=True --include_path tasks "
        "--tasks TASK --device cpu --batch_size 4": instead("runs in tests/conversion/test_lm_eval.py"),
    },
    "docs/kernels.md": {
        "make bench": instead(GPU, "make -n bench"),
        "python -m benchmarks.tune --shapes 1 --present": Way(added="--help", reason=GPU),
        "python -m tests.kernels.compile_for 80,90 resources": instead("runs in tests/kernels/test_triton_compiles.py"),
    },
    "docs/measurements/1b_mosa_h100.md": {
        "mosa data build configs/scale/1b_mosa.yaml $OPTIONS": Way(
            added="data.sources=[TEXTS] data.vocab_size=400 data.validation_fraction=0.2"
        ),
        "launch/torchrun/local.sh configs/scale/1b_mosa.yaml $OPTIONS": Way(
            (("launch/torchrun/local.sh", "python pretrain_mosa.py"),), "data.sequence_length=64 --check-only",
            reason=GPU,
        ),
    },
    "docs/measurements/1b_mosa_h200.md": {
        "mosa data build configs/first_gpu_run.yaml": Way(
            added="data.path=data/new data.sources=[TEXTS] data.vocab_size=400 data.validation_fraction=0.2"
        ),
        "python pretrain_mosa.py configs/scale/1b_mosa.yaml data.path=data/first_gpu_run checkpoint.keep_last=1 "
        "checkpoint.interval=5 train.steps=15 train.global_batch_size=32 logging.interval=1 optimizer.warmup_steps=1 "
        "validation.num_samples=4": Way(added="data.sequence_length=64 --check-only", reason=GPU),
    },
    "docs/howto/hugging_face.md": {
        "mosa checkpoint import /models/llama hybrid --from hf --add-mosa-heads 32 --sparsity 16": Way(
            (("/models/llama", "exported/dense"), ("32", "4")),
            before="mosa checkpoint export runs/dense exported/dense --to hf",
        ),
        "mosa data build my_run.yaml": instead("is run for README.md"),
        "launch/torchrun/local.sh my_run.yaml": Way(
            (("launch/", "NPROC=1 launch/"), ("my_run.yaml", "configs/quickstart.yaml")),
            f"{SMALL} {ONE} mosa.num_heads=4 run.name=my_run checkpoint.initialize_from=hybrid "
            "mosa.selection=threshold mosa.threshold_warmup_steps=1",
        ),
        "mosa checkpoint export runs/my_run exported/my_run --to hf": Way(),
        'mosa generate exported/my_run --prompt "Once upon a time"': Way(added="--max-new-tokens 4"),
    },
    "docs/howto/slurm.md": {
        "make setup": instead(NETWORK, "make -n setup"),
        ".venv/bin/mosa data build configs/first_gpu_run.yaml 'data.sources=[/data/my_text]'": instead(
            "is run for README.md"
        ),
        ".venv/bin/mosa data inspect configs/first_gpu_run.yaml": Way(),
        ".venv/bin/mosa config show configs/first_gpu_run.yaml train.global_batch_size=512": Way(),
        f".venv/bin/mosa submit configs/first_gpu_run.yaml {FIRST} --time 24:00:00 --dry-run": Way(
            added="run.name=large"
        ),
        ".venv/bin/mosa status runs/first_gpu_run --watch": Way((("first_gpu_run --watch", "quickstart"),)),
    },
    "docs/howto/layouts.md": {
        ".venv/bin/mosa bench configs/quickstart.yaml parallel.tensor_model_parallel_size=1": Way(
            added=f"{SMALL} --steps 1 --warmup 1"
        ),
        ".venv/bin/mosa sweep configs/quickstart.yaml --processes 2 --layout tp=1,zero=1,micro=4 "
        "--layout tp=1,zero=3,micro=4 --layout tp=2,sp=true,zero=1,micro=4 --steps 10": Way(
            (("micro=4", "micro=2"), ("--steps 10", "--steps 1 --warmup 0")), f"{SMALL} --force"
        ),
        ".venv/bin/mosa sweep configs/quickstart.yaml --processes 2 --layout tp=2,sp=false,zero=1,micro=4 --steps 10":
            instead("is the command before with another layout"),
    },
    "docs/isoflop.md": {
        "mosa isoflop configs/paper/tiny.yaml": Way(),
        "mosa isoflop run configs/grids/example.yaml --dry-run": Way(),
        "mosa isoflop run configs/grids/example.yaml --jobs 2": Way(),
        "mosa isoflop run configs/grids/paper_tiny.yaml --slurm --gpus-per-node 8 --partition gpu "
        "--time-limit 120": Way((("paper_tiny", "example"),), "--dry-run", reason=CLUSTER),
        "mosa report runs/grid_example": Way(),
        "mosa isoflop match runs/grid_example": Way(),
    },
    "docs/results.md": {
        'mosa data build configs/paper/tiny.yaml data.path=data/novels "data.sources=[novels.jsonl]" '
        "data.validation_fraction=0.03": Way((("novels.jsonl", "TEXTS"),), "data.vocab_size=400"),
        'mosa data build configs/paper/tiny.yaml data.path=data/python "data.sources=[python.jsonl]" '
        "data.tokenizer_bytes=30000000 data.validation_fraction=0.02": Way(
            (("python.jsonl", "TEXTS"),), "data.vocab_size=400"
        ),
        "mosa isoflop run configs/grids/paper_tiny.yaml --jobs 10 --measure --remove-checkpoints": instead(
            GPU, "mosa isoflop configs/paper/tiny.yaml"
        ),
        "mosa isoflop run configs/grids/paper_small.yaml --jobs 4 --measure --remove-checkpoints": instead(
            GPU, "mosa isoflop configs/paper/small.yaml"
        ),
        "mosa report runs/grid_paper_tiny": instead("is run for docs/isoflop.md"),
    },
    "docs/profiling.md": {
        "mosa bench configs/first_gpu_run.yaml": Way(added=f"{SMALL} --steps 1 --warmup 1"),
        "torchrun --nproc-per-node 4 -m megatron_mosa bench configs/scale/1b_mosa.yaml "
        "parallel.tensor_model_parallel_size=2": Way(
            (("torchrun --nproc-per-node 4 ", "python "), ("_size=2", "_size=1")),
            f"{SMALL} model.ffn_hidden_size=64 --steps 1 --warmup 1",
            reason="needs four GPUs; here one process",
        ),
        "mosa pretrain CONFIG train.profile_steps=[20,21] train.profile_ranks=[0,1]": Way(
            (("[20,21]", "[1]"), ("[0,1]", "[0]")), f"{SMALL} {ONE} run.name=profiled"
        ),
    },
    "docs/runs.md": {
        "mosa compare runs/A runs/B --output comparison.png": Way(
            (("runs/A", "runs/quickstart"), ("runs/B", "runs/dense"))
        ),
        "python -m benchmarks.faults --processes 4 --out faults": Way(added="--help", reason=GPU),
    },
    "docs/scaling.md": {
        # Heads that do not divide, and bf16: ZeRO 1 to 3 without tensor parallelism, and not six layouts.
        "mosa sweep configs/quickstart.yaml": Way(
            added=f"{SMALL} {ONE} mosa.num_heads=3 train.precision=bf16 --steps 1 --warmup 0"
        ),
        "mosa sweep configs/quickstart.yaml --processes 2 --layout tp=1,zero=2,micro=8 "
        "--layout tp=2,sp=true,zero=1": Way(
            added=f"{SMALL} train.global_batch_size=16 --steps 1 --warmup 0 --force"
        ),
        "mosa sweep configs/scale/1b_mosa.yaml train.global_batch_size=64 --random-tokens --processes 1,4 "
        "--layout tp=1,zero=1 --layout tp=1,zero=2 --layout tp=1,zero=3 --layout tp=2,sp=true,zero=1 "
        "--layout tp=2,sp=false,zero=1 --layout tp=4,sp=true,zero=1 --layout tp=4,sp=false,zero=1 "
        "--layout tp=2,sp=true,zero=3 --time-limit 9": Way(added="--memory 80 --dry-run", reason=GPU),
        "mosa sweep configs/scale/1b_mosa.yaml train.global_batch_size=64 --processes 1,2,4,8 --slurm "
        "--gpus-per-node 8 --partition gpu --time-limit 30": Way(added="--memory 80 --dry-run", reason=CLUSTER),
    },
    "docs/slurm.md": {
        f"mosa submit configs/first_gpu_run.yaml {FIRST} --cpus-per-task 12 --time 24:00:00": Way(
            added="--dry-run", reason="needs a cluster to submit to"
        ),
        f"{SBATCH} --cpus-per-task=12 --time=24:00:00 launch/slurm/pretrain.sbatch configs/first_gpu_run.yaml "
        "train.global_batch_size=512": Way(
            ((SBATCH + " --cpus-per-task=12 --time=24:00:00 launch/slurm/pretrain.sbatch", JOB[1]),), CHECKED,
            reason=CLUSTER,
        ),
    },
}  # fmt: skip
# Placeholders for the reader's own values.
OPERANDS = (
    ("[section.key=value ...]", ""), ("[--force]", ""), ("[--watch]", ""), ("CONFIG", "configs/quickstart.yaml"),
    ("runs/NAME", "runs/quickstart"), ("exported/NAME", "exported/quickstart"), ("data/NAME", "data/quickstart"),
)  # fmt: skip


def is_read(language: str | None) -> bool:
    """Return whether a block may hold commands; Python has its own tests, and braces mark Sphinx directives."""
    return language is not None and language not in ("python", "yaml") and not language.startswith("{")


def blocks_and_prose(text: str) -> tuple[list[list[str]], str]:
    """Return the lines of each non-Python code block, and all prose, including blocks without commands."""
    blocks: list[list[str]] = []
    prose: list[str] = []
    language, before = None, ""
    for line in text.splitlines():
        if line.startswith("```"):
            language = (line[3:] or "text") if language is None else None
            if is_read(language):
                blocks.append([])
        elif language is not None:
            if is_read(language):
                blocks[-1].append(line)
        elif line.startswith("    ") and (not before.strip() or before.startswith("    ")):
            if not before.startswith("    "):
                blocks.append([])
            blocks[-1].append(line[4:])
        else:
            prose.append(line)
        before = line
    prose += [line for block in blocks if commands_of_block(block) is None for line in block]
    return blocks, "\n".join(prose)


def commands_of_block(lines: list[str]) -> list[str] | None:
    """Return a block's commands without comments, or None; if a line begins with "$", the others are output."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    with_prompt = [line[2:] for line in joined if line.startswith("$ ")]
    if not with_prompt and joined[0].split()[0] not in PROGRAMS:
        return None
    found = [re.sub(r"\s+# .*", "", line) for line in with_prompt or joined]
    return [" ".join(line.split()) for line in found]


def spans(prose: str) -> list[str]:
    """Return the code spans that begin with one of our programs."""
    found = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in found if re.match(r"(mosa|make|python -m) ", span)]


def commands(document: str) -> list[str]:
    """Return the commands in a document's code blocks, and those with operands in its prose."""
    blocks, prose = blocks_and_prose((ROOT / document).read_text())
    found = [command for block in blocks for command in commands_of_block(block) or []]
    found += [span for span in spans(prose) if span.startswith("mosa ") and not is_name(span)]
    return list(dict.fromkeys(found))


def is_name(span: str) -> bool:
    """Return whether ``mosa WORD [WORD]`` is a command's name, without operands."""
    group = typer.main.get_command(app)
    words = span.split()[1:]
    while words and (group := getattr(group, "commands", {}).get(words[0])) is not None:
        words = words[1:]
    return not words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_in_the_table(document: str) -> None:
    """Also, every block without commands is listed, and every command named in the prose exists."""
    blocks, prose = blocks_and_prose((ROOT / document).read_text())
    assert set(commands(document)) == set(TABLE.get(document, {}))
    others = [" ".join(block[0].split()) for block in blocks if commands_of_block(block) is None]
    assert others == NO_COMMANDS.get(document, [])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for span in spans(prose):
        program, *words = span.split()
        if program == "make":
            assert {word for word in words if "=" not in word and not word.startswith("-")} <= targets, span
        elif program == "python":
            assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file(), span
        else:
            assert is_name(span) or span in TABLE[document], span


@dataclass(frozen=True)
class Clone:
    """A directory that looks like a clone of the repository in use."""

    folder: Path
    texts: str

    def call(self, command: str) -> None:
        """Run a command in a shell; it must succeed."""
        path = f"{self.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        left_out = ("SLURM_", "MOSA_", "MAKE", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        environment |= {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        done = subprocess.run(
            ["bash", "-c", " ".join(command.split()).replace("TEXTS", self.texts)], cwd=self.folder, env=environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def clone(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    folder = tmp_path_factory.mktemp("docs") / "clone"
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("Makefile", "benchmarks", "configs", "constraints.txt", "launch", "megatron_mosa", "pretrain_mosa.py"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (programs / "python").symlink_to(loaded_python())
    (programs / "mosa").write_text(f'#!/bin/sh\nexec {loaded_python()} -m megatron_mosa "$@"\n')
    (programs / "mosa").chmod(0o755)
    (programs.parent / ".installed").touch()
    shutil.copytree(runner.folder / "data", folder / "data" / "quickstart")
    (folder / "data" / "first_gpu_run").symlink_to("quickstart")
    (folder / "prompt.txt").write_text("def main(")
    shutil.copy(Path(os.__file__).with_name("cmd.py"), folder / "some_text.txt")
    layer = {f"layers.0.attention.{name}": tensor for name, tensor in upstream_layer(is_hybrid=True).items()}
    torch.save(layer, folder / "model.pt")
    found = Clone(folder, str(runner.folder / "texts.jsonl"))
    train = f"python pretrain_mosa.py configs/quickstart.yaml {SMALL} {ONE}"
    for options in (
        "run.name=quickstart",
        "run.name=dense mosa.num_heads=0",
        "run.name=thresholds mosa.selection=threshold mosa.threshold_warmup_steps=1",
    ):
        found.call(f"{train} {options}")
    return found


def test_the_readme_s_model_runs_as_printed(clone: Clone) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (snippet for snippet in snippets if "GPTModel" in snippet)
    (clone.folder / "snippet.py").write_text(f"{code}assert logits.shape == (1, 256, 8064)\n")
    clone.call("python snippet.py")


@pytest.mark.parametrize("document", list(TABLE))
def test_the_commands_of_a_document(document: str, clone: Clone, tmp_path: Path) -> None:
    copy = Clone(tmp_path / "clone", clone.texts)
    shutil.copytree(clone.folder, copy.folder, symlinks=True)
    options = re.search(r'`OPTIONS="([^"]+)"`', (ROOT / document).read_text())
    for command in commands(document):
        way = TABLE[document][command]
        if way.before:
            copy.call(way.before)
        command = way.instead or command
        for part, other in (*way.replaced, *OPERANDS, ("$OPTIONS", options[1] if options else "")):
            command = command.replace(part, other)
        copy.call(f"{command} {way.added}")
