"""What the kernels in Gluon for Hopper share."""

# Gluon's values have types that the checker misses.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return a barrier for each slot of a ring, of which so many arrivals complete a phase."""
    ring = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(ring.index(i), count=ARRIVALS)
    return ring


@gluon.jit
def halves(b):
    """Split [rows, columns] into its first and its last columns, in registers."""
    ROWS: gl.constexpr = b.shape[0]
    HALF: gl.constexpr = b.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(b, (ROWS, 2, HALF)), (0, 2, 1)))
