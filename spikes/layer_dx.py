"""layer_dx.py OUT [layer_time's flags]: as layer_time, with dX of full rows by the products of ragged rows, the router inside."""
import runpy
from megatron_mosa.kernels.triton import scattered
whole = scattered.scattered_product
def product(values, weight, rows, like, pairs=None, is_full=False, small_bytes=None):
    return whole(values, weight, rows, like, pairs, is_full and pairs is None, small_bytes)
scattered.scattered_product = product
runpy.run_path(".spike/layer_time.py", run_name="__main__")
