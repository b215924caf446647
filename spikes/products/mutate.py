"""Faults that the model must find."""
import sim, sys
M={
 'values handed back one step early': [('mbarrier.arrive(empty_values.index((number - 1) % VALUE_SLOTS))','mbarrier.arrive(empty_values.index(number % VALUE_SLOTS))')],
 'last values handed back before the wait': [('        b = warpgroup_mma_wait(0, deps=[b])\n        last =','        last ='),('        i_head, i_tile = _unit(unit, E, COLUMN_TILES, HEADS_INNER)\n        i_row = place % PAIRS * (2 * BOX) + CONSUMER','        b = warpgroup_mma_wait(0, deps=[b])\n        i_head, i_tile = _unit(unit, E, COLUMN_TILES, HEADS_INNER)\n        i_row = place % PAIRS * (2 * BOX) + CONSUMER')],
 'staging waits for too little': [('tma.store_wait(STORES - 1)','tma.store_wait(STORES)')],
 'phase of values': [('number // VALUE_SLOTS & 1','(number + 1) // VALUE_SLOTS & 1')],
 'turn phase': [('(count & 1) ^ (1 - CONSUMER)','(count & 1) ^ CONSUMER')],
 'matrix never handed back': [('if place % PAIRS == PAIRS - 1:','if False:')],
 'matrix handed back always': [('if place % PAIRS == PAIRS - 1:','if True:')],
 'wait for products too late': [('b = warpgroup_mma_wait(GROUP, deps=[b])','b = warpgroup_mma_wait(GROUP + 1, deps=[b])')],
 'run order': [('(0, 1, 3, 2, 4)','(0, 1, 2, 3, 4)')],
 'row of consumer': [('+ CONSUMER * BOX','+ 0 * BOX')],
 'range': [('(i_program + 1) * TOTAL // number','(i_program + 1) * TOTAL // number + 1')],
}
opts=[dict(KB=3,N=256,PIECE=128,VALUE_SLOTS=8,WEIGHT_SLOTS=3,STORES=2,GROUP=1,DIRECT=False), dict(KB=3,N=256,PIECE=64,VALUE_SLOTS=4,WEIGHT_SLOTS=6,STORES=0,GROUP=1,DIRECT=True), dict(KB=1,N=256,PIECE=128,VALUE_SLOTS=8,WEIGHT_SLOTS=2,STORES=2,GROUP=1,DIRECT=False)]
for name,m in M.items():
    sim.MUTATE[:]=m; found=None; tries=0
    ns=sim.load(sys.argv[1])
    for seed in range(12):
        for o in opts:
            tries+=1
            try: sim.case(ns,3,384,512,K_LAST=True,programs=2,seed=seed,HEADS_INNER=True,ORDERED=True,**o)
            except (AssertionError, sim.Deadlock) as e: found=f'{type(e).__name__} {str(e)[:60]}'; break
        if found: break
    print(f'{name:45} {"FOUND after "+str(tries) if found else "not found"}: {found}',flush=True)
