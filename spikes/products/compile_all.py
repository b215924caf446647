"""Compile every variant of the bench for sm_90."""
import sys, re, time
sys.path.insert(0,'/tmp/gluon2'); sys.path.insert(0,'/work/main/.spike'); 
sys.argv=[sys.argv[0]]+sys.argv[1:]
import torch, triton, unittest.mock as mock
from pathlib import Path
import products_bench as P
sys.path.insert(0,'.')
from compile import resources, sass, ops
from dataclasses import replace
def comp(KB,o,k_last,traced=False):
    bf=torch.bfloat16; K=KB*64
    v=torch.zeros(3,256,K,dtype=bf); w=torch.zeros(3,1024,K,dtype=bf).mT if k_last else torch.zeros(3,K,1024,dtype=bf)
    out=torch.zeros(3,256,1024,dtype=bf); got=[]
    class F:
        def __getitem__(s,g): return lambda *a,**k: got.append(real.warmup(*a,grid=g,**k))
    real=P._products_kernel; P._products_kernel=F()
    try: P.Product(v,w,out,o)(torch.zeros(132,4,dtype=torch.int32) if traced else None)
    finally: P._products_kernel=real
    return got[0]
cases=[(k,'default',o,l,t) for k,o in P.DEFAULTS.items() for l in (False,True) for t in (False,True)]
cases+=[(k,'direct',o,True,t) for k,o in P.DIRECT.items() for t in (False,True)]
cases+=[(1,n,o,o.is_direct,False) for n,o in P.VARIANTS['W_O'].items()]+[(3,n,o,True,False) for n,o in P.VARIANTS['dX'].items()]
cases+=[(2,n,o,False,False) for n,o in P.WIDE['W_O'].items()]+[(6,n,o,True,False) for n,o in P.WIDE['dX'].items()]
for k,n,o,l,t in cases:
    t0=time.time(); c=comp(k,o,l,t); s=sass(c); q=ops(s); r=resources(c.asm['cubin'])
    print(f"K {64*k:3} {'K' if l else 'N'}-last {n:28}{'traced ' if t else ''} {r} shared {c.metadata.shared} warps {c.metadata.num_warps}", {x:q[x] for x in ('HGMMA','UTMALDG','UTMASTG','STSM','STG','LDL','STL','BAR')}, sum(q.values()), f'{time.time()-t0:.1f}s',flush=True)
    assert 'STACK:0' in r and q['LDL']==q['STL']==0 and c.metadata.shared<=232448
