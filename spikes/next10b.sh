# Two cards, 560 s; carry .whl .spike: faults under NCCL, then the sweep's tests alone.
. .spike/lib.sh
timeout 320 python3 -m benchmarks.faults --processes 2 --device cuda --out $D/faults > $D/faults.txt 2>&1; say "faults rc $?"; cat $D/faults/faults.md | cut -c1-220; tail -5 $D/faults.txt
tests 0,1 sweep 220 tests/gpu/test_sweep.py
