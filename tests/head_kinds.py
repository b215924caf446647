"""Options of tiny models with heads of one kind, or one of its options, for tests at every level of the project.

``tests/unit/test_head_kinds.py`` has the test class of each; parity over layouts, conversions and decoding read these.
"""

from __future__ import annotations

ONLY: dict[str, object] = {"model__num_dense_heads": 0, "mosa__num_heads": 0}
# As of tests.distributed.tasks.tiny_config: section__key=value.
OPTIONS: dict[str, dict[str, object]] = {
    "fixed": ONLY | {"model__num_fixed_heads": 4, "model__fixed_stride": 3},
    "gated": {"model__attention_gate": True, "model__num_query_groups": 2, "mosa__num_heads": 0},
    "gated_local": ONLY | {"model__attention_gate": True, "model__num_local_heads": 4, "model__local_window": 5},
    "routing": ONLY | {"model__num_routing_heads": 4, "model__routing_clusters": 4},
    "mosa": {"model__num_dense_heads": 0},
    "token_choice": {
        "model__num_dense_heads": 0,
        "mosa__selection": "token_choice",
        "mosa__capacity_factor": 4.0,
    },
    "fixed_hybrid": {
        "model__num_fixed_heads": 4,
        "model__fixed_stride": 5,
        "model__attention_gate": True,
        "train__recompute": "full",
    },
}


def overrides(kind: str) -> list[str]:
    """Return the options as overrides of a configuration file."""
    return [f"{name.replace('__', '.')}={str(value).lower()}" for name, value in OPTIONS[kind].items()]
