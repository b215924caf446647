"""The typed tree behind a YAML file: one dataclass per section, one field per key with its bounds.

``configs/reference.yaml`` is generated from this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_mosa.config.keys import key, required

_YEAR = 365 * 86400
"""Seconds; the longest wait that makes sense."""

_LARGE = 1000
"""No weight, epsilon or deviation makes sense above it."""

_LARGEST = 1e30
"""Of numbers that may be as large as one likes, so that they and what is computed from them fit fp32."""


@dataclass
class RunSection:
    """The run's name, directory and seed."""

    name: str = required("the run directory is {directory}/{name}")
    directory: str = key("runs", "where run directories are created")
    seed: int = key(1234, "initial weights and data order", at_least=0, at_most=2**32 - 1)

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.directory) / self.name


@dataclass
class ModelSection:
    """A GPT with pre-norm layers; its dense and local heads run next to the MoSA heads of section ``mosa``."""

    num_layers: int = required("transformer layers", at_least=1, at_most=10_000)
    hidden_size: int = required("h, the width of the residual stream", at_least=1, at_most=2**20)
    ffn_hidden_size: int | None = key(None, "width of the MLP; null: 4 * hidden_size", at_least=1, at_most=2**22)
    num_dense_heads: int = key(
        4, "dense causal heads next to the MoSA heads; 0: none", at_least=0, at_most=2**16, counts="dense"
    )
    num_query_groups: int | None = key(None, "key/value heads of the dense heads; null: one per dense head", at_least=1)
    num_local_heads: int = key(
        0, "sliding-window heads, with or without dense heads", at_least=0, at_most=2**16, counts="local"
    )
    local_window: int | None = key(
        None, "tokens a local head sees, including its own; null: sequence_length / sparsity", at_least=1
    )
    num_fixed_heads: int = key(
        0,
        "heads that attend among every fixed_stride-th token: the paper's static baseline",
        at_least=0,
        at_most=2**16,
        counts="fixed",
    )
    fixed_stride: int | None = key(
        None,
        "fixed heads attend among every fixed_stride-th token, from token 0; null: sparsity, rounded down",
        at_least=1,
    )
    num_routing_heads: int = key(
        0,
        "heads of the Routing Transformer, which attend within clusters of similar tokens; not causal",
        at_least=0,
        at_most=2**16,
        counts="routing",
    )
    routing_clusters: int | None = key(
        None,
        "rho, centroids of a Routing head; each takes sequence_length / rho tokens; null: sparsity, rounded down",
        at_least=2,
        reason="one cluster takes all tokens: use a dense head",
    )
    routing_decay: float = key(
        0.999, "what a centroid keeps of itself per step, as it moves to the mean of its tokens", at_least=0, at_most=1
    )
    attention_gate: bool = key(
        False,
        "gate the outputs of dense and local heads by a sigmoid of the token's state, one per head, as MoSA heads are",
    )
    head_dim: int = key(64, "h', of all heads (heads * head_dim need not equal hidden_size)", at_least=1, at_most=2**16)
    activation: str = key("gelu", "gelu (two matrices) | swiglu (three)", choices=("gelu", "swiglu"))
    normalization: str = key("LayerNorm", "LayerNorm | RMSNorm", choices=("LayerNorm", "RMSNorm"))
    tie_embeddings: bool = key(False, "share one matrix between input and output embeddings")
    attend_within_documents: bool = key(False, "true: attention of every head stays within each document")
    restart_rotary: bool = key(False, "true: positions restart at each document; changes results by rounding only")
    rotary_percent: float = key(0.5, "share of head_dim that is rotated", at_least=0, at_most=1)
    rotary_base: float = key(10000.0, "base of the rotary frequencies", above=0, at_most=10**12)
    layernorm_epsilon: float = key(1e-5, "added to the variance in norms", above=0, at_most=_LARGE)
    init_method_std: float = key(
        0.02,
        "of normal initial weights; MoSA heads use uniform ones, as in the authors' code",
        above=0,
        at_most=_LARGE,
    )
    vocab_size_multiple: int = key(
        128, "the vocabulary is padded to a multiple of this, in every layout", at_least=1, at_most=2**20
    )

    @property
    def mlp_width(self) -> int:
        """``ffn_hidden_size``, or its default."""
        return self.ffn_hidden_size or 4 * self.hidden_size


def default_load_feedback(selection: str) -> float:
    """Return the load feedback of models that set none (docs/causal.md)."""
    return 0.1 if selection == "threshold" else 0.0


@dataclass
class MosaSection:
    """MoSA heads (arXiv 2505.00315, section 3)."""

    num_heads: int = required("MoSA heads; 0: a dense model", at_least=0, at_most=2**16, counts="MoSA")
    sparsity: float = key(
        16.0,
        "rho: each head selects k = max(floor(sequence_length / rho), 2) tokens",
        at_least=1,
        at_most=2**24,
        reason="a head selects sequence_length / sparsity tokens, and 1 selects them all",
    )
    include_first_token: bool = key(True, "always select token 0 (within documents: the first token of each)")
    selection: str = key(
        "expert_choice",
        "expert_choice (the paper's; not causal) | threshold (tokens above a threshold) | token_choice (by each token)",
        choices=("expert_choice", "threshold", "token_choice"),
    )
    selection_scope: str = key(
        "sequence",
        "sequence: k tokens of the packed sequence | document: k of each document, by its length",
        choices=("sequence", "document"),
    )
    capacity_factor: float = key(
        1.25,
        "threshold, token_choice: in training a head takes at most this many times k tokens, the earliest first",
        at_least=1,
        at_most=2**24,
        reason="at 1 a head takes exactly its share, at mosa.sparsity every token",
    )
    threshold_ema: float = key(0.1, "threshold: weight of the last batch in the moving average", above=0, at_most=1)
    threshold_warmup_steps: int = key(
        250, "threshold: steps of expert choice at the start, while thresholds are tracked", at_least=1
    )
    load_feedback: float | None = key(
        None,
        "threshold: rise in logits per token taken beyond the head's share; null: 0.1 with thresholds, else 0",
        at_least=0,
        at_most=_LARGE,
    )
    balance_rate: float = key(
        1e-3,
        "token_choice: change per step of a head's bias towards equal loads of the heads",
        at_least=0,
        at_most=_LARGE,
    )
    backend: str = key(
        "auto", "auto (Triton on GPUs, else naive) | naive | triton", choices=("auto", "naive", "triton")
    )


@dataclass
class ParallelSection:
    """How the model and the optimizer state are divided among the ranks."""

    tensor_model_parallel_size: int = key(1, "must divide the number of heads of each kind", at_least=1, at_most=2**16)
    sequence_parallel: bool = key(False, "split activations between layers over the sequence; for sizes above 1")
    tensor_parallel_overlap: str = key(
        "auto",
        "auto: two halves of a micro-batch take turns, one computes while the other communicates; none",
        choices=("auto", "none"),
    )
    pipeline_model_parallel_size: int = key(1, "not implemented: must be 1")
    context_parallel_size: int = key(1, "not implemented: must be 1")
    zero_stage: int = key(
        1,
        "ZeRO: 0 replicates; 1, 2, 3 partition optimizer, gradients, parameters",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer: bool = key(False, "keep optimizer state and its step on the CPU; needs ZeRO 1 to 3")


@dataclass
class DataSection:
    """Where the text comes from and how it is cut into samples."""

    path: str | None = key(None, "written by `mosa data build`, read by training; this or blend")
    blend: list[str] = key([], "train on several datasets, by shares of samples: ['0.7 data/web', '0.3 data/code']")
    sources: list[str] = key(["stdlib"], "stdlib | .txt, .jsonl, .parquet or directories | hf:NAME[:CONFIG][@SPLIT]")
    text_field: str = key("text", "the column that holds the text in JSON lines and Parquet")
    streaming: bool = key(True, "stream hf: datasets; false: download them completely before the build")
    stream_timeout: float = key(
        300.0, "seconds without a document after which a stream counts as stalled", above=0, at_most=604_800
    )
    tokenizer: str | None = key(
        None, "null: train a byte-level BPE; or a tokenizer.json, or a Hugging Face tokenizer directory or name"
    )
    tokenizer_bytes: int = key(
        200_000_000, "maximum bytes of text, over all sources, to train the BPE on: the start of each", at_least=1
    )
    vocab_size: int = key(8000, "size of the trained BPE", at_least=1, at_most=2**24)
    validation_fraction: float = key(
        0.01, "share of documents held out, chosen by a hash of their text", above=0, below=1
    )
    sequence_length: int = required(
        "T, tokens per sample", at_least=2, at_most=2**24, reason="a MoSA head selects at least 2 tokens"
    )
    shard_bytes: int = key(256_000_000, "text between two points at which an interrupted build can resume", at_least=1)
    check_hashes: bool = key(
        True, "verify the dataset against its manifest: up to 1 GB before the start, more during the run"
    )
    index_path: str | None = key(None, "directory of shuffled orders (see `mosa data index`); null: below path")
    index_samples: int | None = key(
        None,
        "samples in one shuffled pass; null: what the first start needs, recorded in the run",
        at_least=1,
        at_most=2**31 - 1,
    )
    num_workers: int = key(1, "loader processes per rank; 0: load in the training process", at_least=0, at_most=256)


@dataclass
class TrainSection:
    """Length, batch sizes, precision and memory use of training."""

    steps: int = required("length of training and of the learning-rate schedule", at_least=1, at_most=10**9)
    stop_after_step: int | None = key(None, "stop early, with the schedule and data order of the full run", at_least=1)
    skip_steps: list[int] = key([], "steps whose batches are skipped, for data that breaks the run", at_least=1)
    micro_batch_size: int = required("samples a rank processes at once", at_least=1, at_most=2**24)
    global_batch_size: int = required(
        "samples per step, over all ranks and accumulation steps", at_least=1, at_most=2**24
    )
    precision: str = key(
        "bf16", "fp32 | bf16 (fp32 master weights and gradient accumulation)", choices=("fp32", "bf16")
    )
    recompute: str = key(
        "none",
        "none | attention | full (whole layers): recomputed in backward instead of kept in memory",
        choices=("none", "attention", "full"),
    )
    acceleration: str = key(
        "auto",
        "auto: compiled layers and CUDA graphs on GPUs, where supported | none",
        choices=("auto", "none"),
    )
    apex: str = key(
        "auto",
        "NVIDIA apex's FusedAdam and fused norms: auto (where installed and supported) | never | always",
        choices=("auto", "never", "always"),
    )
    profile_steps: list[int] = key(
        [], "steps of which a trace and a memory snapshot are written to profile/", at_least=1
    )
    profile_ranks: list[int] = key([0], "ranks that write them", at_least=0)
    deterministic: bool = key(True, "use torch's deterministic algorithms, on CPUs and GPUs; slower on GPUs")


@dataclass
class OptimizerSection:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = key(2.5e-4, "peak, reached after warmup_steps", above=0, at_most=_LARGEST)
    min_learning_rate: float = key(2.5e-5, "reached at the last step", at_least=0, at_most=_LARGEST)
    schedule: str = key(
        "cosine",
        "cosine | linear | constant | wsd (stable, then linear over the last steps)",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    warmup_steps: int = key(0, "linear from 0", at_least=0)
    decay_fraction: float = key(0.2, "wsd: share of the steps that decays", above=0, at_most=1)
    beta1: float = key(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = key(0.95, "decay of the second moment", at_least=0, below=1)
    epsilon: float = key(1e-8, "added to the root of the second moment", above=0, at_most=_LARGE)
    weight_decay: float = key(0.1, "on matrices, not on norms", at_least=0, at_most=_LARGE)
    gradient_clipping: float = key(1.0, "by global norm; 0: off", at_least=0, at_most=_LARGEST)


@dataclass
class ValidationSection:
    """How often, and on how much of the validation split, the loss is measured."""

    interval: int = key(100, "steps", at_least=1)
    num_samples: int = key(256, "the first samples of the validation split, always the same", at_least=1, at_most=10**8)


@dataclass
class CheckpointSection:
    """How often checkpoints are written, how many are kept, and how a run starts from them."""

    interval: int = key(500, "steps; the last step is always saved", at_least=1)
    keep_last: int = key(2, "older checkpoints are removed, except permanent ones", at_least=1)
    permanent_interval: int | None = key(
        None, "steps between permanent checkpoints, which keep_last spares; null: none", at_least=1
    )
    keep_permanent: int | None = key(None, "how many of these to keep, newest first; null: all", at_least=1)
    asynchronous: bool = key(True, "train while a checkpoint is written; only the copy to host memory blocks")
    resume: str = key(
        "auto",
        "auto: continue from the newest checkpoint | never: refuse to start in a used run directory",
        choices=("auto", "never"),
    )
    initialize_from: str | None = key(
        None, "checkpoint whose weights a first start takes, without optimizer state; null: initial weights by seed"
    )


@dataclass
class ResilienceSection:
    """When a run stops itself, and how it handles non-finite steps and loss spikes."""

    stop_before_limit: float = key(
        120.0, "seconds before a Slurm job's time limit at which the run saves and stops", at_least=0, at_most=_YEAR
    )
    hang_timeout: float = key(
        1800.0,
        "seconds without a step, validation batch or save before the run is ended; 0: never",
        at_least=0,
        at_most=_YEAR,
    )
    rendezvous_timeout: float = key(600.0, "seconds for all ranks to join", above=0, at_most=_YEAR)
    max_skipped_steps: int = key(5, "consecutive non-finite steps before the run gives up", at_least=1)
    spike_sigmas: float = key(
        6.0, "a loss this many standard deviations above the mean of the last ones is a spike", above=0
    )
    spike_window: int = key(128, "losses in that mean", at_least=1, at_most=10**6)
    on_spike: str = key(
        "log", "log | rewind (to the checkpoint before, skipping the step of the spike)", choices=("log", "rewind")
    )
    max_rewinds: int = key(3, "rewinds before spikes are only logged", at_least=0)


@dataclass
class FaultInjectionSection:
    """A fault to inject once per run directory, to test what a run survives."""

    fault: str | None = key(
        None,
        "null | kill | stop | pause | error | SIGTERM | SIGUSR1 | nan | garbage",
        choices=(None, "kill", "stop", "pause", "error", "SIGTERM", "SIGUSR1", "nan", "garbage"),
    )
    rank: int = key(0, "rank that gets the fault", at_least=0)
    step: int = key(1, "step at which it gets it", at_least=1)
    place: str = key(
        "step",
        "step (before it is computed) | validation (after it) | save (once it has begun)",
        choices=("step", "validation", "save"),
    )
    seconds: float = key(30.0, "length of a pause; a signal ends it", at_least=0, at_most=604_800)


@dataclass
class LoggingSection:
    """What is reported, and how often."""

    interval: int = key(10, "steps", at_least=1)
    tensorboard: bool = key(True, "write TensorBoard events")
    wandb_project: str | None = key(None, "Weights & Biases project, if wandb is installed; null: off")
    peak_tflops: float | None = key(
        None, "per device, for MFU; null: from a table of GPUs, or measured on a CPU", above=0
    )


@dataclass
class Config:
    """The whole configuration of a run."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    mosa: MosaSection = field(default_factory=MosaSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    resilience: ResilienceSection = field(default_factory=ResilienceSection)
    fault_injection: FaultInjectionSection = field(default_factory=FaultInjectionSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    @property
    def heads_per_token(self) -> int:
        """How many MoSA heads a token takes with token choice: round(E / rho)."""
        return round(self.mosa.num_heads / self.mosa.sparsity)

    @property
    def fixed_stride(self) -> int:
        """``model.fixed_stride``, or its default."""
        return self.model.fixed_stride or int(self.mosa.sparsity)

    @property
    def routing_clusters(self) -> int:
        """``model.routing_clusters``, or its default."""
        return self.model.routing_clusters or int(self.mosa.sparsity)
