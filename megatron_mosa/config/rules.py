"""Rules that a configuration must satisfy, each with one small function and one readable message."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields

from megatron_mosa.config.blend import blend_parts
from megatron_mosa.config.heads import divisible_counts
from megatron_mosa.config.keys import keys_of
from megatron_mosa.config.mosa_rules import documents, threshold
from megatron_mosa.config.schema import Config
from megatron_mosa.errors import UserError

COMMAND_LINE = "command line"
"""The origin of a value that an override has set."""


def check(config: Config, *, checks_batches: bool = True) -> None:
    """Apply every rule that needs only the configuration.

    Args:
        checks_batches: False if ``check_world_size`` follows, which checks the batch sizes for all data-parallel ranks.

    Raises:
        UserError: the first rule that is broken.
    """
    for rule in _RULES:
        rule(config)
    if checks_batches:
        _check_batches(config, 1)


def check_world_size(config: Config, world_size: int) -> int:
    """Return the data-parallel size of ``world_size`` ranks.

    Raises:
        UserError: the layout or the batch sizes do not divide among the ranks.
    """
    tensor_parallel = config.parallel.tensor_model_parallel_size
    if world_size < 1:
        raise UserError(f"the world size must be at least 1, got {world_size}; start one process or more")
    if world_size % tensor_parallel:
        raise UserError(
            f"world size {world_size} is not divisible by parallel.tensor_model_parallel_size={tensor_parallel}; "
            f"start a multiple of {tensor_parallel} processes (torchrun --nproc-per-node {tensor_parallel}) or set it "
            f"to one of {divisors(world_size, *divisible_counts(config).values())}"
        )
    data_parallel = world_size // tensor_parallel
    _check_batches(config, data_parallel)
    if (last := max(config.train.profile_ranks, default=0)) >= world_size:
        raise UserError(f"train.profile_ranks must be less than the number of ranks, {world_size}, got {last}")
    return data_parallel


def _check_batches(config: Config, ranks: int) -> None:
    """Check that a step consists of whole micro-batches on all data-parallel ranks."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    samples = micro * ranks
    if batch % samples == 0:
        return
    product = f" x {ranks} data-parallel ranks = {samples}" if ranks > 1 else ""
    raise UserError(
        f"train.global_batch_size={batch} must be divisible by train.micro_batch_size={micro}{product}; set "
        + ", or ".join(_batches_that_fit(batch, micro, ranks))
    )


def _batches_that_fit(batch: int, micro: int, ranks: int) -> list[str]:
    """Return the nearest settings that each, alone, give whole micro-batches."""
    samples = micro * ranks
    fixes = [f"train.global_batch_size={max(1, round(batch / samples)) * samples}"]
    if batch % ranks == 0:
        sizes = divisors(batch // ranks)
        below, above = [size for size in sizes if size < micro], [size for size in sizes if size > micro]
        fixes.append("train.micro_batch_size=" + " or ".join(map(str, below[-1:] + above[:1])))
    return fixes


def divisors(*numbers: int) -> list[int]:
    """Return the common divisors of some numbers, smallest first; every number divides zero."""
    common = math.gcd(*numbers)
    return [size for size in range(1, common + 1) if common % size == 0]


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Return the vocabulary size rounded up to ``multiple``, which depends on the data but never on the layout."""
    return -(-vocab_size // multiple) * multiple


LONGEST_NAME = 200  # file systems allow 255, and some names are longer by a time or a number
_LONGEST_PROJECT, _NOT_IN_PROJECT = 128, "/\\#?%:"  # as W&B's settings check them
_INDEX_LIMIT = 2**31 - 1  # as at_most of data.index_samples


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _values(config: Config) -> None:
    """Check each value against the choices and bounds of its field."""
    for section in fields(config):
        values = getattr(config, section.name)
        for name, key in keys_of(type(values)).items():
            value = getattr(values, name)  # the type has rejected null where it is not allowed
            if value is not None and (message := key.error_message(f"{section.name}.{name}", value)):
                raise UserError(message)


def _profiled_steps(config: Config) -> None:
    steps = config.train.steps
    if (last := max(config.train.profile_steps, default=0)) > steps:
        raise UserError(f"train.profile_steps must be at most train.steps={steps}, got {last}")


def check_plan(config: Config, origins: Mapping[str, str]) -> None:
    """Check what makes no sense in a run to come, though a checkpoint may record it.

    A run that the command line shortens below the warm-up of its file is a trial, and may be.

    Args:
        origins: where each value is from, as ``load.origins`` returns it.

    Raises:
        UserError: the learning rate would never reach its peak; the run would end before it stops early; its order of
            samples is too long for one index; W&B allows no project of that name.
    """
    train, samples = config.train, config.train.steps * config.train.global_batch_size
    is_trial = origins["train.steps"] == COMMAND_LINE != origins["optimizer.warmup_steps"]
    if config.optimizer.warmup_steps > train.steps and not is_trial:
        raise UserError(
            f"optimizer.warmup_steps must be at most train.steps={train.steps}, got {config.optimizer.warmup_steps}: "
            "the learning rate would never reach its peak; lower it, or train longer"
        )
    if train.stop_after_step is not None and train.stop_after_step > train.steps:
        raise UserError(
            f"train.stop_after_step must be at most train.steps={train.steps}, got {train.stop_after_step}; lower it, "
            "or set it to null"
        )
    if config.data.index_samples is None and samples > _INDEX_LIMIT:
        raise UserError(
            f"train.steps={train.steps} x train.global_batch_size={train.global_batch_size} are {samples:,} samples, "
            f"but one shuffled pass holds at most {_INDEX_LIMIT:,}; set data.index_samples, by which a run takes "
            "several passes"
        )
    project = config.logging.wandb_project or ""
    if len(project) > _LONGEST_PROJECT or set(project) & set(_NOT_IN_PROJECT):
        raise UserError(
            f"logging.wandb_project must have at most {_LONGEST_PROJECT} characters and none of "
            f"{' '.join(_NOT_IN_PROJECT)} (a rule of W&B), got {project}; give another, or null"
        )


def _parallelism_that_exists(config: Config) -> None:
    for key in ("parallel.pipeline_model_parallel_size", "parallel.context_parallel_size"):
        if _value(config, key) != 1:
            kind = key.removeprefix("parallel.").partition("_")[0]
            raise UserError(f"{key} must be 1, got {_value(config, key)}: {kind} parallelism is not implemented")


def _zero_cells(config: Config) -> None:
    """Reject what DeepSpeed does not support; all else of ZeRO 0-3 x tensor x sequence parallelism is tested."""
    parallel = config.parallel
    if parallel.zero_stage == 0 and config.train.precision == "bf16":
        raise UserError(
            "parallel.zero_stage=0 with train.precision=bf16 is not supported: DeepSpeed cannot accumulate its "
            "gradients in fp32; set parallel.zero_stage=1, or train.precision=fp32"
        )
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        raise UserError(
            "parallel.offload_optimizer=true with parallel.zero_stage=0 is not supported: nothing is partitioned; "
            "set parallel.zero_stage=1"
        )


def _apex(config: Config) -> None:
    parallel = config.parallel
    if config.train.apex == "always" and (parallel.zero_stage == 3 or parallel.offload_optimizer):
        key = "zero_stage=3" if parallel.zero_stage == 3 else "offload_optimizer=true"
        raise UserError(
            f"train.apex=always with parallel.{key} is not supported: apex's FusedAdam handles neither the parts that "
            "ZeRO-3 steps one by one nor state on the CPU; set train.apex=auto (torch's AdamW, apex's norms)"
        )


def _sequence(config: Config) -> None:
    length, parallel = config.data.sequence_length, config.parallel
    if parallel.sequence_parallel and length % parallel.tensor_model_parallel_size:
        raise UserError(
            f"data.sequence_length={length} is not divisible by parallel.tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size}, as sequence parallelism requires; sizes that divide it: "
            f"{divisors(length)}"
        )


def _listed(number: int) -> str:
    return "".join(f", {divisor}" for divisor in divisors(number)) if number else ""


def _heads(config: Config) -> None:
    model, size, heads = config.model, config.parallel.tensor_model_parallel_size, divisible_counts(config)
    if not any(heads.values()):
        raise UserError(f"{', '.join(heads)} are all 0, so the model has no heads; set at least one of them above 0")
    groups = model.num_query_groups
    if groups is not None and (not model.num_dense_heads or model.num_dense_heads % groups):
        raise UserError(
            f"model.num_query_groups={groups} does not divide model.num_dense_heads={model.num_dense_heads}; set it "
            f"to one of null{_listed(model.num_dense_heads)}"
        )
    for key, count in heads.items():
        if count % size:
            raise UserError(
                f"{key}={count} is not divisible by parallel.tensor_model_parallel_size={size}; sizes that divide all "
                f"heads: {divisors(*heads.values())}"
            )
    if model.local_window is not None and not model.num_local_heads:
        raise UserError(
            f"model.local_window={model.local_window} has no local heads to apply to; set model.num_local_heads, or "
            "model.local_window=null: dense and MoSA heads have no window"
        )
    if model.attention_gate and not model.num_dense_heads + model.num_local_heads:
        raise UserError(
            "model.attention_gate=true gates dense and local heads, but there are none: MoSA heads are gated by their "
            "score, and fixed and Routing heads have no gate; set model.attention_gate=false"
        )


def _fixed_heads(config: Config) -> None:
    model, stride = config.model, config.fixed_stride
    if not model.num_fixed_heads:
        if model.fixed_stride is not None:
            raise UserError(
                f"model.fixed_stride={model.fixed_stride} has no fixed heads to apply to; set model.num_fixed_heads, "
                "or model.fixed_stride=null"
            )
    elif stride >= config.data.sequence_length:
        key = "mosa.sparsity" if model.fixed_stride is None else "model.fixed_stride"
        raise UserError(
            f"{key}={stride} leaves fixed heads only token 0 of data.sequence_length={config.data.sequence_length}; "
            "set model.fixed_stride below that"
        )


def _routing_heads(config: Config) -> None:
    model, clusters, length = config.model, config.routing_clusters, config.data.sequence_length
    if not model.num_routing_heads:
        if model.routing_clusters is not None:
            raise UserError(
                f"model.routing_clusters={model.routing_clusters} has no Routing heads to apply to; set "
                "model.num_routing_heads, or model.routing_clusters=null"
            )
        return
    key = "mosa.sparsity" if model.routing_clusters is None else "model.routing_clusters"
    if clusters < 2:
        raise UserError(
            f"{key}={config.mosa.sparsity:g} gives Routing heads {clusters} cluster; set model.routing_clusters to at "
            "least 2"
        )
    if clusters > length // 2:
        raise UserError(
            f"{key}={clusters} leaves each cluster of Routing heads fewer than 2 of data.sequence_length={length} "
            f"tokens; set model.routing_clusters to at most {length // 2}"
        )


def _partitioned_widths(config: Config) -> None:
    size = config.parallel.tensor_model_parallel_size
    for key, width in (
        ("model.ffn_hidden_size", config.model.mlp_width),
        ("model.vocab_size_multiple", config.model.vocab_size_multiple),
    ):
        if width % size:
            raise UserError(
                f"{key}={width} is not divisible by parallel.tensor_model_parallel_size={size}; "
                f"the next multiple is {-(-width // size) * size}"
            )


def _rotary(config: Config) -> None:
    if config.model.head_dim % 2:
        raise UserError(f"model.head_dim must be even, got {config.model.head_dim}: rotary embedding rotates pairs")


def _schedule(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} exceeds optimizer.learning_rate="
            f"{optimizer.learning_rate}; lower it to at most that"
        )


def _data(config: Config) -> None:
    if not config.data.sources:
        raise UserError(
            "data.sources is empty; give 'stdlib', paths of text, JSON Lines or Parquet files, directories, or hf:NAME"
        )


def _dataset(config: Config) -> None:
    parts = blend_parts(config.data.blend)
    if parts and config.data.path is not None:
        raise UserError(
            f"data.path={config.data.path} and data.blend={config.data.blend} are both given; keep one of them: "
            "data.path=null or data.blend=[]"
        )
    if not parts and not config.data.path:
        raise UserError("data.path is missing; set it to the directory of a dataset, or list several in data.blend")


def _run_name(config: Config) -> None:
    if len(config.run.name) > LONGEST_NAME:
        raise UserError(
            f"run.name must have at most {LONGEST_NAME} characters, got {len(config.run.name)}: it names a directory"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", config.run.name):
        raise UserError(
            f"run.name must contain only letters, digits, '.', '_' and '-', and not start with '.' or '-', got "
            f"{config.run.name!r}"
        )


_RULES: tuple[Callable[[Config], None], ...] = (
    _run_name, _parallelism_that_exists, _values, _profiled_steps, _zero_cells, _apex, _sequence, _heads, _fixed_heads,
    _routing_heads, documents, threshold, _partitioned_widths, _rotary, _schedule, _data, _dataset,
)  # fmt: skip
