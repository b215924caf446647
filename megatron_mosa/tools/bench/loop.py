"""What a run adds to its steps: loading, agreement of ranks, status, checks and logging."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from megatron_mosa.config import Config
from megatron_mosa.engine import Batch, StepResult, TrainingEngine
from megatron_mosa.parallel import HostGroup, Layout
from megatron_mosa.resilience import ResilienceServices
from megatron_mosa.tools.bench.samples import random_batches
from megatron_mosa.train import Callback, Heartbeat, Progress, StepMonitor, Trainer, TrainingState, Writers

WARM_UPS = 3  # steps in which loader processes start


@dataclass
class LoopTime:
    """Milliseconds of a step in a run that are not training, medians over the steps of one rank."""

    loading: float
    """Waiting for batches from ``data.num_workers`` processes."""

    between: float
    """From the end of a step to the next one: heartbeat, agreement on a stop, checks of the loss."""

    logging: float
    """What a step takes longer that writes a line of metrics, not the first such."""

    step: float
    """The whole step in the run."""

    @property
    def share(self) -> float:
        """Of a step that writes no line, what is not training."""
        return (self.loading + self.between) / self.step


class _Clock(Callback):
    """Times steps from within. It must be the last callback, whose context is the innermost."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.inside: list[float] = []  # seconds of a step in the engine
        self.loading: list[float] = []  # of these, waiting for batches

    @contextlib.contextmanager
    def around_step(self, trainer: Trainer, step: int) -> Iterator[None]:
        """Time the engine's step."""
        self.loading.append(0.0)
        start = time.perf_counter()
        yield
        self.inside.append(time.perf_counter() - start)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Note when the step has ended, with what the callbacks before this one did."""
        self.ends.append(time.perf_counter())

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, noting how long they take."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.loading[-1] += time.perf_counter() - start
            yield batch

    def result(self) -> LoopTime:
        """Sum up, without the first steps; the last two wrote a line of metrics."""
        whole = [1000 * (end - start) for start, end in zip(self.ends, self.ends[1:], strict=False)][WARM_UPS - 1 :]
        inside, loading = ([1000 * s for s in times[WARM_UPS:]] for times in (self.inside, self.loading))
        between = [step - in_engine for step, in_engine in zip(whole, inside, strict=True)]
        step = median(whole[:-2])
        return LoopTime(median(loading[:-2]), median(between[:-2]), max(0.0, whole[-1] - step), step)


def time_loop(config: Config, engine: TrainingEngine, layout: Layout, steps: int) -> LoopTime:
    """Take steps as a run does, without validation and checkpoints; a collective.

    Args:
        config: of the engine.
        engine: has taken its first steps.
        layout: of this process.
        steps: to time, 1 or more, and two more that write a line of metrics.

    Raises:
        KeyboardInterrupt: a signal, or the job's time limit, asked to stop.
    """
    last = WARM_UPS + steps + 2
    train = replace(config.train, steps=max(last, config.train.steps), stop_after_step=last, skip_steps=[])
    logging = replace(config.logging, interval=last - 1, wandb_project=None)  # the last step writes a line all the same
    config = replace(config, train=train, logging=logging)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        services = ResilienceServices.begin(config, Path(folder), layout.rank)
        services.join(layout, HostGroup())
        try:
            writers = Writers(config, Path(folder), is_main=layout.is_main, resumed_step=0)
            writers.start()
            callbacks = [
                Heartbeat(services),
                StepMonitor(writers, config.resilience),
                Progress(writers, config.data.vocab_size),
                clock,
            ]
            trainer = Trainer(config, engine, layout, TrainingState(), callbacks, services)
            trainer.run(clock.timed(random_batches(config, layout, config.data.num_workers)))
            writers.close()
            services.peers.leave()
            if trainer.stop_reason:  # a signal, which the run's handlers have caught
                raise KeyboardInterrupt
        finally:
            services.end()
    return clock.result()
