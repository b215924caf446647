"""A grid's models and cells: configurations with numbers of heads, checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.config import (
    LONGEST_NAME,
    CheckpointSection,
    Config,
    FaultInjectionSection,
    ResilienceSection,
    check_plan,
    check_world_size,
    config_to_dict,
    inline_yaml,
    load_config,
)
from megatron_mosa.data import Mixture, check_lengths, check_tokenizer, open_mixture
from megatron_mosa.errors import UserError
from megatron_mosa.resilience import DATA_FAULTS
from megatron_mosa.tools.decoding.lengths import tokens_needed
from megatron_mosa.tools.grid.budget import Cost, flops_cost, solve_heads
from megatron_mosa.tools.grid.grid import Grid, Member, Overrides
from megatron_mosa.tools.grid.kinds import KINDS, other_counts

# What all members at one size and on one corpus must share, or their losses could not be compared.
_SHARED = (
    "data.path", "data.blend", "data.tokenizer", "data.sequence_length", "model.vocab_size_multiple",
    "train.global_batch_size", "train.steps", "train.stop_after_step", "validation.num_samples",
    "model.attend_within_documents",
)  # fmt: skip
_SIZE = "parallel.tensor_model_parallel_size"
_OWN = ("run.name", "run.directory", "run.seed")  # the grid sets them


@dataclass(frozen=True)
class Corpus:
    """The dataset of a corpus, as a configuration names it."""

    path: str
    fingerprint: str
    vocab_size: int
    tokens: int
    """In the training split; of a blend, what one pass reads."""


@dataclass(frozen=True)
class Model:
    """A member at one size, on one corpus, at one sparsity: the same but for seed and learning rate."""

    size: str
    corpus: str
    member: Member
    sparsity: float | None
    heads: int
    """Of the member's kind."""

    is_given: bool
    """Whether the grid gives the number of heads, so that the model need not be at the budget."""

    config: Config
    dataset: Corpus
    cost: float
    budget: float

    @property
    def share(self) -> float:
        """Cost as a share of the budget."""
        return self.cost / self.budget

    @property
    def name(self) -> str:
        parts = [self.size, self.corpus, self.member.name]
        parts += [] if self.sparsity is None else [f"rho{self.sparsity:g}"]
        parts += [f"heads{self.heads}"] if self.is_given else []
        return "-".join(parts)

    @property
    def is_sparse(self) -> bool:
        return not KINDS[self.member.kind].is_dense


@dataclass(frozen=True)
class Cell:
    """One run: a model with a seed and a learning rate."""

    model: Model
    seed: int
    learning_rate: float | None
    """None: the configuration's."""

    @property
    def name(self) -> str:
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.model.name}-seed{self.seed}{rate}"

    def config(self, folder: Path) -> Config:
        """Return the resolved configuration of the run, below the grid's folder."""
        config = self.model.config
        run = replace(config.run, name=self.name, directory=str(folder / "runs"), seed=self.seed)
        optimizer = config.optimizer
        if self.learning_rate is not None:
            least = optimizer.min_learning_rate / optimizer.learning_rate * self.learning_rate
            optimizer = replace(optimizer, learning_rate=self.learning_rate, min_learning_rate=least)
        return replace(config, run=run, optimizer=optimizer)


def what_determines_the_result(config: Config) -> Config:
    """Return the configuration with defaults in place of all that does not change what a run computes.

    That is its place, how often it is saved, what it logs and waits for, and faults that it recovers from.
    """
    resilience, fault = config.resilience, config.fault_injection
    decisive = ("max_skipped_steps", "on_spike", "spike_sigmas", "spike_window", "max_rewinds")
    return replace(
        config,
        run=replace(Config().run, seed=config.run.seed),
        checkpoint=CheckpointSection(initialize_from=config.checkpoint.initialize_from),
        resilience=ResilienceSection(**{name: getattr(resilience, name) for name in decisive}),
        fault_injection=fault if fault.fault in DATA_FAULTS else FaultInjectionSection(),
        logging=Config().logging,
    )


def config_hash(config: Config) -> str:
    """Return the SHA-256 of what determines a run's result."""
    tree, defaults = (config_to_dict(one) for one in (what_determines_the_result(config), Config()))
    tree["run"] = {"seed": config.run.seed}
    for section in ("checkpoint", "logging", "resilience", "fault_injection"):
        # Their defaults are left out, as they were when no value of theirs counted: such hashes stay.
        found = {name: value for name, value in tree.pop(section).items() if value != defaults[section][name]}
        tree |= {section: found} if found else {}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


CostOf = Callable[[str, Corpus], Cost]
"""What is equal, and the dataset -> the cost function."""


def plan_models(grid: Grid, cost_of: CostOf | None = None) -> list[Model]:
    """Return all models, with numbers of heads, in the order of the file.

    Args:
        cost_of: by default FLOPs, which are computed.

    Raises:
        UserError: a configuration is wrong, members differ in what they must share, a corpus is missing or too small,
            or the budget holds no head of a member.
    """
    found = [
        model
        for size in grid.sizes
        for corpus in grid.corpora
        for model in _Place(grid, size, corpus).models(
            cost_of or (lambda equal, data: flops_cost(equal, data.vocab_size))
        )
    ]
    _check_names(grid, Plan(found))
    return found


def _check_names(grid: Grid, plan: Plan) -> None:
    for model in plan.models:
        rates = [trial.learning_rate for trial in plan.trials(model)]
        seeds = model.member.seeds_of(model.sparsity)
        name = max((Cell(model, seed, rate).name for seed in seeds for rate in rates), key=len)
        if len(name) > LONGEST_NAME:
            raise UserError(
                f"{grid.path}: the name of a run must have at most {LONGEST_NAME} characters, got {len(name)} of "
                f"{name}; shorten the name of its size, corpus or member"
            )


@dataclass(frozen=True)
class _Place:
    """A size on a corpus."""

    grid: Grid
    size: str
    corpus: str

    def models(self, cost_of: CostOf) -> list[Model]:
        grid = self.grid
        reference = grid.members[grid.relative_to]
        first = self._variant(reference, next(iter(reference.sparsities), None))
        baseline = first(reference.heads[0] if reference.heads else None)
        dataset = self._dataset(baseline)
        cost = cost_of(grid.equal, dataset)
        budget = cost.of(baseline)
        found = []
        for member in grid.members.values():
            for sparsity in member.sparsities or (None,):
                build = self._variant(member, sparsity)
                for heads in self._head_counts(member, build, cost, budget):
                    config = build(heads)
                    self._check_shared(member, config, baseline)
                    counted = heads if heads is not None else config.model.num_dense_heads
                    price = cost.of(config)
                    found.append(
                        Model(
                            self.size, self.corpus, member, sparsity, counted, bool(member.heads), config, dataset,
                            price, budget,
                        )
                    )  # fmt: skip
        return found

    def _head_counts(
        self, member: Member, build: Callable[[int | None], Config], cost: Cost, budget: float
    ) -> Sequence[int | None]:
        kind = KINDS[member.kind]
        if member.heads or kind.is_dense:
            return member.heads or (None,)
        try:
            return [solve_heads(build(None), kind, member, cost, budget)]
        except UserError as error:
            raise self._wrong(member, error) from None

    def _variant(self, member: Member, sparsity: float | None) -> Callable[[int | None], Config]:
        """Return a function from a number of heads to the checked configuration; None: any that the rules allow."""
        grid, kind = self.grid, KINDS[member.kind]
        given = {**grid.overrides, **grid.sizes[self.size], **grid.corpora[self.corpus]}
        self._refuse_own(member, sparsity)

        def build(heads: int | None) -> Config:
            values = dict(given)
            if not kind.is_dense:
                values |= {"model.num_dense_heads": member.dense_heads, "mosa.sparsity": sparsity}
            values |= {**kind.sets, **member.overrides, **dict.fromkeys(other_counts(kind), 0)}
            try:
                if heads is None and not kind.is_dense:
                    size = values.get(_SIZE) or _value(load_config(grid.base, checks_batches=False), _SIZE)
                    heads = math.ceil(sparsity or 1) * (size if isinstance(size, int) else 1)
                values |= {} if heads is None else {kind.counts: heads}
                config = load_config(grid.base, _as_texts(values), checks_batches=False)
                check_world_size(config, grid.processes)
                check_plan(config, dict.fromkeys(("train.steps", "optimizer.warmup_steps"), str(grid.path)))
                self._check_comparable(config)
            except UserError as error:
                raise self._wrong(member, error) from None
            return config

        return build

    def _check_comparable(self, config: Config) -> None:
        stop, steps = config.train.stop_after_step, config.train.steps
        if stop is not None and stop < steps:
            raise UserError(
                f"train.stop_after_step={stop} ends a run before train.steps={steps}, after which its loss is taken; "
                "remove it (--time-limit stops a grid early)"
            )
        if self.grid.equal == "executed_flops" and config.model.attend_within_documents:
            raise UserError(
                "equal: executed_flops counts attention over whole sequences, which model.attend_within_documents=true "
                "does not execute; set equal: paper_flops or step_time"
            )

    def _refuse_own(self, member: Member, sparsity: float | None) -> None:
        kind, grid = KINDS[member.kind], self.grid
        places: dict[str, Overrides] = {
            "overrides": grid.overrides,
            f"sizes.{self.size}": grid.sizes[self.size],
            f"corpora.{self.corpus}": grid.corpora[self.corpus],
        }
        own: dict[str, str] = dict.fromkeys(_OWN, "the grid sets it for each cell")
        self._refuse(places, own)
        given = {place: {key: value for key, value in values.items() if value} for place, values in places.items()}
        self._refuse(given, dict.fromkeys(other_counts(KINDS["dense"]), "kind and heads of each member set it"))
        own |= dict.fromkeys(other_counts(kind), f"kind {member.kind} has no such heads")
        own |= {kind.counts: "it is the number to solve for; to fix it, give the member heads: N"}
        own |= dict.fromkeys(kind.sets, f"kind {member.kind} sets it")
        if not kind.is_dense:
            own |= {"mosa.sparsity": "give the member sparsity: RHO"}
            own |= {"model.num_dense_heads": "give the member dense_heads: N"}
        if member.learning_rates:
            own |= {"optimizer.learning_rate": "the member's learning_rates set it"}
        if member.learning_rate_of:
            own |= {"optimizer.learning_rate": "the member's learning_rate_of sets it"}
        self._refuse({f"members.{member.name}.overrides": member.overrides}, own)

    def _refuse(self, places: Mapping[str, Overrides], own: Mapping[str, str]) -> None:
        for place, values in places.items():
            for key in values:
                if key in own:
                    raise UserError(f"{self.grid.path}: {place} must not set {key}: {own[key]}; remove it there")

    def _wrong(self, member: Member, error: UserError) -> UserError:
        message = str(error)
        prefix = f"{self.grid.path}: members.{member.name} (sizes.{self.size}, corpora.{self.corpus}): "
        return error if message.startswith(f"{self.grid.path}:") else UserError(prefix + message)

    def _check_shared(self, member: Member, config: Config, baseline: Config) -> None:
        for key in _SHARED:
            ours, theirs = (_value(tree, key) for tree in (config, baseline))
            if ours != theirs:
                raise UserError(
                    f"{self.grid.path}: members.{member.name} has {key}={ours}, but members.{self.grid.relative_to} "
                    f"has {theirs}; members must share vocabulary, sequence length, tokens a step, steps and "
                    "validation: set it for all, in overrides, sizes or corpora"
                )

    def _dataset(self, config: Config) -> Corpus:
        try:
            data = open_mixture(config.data, reads_all=False)
            check_tokenizer(config.data, data)
            for split in ("train", "validation"):
                check_lengths(data, split, config.data.sequence_length)
        except UserError as error:
            raise UserError(f"{self.grid.path}: corpora.{self.corpus}: {error}") from None
        path = config.data.path or ", ".join(config.data.blend)
        found = Corpus(path, data.fingerprint, data.manifest.vocab_size, _tokens_in_a_pass(data))
        train, a_step = config.train, config.train.global_batch_size * config.data.sequence_length
        asked, allowed = train.steps * a_step, self.grid.passes * found.tokens
        if asked > allowed:
            passes = math.ceil(100 * asked / found.tokens) / 100
            raise UserError(
                f"{self.grid.path}: corpora.{self.corpus}: {path} has {found.tokens:,} training tokens, but "
                f"train.steps={train.steps} of {a_step:,} tokens are {asked:,}; set train.steps to at most "
                f"{int(allowed // a_step):,}, or passes: {passes:g} to read the corpus that often"
            )
        if config.data.path:  # with a blend, random tokens are decoded
            self._check_decoding(path, data.manifest.splits["validation"]["tokens"])
        return found

    def _check_decoding(self, path: str, available: int) -> None:
        evaluation = self.grid.evaluation
        if evaluation is None or not evaluation.decode:
            return
        context = evaluation.decode_context
        if (needed := tokens_needed(context)) > available:
            most = available - needed + context
            lower = f"lower it to at most {most:,}, or " if most > 0 else ""
            raise UserError(
                f"{self.grid.path}: evaluate.decode_context={context:,} needs {needed:,} tokens with those that are "
                f"decoded, but the validation split of {path} has {available:,}; {lower}set evaluate.decode: []"
            )


def _tokens_in_a_pass(data: Mixture) -> int:
    parts = zip(data.weights, data.manifests, strict=True)
    return int(min(manifest.splits["train"]["tokens"] / weight for weight, manifest in parts))


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _as_texts(values: Overrides) -> list[str]:
    """Return overrides as the command line takes them."""
    return [f"{key}={value if isinstance(value, str) else inline_yaml(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class Plan:
    """All cells of a grid, of which those with a tuned learning rate are known only once it has been found."""

    models: Sequence[Model]

    def trials(self, model: Model) -> list[Cell]:
        """Return the runs of the first seed among which the learning rate of a model is chosen; at least one."""
        source = self._tuned_at(model)
        rates = source.member.learning_rates or (None,)
        return [Cell(source, source.member.seeds_of(source.sparsity)[0], rate) for rate in rates]

    def cells(self, model: Model, best: Callable[[Sequence[Cell]], Cell | None]) -> tuple[list[Cell], int]:
        """Return the runs of a model, and how many more there will be once its learning rate is found.

        Args:
            best: chooses among trials, by validation; None: not all have been run.
        """
        trials, seeds = self.trials(model), model.member.seeds_of(model.sparsity)
        chosen = trials[0] if len(trials) == 1 else best(trials)
        own = trials if trials[0].model is model else []
        left = seeds[1:] if own else seeds
        if chosen is None:
            return own, len(left)
        return [*own, *(Cell(model, seed, chosen.learning_rate) for seed in left)], 0

    def all_cells(self, best: Callable[[Sequence[Cell]], Cell | None]) -> tuple[list[Cell], int]:
        """Return the runs of all models as far as they are known, and how many there are besides."""
        found, unknown = [], 0
        for model in self.models:
            cells, later = self.cells(model, best)
            found += cells
            unknown += later
        return list({cell.name: cell for cell in found}.values()), unknown

    def _tuned_at(self, model: Model) -> Model:
        member = model.member
        if member.learning_rate_of is not None:
            return next(other for other in self.models if self._is_source(other, model))
        if member.tune_at is None or not member.learning_rates:
            return model
        return next(self._siblings(model, member.tune_at), model)

    @staticmethod
    def _is_source(other: Model, model: Model) -> bool:
        """Return whether the learning rate of a model is found with another member's model."""
        wanted, member = (model.size, model.corpus, model.member.learning_rate_of), other.member
        return (other.size, other.corpus, member.name) == wanted and member.tune_at in (None, other.sparsity)

    def _siblings(self, model: Model, sparsity: float) -> Iterator[Model]:
        for other in self.models:
            is_sibling = (other.size, other.corpus, other.member) == (model.size, model.corpus, model.member)
            if is_sibling and other.sparsity == sparsity and (not model.is_given or other.heads == model.heads):
                yield other
