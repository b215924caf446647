"""GRID.yaml: what a grid asks for, read and checked without the configurations that it names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from megatron_mosa.config import read_yaml
from megatron_mosa.errors import UserError, nearest

EQUAL = ("paper_flops", "executed_flops", "step_time")
"""What members of a grid have in common: FLOPs by the paper's formulas, FLOPs that a training step executes, or the
measured time of a step."""

_KEYS = (
    "name", "base", "overrides", "sizes", "corpora", "members", "equal", "relative_to", "seeds", "learning_rates",
    "processes", "passes", "evaluate",
)  # fmt: skip
_MEMBER_KEYS = (
    "kind", "overrides", "sparsity", "heads", "dense_heads", "seeds", "learning_rates", "tune_at", "learning_rate_of",
)  # fmt: skip
_EVALUATE_KEYS = ("samples", "calibration_samples", "decode", "decode_context")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._]{0,63}")  # several of them make the name of a file
_MOST = 2**31 - 1  # of any count
_MOST_RANKS = 1024  # of a cell, which runs on one node
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    """A kind of models to compare: one model for each sparsity and each number of heads."""

    name: str
    kind: str
    overrides: Overrides
    sparsities: tuple[float, ...]
    """rho of its heads, one model each; empty: the kind has none."""

    heads: tuple[int, ...]
    """Numbers of heads, one model each; empty: as many as the budget holds."""

    dense_heads: int
    """Dense heads beside those of its kind."""

    seeds: tuple[int, ...]
    seeds_at: Mapping[float, tuple[int, ...]] = field(default_factory=dict)
    """Seeds of single sparsities, in place of ``seeds``."""

    learning_rates: tuple[float, ...] = ()
    """Each is tried with the first seed; empty: the configuration's."""

    tune_at: float | None = None
    """The sparsity at which learning rates are tried; None: at each."""

    learning_rate_of: str | None = None
    """Another member, whose best learning rate is taken."""

    def seeds_of(self, sparsity: float | None) -> tuple[int, ...]:
        """Return the seeds of the model of a sparsity."""
        return self.seeds if sparsity is None else self.seeds_at.get(sparsity, self.seeds)


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a trained model besides its validation loss."""

    samples: int = 64
    """Validation windows for the causal loss, leak and flip rate (``mosa evaluate``)."""

    calibration_samples: int = 64
    """Training windows to calibrate the thresholds of expert choice on."""

    decode: tuple[int, ...] = (1, 64)
    """Numbers of sequences whose decoding is timed (``mosa decode-bench``)."""

    decode_context: int = 8192
    """Tokens in their cache."""


@dataclass(frozen=True)
class Grid:
    """A grid: each member at each size on each corpus."""

    path: Path
    name: str
    base: Path
    """The configuration that sizes, corpora and members override."""

    overrides: Overrides
    """Of all cells."""

    sizes: Mapping[str, Overrides]
    corpora: Mapping[str, Overrides]
    members: Mapping[str, Member]
    equal: str
    """One of ``EQUAL``."""

    relative_to: str
    """The member whose cost is the budget."""

    processes: int
    """Ranks of a cell."""

    passes: float
    """How often a run may read its corpus at most."""

    evaluation: Evaluation | None = None
    """None: nothing is measured of trained models besides their validation loss and speed."""


def read_grid(path: Path, kinds: Mapping[str, bool]) -> Grid:
    """Read a grid's YAML file.

    Args:
        kinds: the kinds of members, and whether each is dense: without sparsity.

    Raises:
        UserError: it is unreadable, or a key is unknown, missing or has a value that is not allowed.
    """
    tree = read_yaml(path, "grid", "configs/grids/example.yaml")
    if "members" not in tree:
        raise UserError(
            f"{path} is not a grid: it has no members; give a file such as configs/grids/example.yaml (mosa isoflop "
            "CONFIG prints the numbers of heads for a configuration)"
        )
    return _Reader(path, kinds).grid(tree)


@dataclass(frozen=True)
class _Reader:
    path: Path
    kinds: Mapping[str, bool]

    def grid(self, tree: dict[str, Any]) -> Grid:
        self._known("", tree, _KEYS)
        members = {
            name: self._member(name, values, tree)
            for name, values in self._sections(tree, "members", self.name).items()
        }
        self._check_sources_of_rates(members)
        relative = tree.get("relative_to", next(iter(members)))
        self._expect("relative_to", relative, relative in list(members), f"one of {', '.join(members)}")
        reference = members[relative]
        if (
            len(reference.sparsities) > 1
            or len(reference.heads) > 1
            or not (reference.heads or self._is_dense(reference))
        ):
            raise self._wrong(
                f"relative_to={relative}: the budget is that of one model, whose number of heads is given; name a "
                "member of kind dense, or give it heads: N and one sparsity"
            )
        equal, processes, passes = tree.get("equal", EQUAL[0]), tree.get("processes", 1), tree.get("passes", 1)
        self._expect("equal", equal, equal in EQUAL, f"one of {', '.join(EQUAL)}")
        self._expect(
            "processes",
            processes,
            _is_whole(processes) and 1 <= processes <= _MOST_RANKS,
            f"an integer of at least 1 and at most {_MOST_RANKS}",
        )
        self._expect(
            "passes", passes, _is_number(passes) and 0 < passes <= _MOST, f"a number above 0 and at most {_MOST}"
        )
        return Grid(
            path=self.path,
            name=self.name("name", tree.get("name")),
            base=self._base(tree.get("base")),
            overrides=self._overrides("overrides", tree.get("overrides")),
            sizes=self._all_overrides(tree, "sizes"),
            corpora=self._all_overrides(tree, "corpora"),
            members=members,
            equal=equal,
            relative_to=relative,
            processes=processes,
            passes=float(passes),
            evaluation=self._evaluation(tree),
        )

    def _check_sources_of_rates(self, members: Mapping[str, Member]) -> None:
        for name, member in members.items():
            if (source := member.learning_rate_of) is None:
                continue
            where = f"members.{name}.learning_rate_of"
            other = members.get(source) if isinstance(source, str) else None
            self._expect(
                where, source, other is not None and bool(other.learning_rates), "a member with learning_rates"
            )
            assert other is not None
            if (len(other.sparsities) > 1 and other.tune_at is None) or len(other.heads) > 1:
                raise self._wrong(
                    f"{where}={source}, which tries its learning rates for each of several models; give it tune_at, or "
                    "one sparsity and one number of heads"
                )

    def _evaluation(self, tree: dict[str, Any]) -> Evaluation | None:
        if "evaluate" not in tree:
            return None
        values, default = tree["evaluate"], Evaluation()
        self._expect("evaluate", values, isinstance(values, dict), "keys such as {samples: 64}, or {} for the defaults")
        self._known("evaluate", values, _EVALUATE_KEYS)
        counts = {}
        for key, least in (("samples", 2), ("calibration_samples", 1), ("decode_context", 1)):
            counts[key] = values.get(key, getattr(default, key))
            is_fine = _is_whole(counts[key]) and least <= counts[key] <= _MOST
            self._expect(f"evaluate.{key}", counts[key], is_fine, f"an integer of at least {least} and at most {_MOST}")
        decode = self._numbers("evaluate.decode", values.get("decode", [*default.decode]), _is_whole, 1)
        return Evaluation(decode=tuple(sorted(decode)), **counts)

    def _member(self, name: str, values: Any, tree: dict[str, Any]) -> Member:
        where = f"members.{name}"
        self._expect(where, values, isinstance(values, dict), "keys such as kind: dense")
        self._known(where, values, _MEMBER_KEYS)
        kind = values.get("kind")
        self._expect(f"{where}.kind", kind, kind in list(self.kinds), f"one of {', '.join(self.kinds)}")
        is_dense = self.kinds[kind]
        for key in ("sparsity", "dense_heads") if is_dense else ():
            if key in values:
                raise self._wrong(f"{where}.{key}={values[key]}: kind dense has dense heads alone; remove the key")
        if not is_dense and values.get("sparsity", []) in ([], None):
            raise self._wrong(f"{where}.sparsity is missing; kind {kind} needs it, such as sparsity: [16, 32]")
        sparsities = self._numbers(f"{where}.sparsity", values.get("sparsity", []), _is_number, 1)
        dense_heads = values.get("dense_heads", 4)
        self._expect(
            f"{where}.dense_heads",
            dense_heads,
            _is_whole(dense_heads) and 0 <= dense_heads <= _MOST,
            f"at least 0 and at most {_MOST}",
        )
        seeds, seeds_at = values.get("seeds", tree.get("seeds", [1])), {}
        if isinstance(seeds, dict):
            if unknown := [rho for rho in seeds if not _is_number(rho) or rho not in sparsities]:
                raise self._wrong(
                    f"{where}.seeds: {unknown[0]} is not a sparsity of this member; it has {_listed(sparsities)}"
                )
            seeds_at = {rho: self._seeds(f"{where}.seeds", given) for rho, given in seeds.items()}
            seeds = tree.get("seeds", [1])
        rates, source = values.get("learning_rates", tree.get("learning_rates", [])), values.get("learning_rate_of")
        if source is not None:
            if given := [key for key in ("learning_rates", "tune_at") if key in values]:
                raise self._wrong(
                    f"{where}.learning_rate_of={source} stands in place of {given[0]}; remove one of them"
                )
            rates = []
        tune_at = values.get("tune_at")
        self._expect(
            f"{where}.tune_at",
            tune_at,
            tune_at is None or tune_at in sparsities,
            f"a sparsity of this member, which has {_listed(sparsities)}",
        )
        return Member(
            name=name,
            kind=kind,
            overrides=self._overrides(f"{where}.overrides", values.get("overrides")),
            sparsities=tuple(map(float, sparsities)),
            heads=self._numbers(f"{where}.heads", values.get("heads", []), _is_whole, 1),
            dense_heads=dense_heads,
            seeds=self._seeds(f"{where}.seeds", seeds),
            seeds_at={float(rho): given for rho, given in seeds_at.items()},
            learning_rates=self._numbers(f"{where}.learning_rates", rates, _is_number, 1e-12),
            tune_at=None if tune_at is None else float(tune_at),
            learning_rate_of=source,
        )

    def _is_dense(self, member: Member) -> bool:
        return self.kinds[member.kind]

    def name(self, key: str, value: Any) -> str:
        self._expect(
            key,
            value,
            is_name(value),
            "a name of at most 64 letters, digits, '_' and '.'",
        )
        return value

    def _base(self, value: Any) -> Path:
        is_fine = isinstance(value, str) and bool(value) and "\0" not in value
        self._expect("base", value, is_fine, "a configuration's file")
        try:
            return Path(value).expanduser()
        except RuntimeError:
            raise self._wrong(
                f"base={value} refers to the home directory of an unknown user; give a full path"
            ) from None

    def _sections(self, tree: dict[str, Any], key: str, check: Callable[[str, Any], str]) -> dict[str, Any]:
        values = tree.get(key)
        self._expect(key, values, isinstance(values, dict) and bool(values), "names, each with its keys")
        for name in cast(dict[str, Any], values):
            check(f"a name in {key}", name)
        return cast(dict[str, Any], values)

    def _all_overrides(self, tree: dict[str, Any], key: str) -> dict[str, Overrides]:
        return {
            name: self._overrides(f"{key}.{name}", values)
            for name, values in self._sections(tree, key, self.name).items()
        }

    def _overrides(self, key: str, values: Any) -> Overrides:
        values = {} if values is None else values
        is_flat = isinstance(values, dict) and all(isinstance(name, str) and "." in name for name in values)
        self._expect(key, values, is_flat, "section.key: value, such as {train.steps: 1500}")
        return values

    def _numbers(self, key: str, value: Any, fits: Callable[[Any], bool], least: float) -> tuple[Any, ...]:
        values = value if isinstance(value, list) else [value]
        is_fine = all(fits(one) and least <= one <= _MOST for one in values)
        what = "integers" if fits is _is_whole else "numbers"
        example = " such as [16, 32]" if least >= 1 else ""
        self._expect(
            key,
            value,
            is_fine and len({f"{one:g}" if fits is _is_number else one for one in values}) == len(values),  # in names
            f"different {what} of at least {least:.3g} and at most {_MOST}{',' * bool(example)}{example}",
        )
        return tuple(values)

    def _seeds(self, key: str, value: Any) -> tuple[int, ...]:
        self._expect(key, value, value != [], "at least one integer, such as [1]")
        return self._numbers(key, value, _is_whole, 0)

    def _known(self, where: str, values: dict[str, Any], keys: tuple[str, ...]) -> None:
        for key in values:
            if key not in keys:
                name = f"{where}.{key}" if where else key
                raise self._wrong(f"unknown key '{name}'{nearest(str(key), keys)}; the keys are {', '.join(keys)}")

    def _expect(self, key: str, value: Any, is_fine: bool, what: str) -> None:
        if not is_fine:
            problem = f"{key} is missing; it must be" if value is None else f"{key} must be"
            raise self._wrong(f"{problem} {what}" + ("" if value is None else f", got {_short(value)}"))

    def _wrong(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}")


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:50]}...{text[-20:]}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def is_name(value: object) -> bool:
    """Return whether a value is a name that a grid may give: to itself, a size, a corpus or a member."""
    return isinstance(value, str) and bool(_NAME.fullmatch(value))
