import sim_ragged as r, sys
F='/work/w/ragged/megatron_mosa/kernels/triton/hopper_scattered.py'
M=[("            if i > 0:\n                b = warpgroup_mma_wait(GROUP, deps=[b])\n                mbarrier.arrive(empty_values.index((step - 1) % VALUE_SLOTS))\n                mbarrier.arrive(empty_weight.index((weight_step - 1) % WEIGHT_SLOTS), pred=is_last)",
    "            if i > 0:\n                b = warpgroup_mma_wait(GROUP, deps=[b])\n                mbarrier.arrive(empty_values.index((step - 1) % VALUE_SLOTS))\n                mbarrier.arrive(empty_weight.index((weight_step - 1) % WEIGHT_SLOTS))"),
   ("is_last = (next_head != i_head) | (place % number == number - 1)","is_last = (next_head != i_head)"),
   ("is_new = (i_head != i_before) | (place % number == 0)","is_new = (i_head != i_before)"),
   ("        tma.store_wait(1)\n","        tma.store_wait(2)\n"),
   ("        mbarrier.wait(turn.index(CONSUMER), (count & 1) ^ (1 - CONSUMER))\n",""),
   ("        b = warpgroup_mma_wait(0, deps=[b])\n        mbarrier.arrive(empty_values.index(((count","        mbarrier.arrive(empty_values.index(((count"),
   ("        if rows > CONSUMER * BOX:","        if rows > 0:"),
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
