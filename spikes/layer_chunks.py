"""layer_chunks.py OUT [layer_time's flags]: as layer_time, with chunks of products up to 1.75 GiB and of equal size."""
import runpy
from megatron_mosa.kernels.triton import scattered
from megatron_mosa.kernels.triton.common import cdiv
scattered.MOST_BYTES = 1792 << 20
whole = scattered.chunks_of
def chunks_of(shape, like, small_bytes=None):
    sequences, columns = whole(shape, like, small_bytes)
    return cdiv(shape[0], cdiv(shape[0], sequences)), columns
scattered.chunks_of = chunks_of
runpy.run_path(".spike/layer_time.py", run_name="__main__")
