"""The typed tree behind a YAML file: one dataclass a section, one field a key.

configs/quickstart.yaml explains every key; here stand types and defaults. ``MISSING`` marks the keys that a
file must give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class RunSection:
    """Who the run is and where it writes: ``directory/name``."""

    name: str = MISSING
    directory: str = "runs"
    seed: int = 1234


@dataclass
class ModelSection:
    """A GPT of pre-norm layers; dense and local heads stand beside the MoSA heads of section ``mosa``."""

    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int | None = None  # None: 4 * hidden_size
    num_dense_heads: int = 4
    num_query_groups: int | None = None  # None: as many as dense heads
    num_local_heads: int = 0
    local_window: int | None = None  # None: data.sequence_length / mosa.sparsity
    head_dim: int = 64
    activation: str = "gelu"
    normalization: str = "LayerNorm"
    tie_embeddings: bool = False
    attend_within_documents: bool = False
    restart_rotary: bool = False
    rotary_percent: float = 0.5
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    vocab_size_multiple: int = 128


@dataclass
class MosaSection:
    """MoSA heads (arXiv 2505.00315, section 3)."""

    num_heads: int = MISSING
    sparsity: float = 16.0
    include_first_token: bool = True
    selection: str = "expert_choice"
    selection_scope: str = "sequence"
    capacity_factor: float = 2.0
    threshold_ema: float = 0.1
    threshold_warmup_steps: int = 250
    load_feedback: float = 0.0
    backend: str = "auto"


@dataclass
class ParallelSection:
    """How the model and the optimizer state are spread over the ranks."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    zero_stage: int = 1
    offload_optimizer: bool = False


@dataclass
class DataSection:
    """Where the text comes from and how it is cut into samples."""

    path: str | None = None  # this or blend
    blend: list[str] = field(default_factory=list)  # "WEIGHT PATH" each
    sources: list[str] = field(default_factory=lambda: ["stdlib"])
    text_field: str = "text"
    streaming: bool = True
    stream_timeout: float = 300.0
    tokenizer: str | None = None  # None: train a byte-level BPE on the sources
    tokenizer_bytes: int = 200_000_000
    vocab_size: int = 8000
    validation_fraction: float = 0.01
    sequence_length: int = MISSING
    shard_bytes: int = 256_000_000
    check_hashes: bool = True
    index_path: str | None = None  # None: below path
    index_samples: int | None = None  # None: train.steps * train.global_batch_size of the first start
    num_workers: int = 1


@dataclass
class TrainSection:
    """The length and the arithmetic of training."""

    steps: int = MISSING
    stop_after_step: int | None = None
    skip_steps: list[int] = field(default_factory=list)
    micro_batch_size: int = MISSING
    global_batch_size: int = MISSING
    precision: str = "bf16"
    recompute: str = "none"
    apex: str = "auto"
    deterministic: bool = True


@dataclass
class OptimizerSection:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 2.5e-4
    min_learning_rate: float = 2.5e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0


@dataclass
class ValidationSection:
    """How often and on how much of the validation split the loss is measured."""

    interval: int = 100
    num_samples: int = 256


@dataclass
class CheckpointSection:
    """How often checkpoints are written, how many are kept, and what a start does with them."""

    interval: int = 500
    keep_last: int = 2
    permanent_interval: int | None = None
    keep_permanent: int | None = None
    asynchronous: bool = True
    resume: str = "auto"
    initialize_from: str | None = None


@dataclass
class ResilienceSection:
    """When a run stops itself, and what it does about steps that go wrong."""

    stop_before_limit: float = 120.0
    hang_timeout: float = 1800.0
    rendezvous_timeout: float = 600.0
    max_skipped_steps: int = 5
    spike_sigmas: float = 6.0
    spike_window: int = 128
    on_spike: str = "log"
    max_rewinds: int = 3


@dataclass
class FaultInjectionSection:
    """A fault to be had on purpose, once: for tests of what a run survives."""

    fault: str | None = None
    rank: int = 0
    step: int = 1
    place: str = "step"
    seconds: float = 30.0


@dataclass
class LoggingSection:
    """What is reported, and how often."""

    interval: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None
    peak_tflops: float | None = None


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
