# Two cards, 480 s; carry .whl .spike .arena. Card 0, alone: steps of all Tiny models (novels' grid); card 1: tests/gpu whole, its log kept.
# Timings are copied to Python's grid, whose corpus is built meanwhile, so that both reports have them.
. .spike/lib.sh
mosa() { python3 -m megatron_mosa "$@"; }
mkdir -p data runs; (export RAYON_NUM_THREADS=10; python3 .arena/python_corpus.py data/python.jsonl; timeout 300 python3 -m megatron_mosa data build configs/paper/tiny.yaml data.path=data/python "data.sources=[data/python.jsonl]" data.tokenizer_bytes=30000000 data.validation_fraction=0.02 > $D/corpus.txt 2>&1; say corpus) & corpus=$!
python3 -m tarfile -e .arena/novels.tar.xz data; for n in novels python; do python3 -m tarfile -e .arena/state_$n.tar.xz .; done
rm -f runs/arena_{novels,python}/timings/*.json; mkdir -p runs/arena_novels/timings/decoding; cp -n runs/arena_python/timings/decoding/*.json runs/arena_novels/timings/decoding/
python3 .arena/grid.py novels data/paper_tiny_novels.yaml; wait $corpus; python3 .arena/grid.py python data/paper_tiny_python.yaml
(tests 1 whole 460 -n 6 tests/gpu -k "not two_cards and not pairs and not sweep") & whole=$!
export CUDA_VISIBLE_DEVICES=0
measure() { timeout $3 python3 -m megatron_mosa isoflop run data/$1.yaml --output runs/$2 --no-train --measure --time-limit $(python3 -c "print($3/60)") > $D/measure_$2.txt 2>&1; say "measure $2 rc $?"; tail -1 $D/measure_$2.txt | cut -c1-200; }
measure paper_tiny_novels arena_novels 350
mkdir -p runs/arena_python/timings; cp runs/arena_novels/timings/*.json runs/arena_python/timings/; measure paper_tiny_python arena_python 60
for n in novels python; do mosa report runs/arena_$n --output runs/report_$n > /dev/null 2>&1; cp runs/arena_$n/results.* runs/report_$n/; python3 .arena/state.py runs/arena_$n $D/state_$n.tar.xz; python3 .arena/table.py runs/arena_$n > $D/table_$n.txt; done
tar -C runs -cJf $D/reports.tar.xz report_novels report_python; say reports; cut -c1-130 $D/table_python.txt | awk '!s[$6]++'
wait $whole; say end
