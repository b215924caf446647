"""Convert models between formats, one tensor at a time, without a GPU."""

from megatron_mosa.convert.initial import find_initial_weights

__all__ = ["find_initial_weights"]
