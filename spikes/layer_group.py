"""layer_group.py SCRIPT ARGUMENT...: runs a script with groups of tiles that are powers of 2."""
import runpy, sys
from megatron_mosa.kernels.triton import tiles
whole = tiles.group
tiles.group = lambda *a: 1 << (whole(*a).bit_length() - 1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
