"""Pretraining from a configuration: assemble the parts, resume, train, report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

from megatron_mosa.checkpoint import CheckpointStore, load_initial_weights
from megatron_mosa.config import Config
from megatron_mosa.data import FileHash, is_large, training_batches
from megatron_mosa.engine import Batch, DeepSpeedEngine
from megatron_mosa.entry import exit_code_of, joined, report_error
from megatron_mosa.errors import RunError, StorageError
from megatron_mosa.exit_codes import DONE, STOPPED
from megatron_mosa.metrics import read_journal
from megatron_mosa.model import parameter_count
from megatron_mosa.parallel import (
    FirstFailure,
    HostGroup,
    Layout,
    destroy_parallel,
    initialize_parallel,
    is_lost_connection,
    join_store,
    launch_environment,
    on_main_rank,
    use_deterministic_algorithms,
)
from megatron_mosa.resilience import ResilienceServices
from megatron_mosa.train.callbacks.checkpointing import Checkpointing
from megatron_mosa.train.callbacks.data_check import DataCheck
from megatron_mosa.train.callbacks.faults import Faults
from megatron_mosa.train.callbacks.monitoring import Heartbeat, StepMonitor
from megatron_mosa.train.callbacks.profiling import Profiling
from megatron_mosa.train.callbacks.progress import Progress
from megatron_mosa.train.callbacks.validation import Validation
from megatron_mosa.train.directory import RunDirectory
from megatron_mosa.train.plan import refuse_impossible
from megatron_mosa.train.report import report
from megatron_mosa.train.rewind import Rewinder, skipped_steps
from megatron_mosa.train.start import (
    ResumePoint,
    check_start,
    end_of_samples,
    mosa_backend,
    training_samples,
    validation_samples,
)
from megatron_mosa.train.trainer import Trainer, TrainingState
from megatron_mosa.train.writers import Writers
from megatron_mosa.utils import first_line, log_libraries, tolerating


def pretrain(config: Config) -> int:
    """Train to ``train.steps`` or ``train.stop_after_step``, whichever comes first.

    Training starts from the run's newest checkpoint; without one, from the weights of ``checkpoint.initialize_from``;
    without those, from weights drawn from the seed. Writes the run directory (config.yaml, metrics.jsonl, checkpoints/,
    loss.png, TensorBoard events, status.json). A collective over all ranks of the job.

    Returns:
        ``exit_codes.DONE``, or ``STOPPED`` if a signal or the job's time limit ended it early, with a checkpoint.

    Raises:
        UserError: ``check_start`` rejects the run, or the run directory cannot be written.
        UnrecoverableError: losses stay non-finite.
        RunError: not all ranks joined, or the last checkpoint could not be written.
    """
    if config.train.deterministic:
        use_deterministic_algorithms()
    rank, world_size, _ = launch_environment()
    services = ResilienceServices.begin(config, config.run.path, rank)
    try:
        stopped = _pretrain(config, rank, world_size, services)
        services.peers.leave()
    except Exception as error:
        reason = str(error) or type(error).__name__
        services.status.end(exit_code_of(error), reason if reason.startswith("rank ") else f"rank {rank}: {reason}")
        if getattr(error, "of_all_ranks", False):  # or this rank's end would end another that is still saving
            services.peers.leave()
        raise
    finally:
        destroy_parallel()
        services.end()
    return STOPPED if stopped else DONE


def _pretrain(config: Config, rank: int, world_size: int, services: ResilienceServices) -> str | None:
    """Join the other ranks, train and report; return the reason for an early stop, if there was one."""
    start = check_start(config, world_size, reads_all=rank == 0)
    refuse_impossible(config, start.manifest.vocab_size)
    services.watchdog.beat("joining the other ranks")
    store = join_store(config.resilience.rendezvous_timeout)
    with _failing_with_one_line(FirstFailure(store, rank, world_size)) if world_size > 1 else nullcontext():
        layout = initialize_parallel(config.parallel.tensor_model_parallel_size, config.run.seed, store=store)
        services.join(layout, HostGroup())
        return _train_or_report(config, start, layout, services)


@contextmanager
def _failing_with_one_line(first: FirstFailure) -> Iterator[None]:
    """Print the error that ends this rank while the others are still there, if none of them has failed before.

    Raises:
        RunError: this rank lost the connection to another one, which may have said why it failed.
    """
    with joined(first.rank, first.claim):
        try:
            yield
        except Exception as error:
            if not report_error(error):
                if is_lost_connection(error):
                    lost = f"rank {first.rank} lost the connection to another rank, whose own output may say why"
                    error = RunError(first.another() or lost)
                    report_error(error)
                else:  # its traceback says it
                    first.claim(f"rank {first.rank}: {type(error).__name__}: {first_line(error)}")
            destroy_parallel()  # the others notice
            first.wait_for_the_others()
            raise error from error.__cause__


def _train_or_report(config: Config, start: ResumePoint, layout: Layout, services: ResilienceServices) -> str | None:
    """Train if there are steps left, and report; return the reason for an early stop, if there was one."""
    # On a shared file system, nodes may temporarily see different files: all ranks use what rank 0 has found.
    start, last_validated = on_main_rank(lambda: (start, _last_validated(start)))
    config = replace(config, data=replace(config.data, index_samples=start.index_samples))
    step = start.metadata.step if start.metadata else 0
    stopped = None
    if step < config.train.steps or last_validated < step:
        stopped = _train(config, start, last_validated, layout, services)
    elif layout.is_main:
        steps = config.train.steps
        if step == steps:
            print(f"The run is complete: step {step} of {steps} is in {start.checkpoint}")
        else:
            print(f"Nothing to do: step {step}, in {start.checkpoint}, is past train.steps={steps}")
    if layout.is_main:
        with tolerating("the report is not complete"):
            report(start.directory)
        services.status.end(STOPPED if stopped else DONE, stopped or "")
    return stopped


def _last_validated(start: ResumePoint) -> int:
    """Return the last step of the run that has a validation line, or 0."""
    lines = read_journal(start.directory / "metrics.jsonl")
    return max((line["step"] for line in lines if "validation_loss" in line), default=0)


def _train(
    config: Config, start: ResumePoint, last_validated: int, layout: Layout, services: ResilienceServices
) -> str | None:
    """Train; return the reason for an early stop, if there was one."""
    directory = RunDirectory(start.directory)
    _write_on_main_rank(lambda: directory.prepare(config))
    log_libraries(start.directory / "libraries.log" if layout.is_main else None)
    skipped = on_main_rank(lambda: skipped_steps(start.directory))
    services.status.begin()
    state = TrainingState(start.metadata.step, start.metadata.consumed_samples) if start.metadata else TrainingState()
    writers = Writers(
        config,
        start.directory,
        is_main=layout.is_main,
        resumed_step=state.step,
        on_failure=services.interruption.stop_as_unwritable,
    )
    _write_on_main_rank(writers.start)
    vocab_size = start.manifest.vocab_size
    writers.note(f"{start.directory}: {_describe(config, vocab_size, layout)}")
    per_step = config.train.global_batch_size // (config.train.micro_batch_size * layout.data_parallel_size)

    def batches_from(state: TrainingState) -> Iterator[Batch]:
        batches = _training_batches(config, start, state, layout)
        return services.faults.with_data_fault(batches, state.step, per_step)

    batches = batches_from(state)
    validation = validation_samples(config, start.data)
    engine = DeepSpeedEngine(config, vocab_size, layout)
    if layout.device.type == "cuda":
        writers.note(str(engine.acceleration))
    store = CheckpointStore.of(start.directory, config.checkpoint)
    _restore(engine, start, store, writers, services)
    callbacks = [
        Heartbeat(services),
        StepMonitor(writers, config.resilience),
        Progress(writers, vocab_size, validation.document_lengths()),
        Validation(writers, validation, last_validated),
        Checkpointing(writers, store, start.data_record),
        Faults(services.faults),
        Profiling(writers, start.directory),
        DataCheck(writers, on_main_rank(lambda: _large_files(config, start)), lambda: _newest(store)),
    ]
    rewinder = Rewinder(start.directory, store, writers, batches_from, config.resilience.max_rewinds)
    trainer = Trainer(config, engine, layout, state, callbacks, services, rewinder.rewind, skipped)
    recorded = start.metadata.config.get("train", {}).get("skip_steps", []) if start.metadata else []
    for surprise in _surprises(config, state.step, trainer.last_step, recorded):
        writers.note(surprise)
    with ExitStack() as cleanup:
        cleanup.callback(engine.destroy)
        cleanup.callback(store.close)
        try:
            trainer.run(batches)
        except Exception as error:
            report_error(error)  # now, since cleaning up may wait for other ranks
            raise
    if trainer.stop_reason:
        writers.note(f"stopped at step {state.step}: {trainer.stop_reason}; start the run again to resume it")
    writers.close()
    if failure := on_main_rank(lambda: writers.failure):
        raise StorageError(f"{failure}; the run stopped at step {trainer.state.step}, {_newest(store)}")
    return trainer.stop_reason


def _describe(config: Config, vocab_size: int, layout: Layout) -> str:
    """Describe what is trained where, for the log."""
    backend = f", {mosa_backend(config)} kernels for MoSA heads" if config.mosa.num_heads else ""
    return (
        f"{parameter_count(config, vocab_size):,} parameters, {config.train.precision}, on "
        f"{layout.world_size} x {layout.device.type}: tensor parallel {layout.tensor_parallel_size}, "
        f"data parallel {layout.data_parallel_size}, ZeRO {config.parallel.zero_stage}{backend}"
    )


def _surprises(config: Config, step: int, last_step: int, skipped: Sequence[int] = ()) -> Iterator[str]:
    """Yield what a user may not expect of this start.

    Args:
        step: after which the run continues.
        last_step: of this start.
        skipped: ``train.skip_steps`` of the checkpoint.
    """
    skips = config.train.skip_steps
    if too_late := sorted({number for number in skips if number <= step}.difference(skipped)):
        yield (
            f"steps {too_late} of train.skip_steps have been trained, since this run continues after step {step}; to "
            "skip them, move the checkpoints behind them away and start again"
        )
    if beyond := sorted({number for number in skips if number > config.train.steps}):
        yield f"steps {beyond} of train.skip_steps are above train.steps={config.train.steps}"
    if config.optimizer.warmup_steps > config.train.steps:
        yield (
            "the learning rate will not reach its peak: "
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is above train.steps={config.train.steps}"
        )
    if step >= last_step:
        key = "train.steps" if last_step == config.train.steps else "train.stop_after_step"
        relation = "has already reached" if step == last_step else "is past"
        yield f"nothing to do: step {step} {relation} {key}={last_step}"


def _restore(
    engine: DeepSpeedEngine, start: ResumePoint, store: CheckpointStore, writers: Writers, services: ResilienceServices
) -> None:
    """Set damaged checkpoints aside, and load the one to resume from or the weights to start with, if any."""
    for path, damage in start.damaged:
        aside = on_main_rank(functools.partial(store.set_aside, path))
        writers.note(f"checkpoint {path} is damaged: {damage}; renamed to {aside.name}")
    if start.checkpoint is not None:
        services.status.update("resuming", checkpoint=start.checkpoint.name)
        store.load(engine, start.checkpoint)
        writers.note(f"resumed from {start.checkpoint}")
    elif start.initial is not None:
        load_initial_weights(engine, start.initial)
        writers.note(f"initialized the weights from {start.initial}; the optimizer state is new")
        if start.unlike_initial:
            writers.note(f"unlike the model of these weights, this run has {', '.join(start.unlike_initial)}")


def _write_on_main_rank(action: Callable[[], None]) -> None:
    """Write files of the run directory on the main rank, without which no run can begin."""
    try:
        on_main_rank(action)
    except StorageError as error:
        raise StorageError(f"{error}; free some space, or set run.directory to another disk, and start again") from None


def _large_files(config: Config, start: ResumePoint) -> list[FileHash]:
    """Return the dataset's files if they are too large to be hashed before the start, else none."""
    files = start.data.hashes() if config.data.check_hashes else []
    return files if is_large(files) else []


def _newest(store: CheckpointStore) -> str:
    newest = store.newest().path
    return "before its first checkpoint" if newest is None else f"its last intact checkpoint is {newest}"


def _training_batches(config: Config, start: ResumePoint, state: TrainingState, layout: Layout) -> Iterator[Batch]:
    """Return this rank's micro-batches from ``state`` on. A collective."""
    samples = training_samples(config, start.data, start.index_samples)
    end = end_of_samples(config, state.step, state.consumed_samples)
    samples.prepare(state.consumed_samples, end - 1)
    return training_batches(
        samples,
        consumed_samples=state.consumed_samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel_size,
        num_workers=config.data.num_workers,
        end=end,
    )
