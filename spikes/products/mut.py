import sim_ragged as r, sys
F='/work/main/megatron_mosa/kernels/triton/hopper_scattered.py'
M=[("mbarrier.arrive(empty_weight.index((weight_step - 1) % WEIGHT_SLOTS), pred=is_last)","mbarrier.arrive(empty_weight.index((weight_step - 1) % WEIGHT_SLOTS))"),
   ("is_last = (next_head != i_head) | (place % number == number - 1)","is_last = (next_head != i_head)"),
   ("is_new = (i_head != i_before) | (place % number == 0)","is_new = (i_head != i_before)"),
   ("        tma.store_wait(1)\n","        tma.store_wait(2)\n"),
   ("        mbarrier.wait(turn.index(CONSUMER), (count & 1) ^ (1 - CONSUMER))\n",""),
   ("            b = warpgroup_mma_wait(0, deps=[b])\n            mbarrier.arrive(empty_values.index(((count","            mbarrier.arrive(empty_values.index(((count"),
   ("        if rows > CONSUMER * BOX:","        if rows > 0:"),
   ("                mbarrier.arrive(empty_weight.index(weight_step % WEIGHT_SLOTS), pred=is_last)\n        unit","                mbarrier.arrive(empty_weight.index(weight_step % WEIGHT_SLOTS))\n        unit"),
   ("                mbarrier.wait(full_values.index(step % VALUE_SLOTS), step // VALUE_SLOTS & 1)\n                mbarrier.arrive(empty_values.index(step % VALUE_SLOTS))","                mbarrier.arrive(empty_values.index(step % VALUE_SLOTS))"),
   ("        else:  # the second half of a head's last tile without rows\n            mbarrier.arrive(turn.index(1 - CONSUMER))\n","        else:\n"),
   ("    tma.store_wait(0)\n\n","\n"),
   ("p_next = p_tiles + (place + 1) % number  # in flight while this tile is loaded","p_next = p_tiles + place % number  #"),
]
for a,b in M:
    try:
        ns=r.load(F,[(a,b)])
    except AssertionError as e: print('NOT FOUND',e); continue
    try:
        r.run(ns,3,True); print('SURVIVED', a[:60].strip())
    except BaseException as e: print('killed', type(e).__name__, str(e)[:70])
