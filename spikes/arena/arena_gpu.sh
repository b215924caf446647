#!/bin/bash
# arena_gpu.sh CORPUS SECONDS: trains, evaluates and measures the corpus's part of configs/grids/$GRID.yaml (paper_tiny) within SECONDS.
# JOBS: cells at once on a card (5). MEASURE: the last seconds, for what is left to evaluate, then decoding and steps alone (110).
# Run again: continues from runs/arena_NAME if it is there, else from .arena/state_NAME.tar.xz. NAME: CORPUS, or another set of results. SHRINK=1: a test on a CPU.
corpus=${1:?corpus}; seconds=${2:?seconds}; jobs=${JOBS:-5}; tail=${MEASURE:-110}; name=${NAME:-$corpus}
begin=$SECONDS; OUT=${OUT:-/tmp/arena_out}; mkdir -p "$OUT" data runs
at() { echo "== $((SECONDS - begin)) s: $*"; }
left() { echo $((seconds - (SECONDS - begin) - $1)); }
minutes() { python3 -c "import sys; s = max(1.0, float(sys.argv[1])); print(s / 54 if s < 540 else (s + 60) / 60)" "$1"; }  # the tool stops earlier, to save
if [ -z "$SHRINK" ]; then
  if [ -d site ]; then export PYTHONPATH=$PWD/site:$PWD PYTHONWARNINGS=ignore PATH=$PWD/bin:$PATH; else . .arena/install.sh; fi
  (python3 -m compileall -q -j 0 site megatron_mosa > /dev/null 2>&1 &)
fi
at "installed"; mosa() { python3 -m megatron_mosa "$@"; }
cards=$(nvidia-smi -L 2>/dev/null | wc -l); nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | tee "$OUT/card.txt"
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-6} PYTHONUNBUFFERED=1

if [ ! -f data/$corpus/manifest.json ]; then
  if [ $corpus = novels ]; then
    python3 -m tarfile -e .arena/novels.tar.xz data
  else
    python3 .arena/python_corpus.py data/$corpus.jsonl; mosa data build configs/paper/tiny.yaml data.path=data/$corpus "data.sources=[data/$corpus.jsonl]" \
      data.tokenizer_bytes=30000000 data.validation_fraction=0.02 2>&1 | tr '\r' '\n' | tail -3
  fi
fi
at "dataset"; out=runs/arena_$name; grid=data/${GRID:-paper_tiny}_$name.yaml
s=.arena/state_$name.tar.xz; if [ ! -d $out ] && [ -f $s ]; then python3 -m tarfile -e $s . && at "unpacked $s"; fi
python3 .arena/grid.py $corpus $grid ${SHRINK:+--shrink}
[ -n "$SHRINK" ] || cp $grid "$OUT/"

grid() { # SECONDS OPTIONS: stops then, or 30 s later by force
  limit=$1; shift; [ "$limit" -gt 5 ] || { at "no time for: $*"; return; }
  timeout -k 20 $((limit + 30)) python3 -m megatron_mosa isoflop run $grid --output $out --jobs $((jobs * (cards > 0 ? cards : 1))) \
    --time-limit $(minutes $limit) --remove-checkpoints "$@" >> "$OUT/run.txt" 2>&1; echo "exit $?" >> "$OUT/run.txt"; }
: > "$OUT/run.txt"
grid $(left $((tail + 40)))                       # 40 s: to save what runs, and to report
at "trained: $(tail -2 "$OUT/run.txt" | tr '\n' ' ')"
grid $(left 30) --no-train --measure
at "measured: $(tail -2 "$OUT/run.txt" | tr '\n' ' ')"

python3 .arena/state.py $out "$OUT/state_$name.tar.xz"
rm -rf runs/report; mkdir -p runs/report
mosa report $out --output runs/report && cp $out/results.csv $out/results.jsonl runs/report/ && tar -C runs -cJf "$OUT/report_$name.tar.xz" report
at "saved"; ls -l "$OUT" | awk '{print $5, $9}'
grep -E "failed|diverged|Error|error" "$OUT/run.txt" | sort -u | cut -c1-200 | head -15
python3 .arena/table.py $out | head -60
at "end"
