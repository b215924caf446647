# Carry .whl .spike .arena. Card 0, alone: layers, then steps of all Tiny models (novels' grid), then $SMALL=1: Small; card 1, if there is one: tests/gpu whole.
# Timings are copied to Python's grid, whose corpus is built meanwhile, so that both reports have them.
. .spike/lib.sh
cards=$(nvidia-smi -L | wc -l)
mosa() { python3 -m megatron_mosa "$@"; }
mkdir -p data runs; (export RAYON_NUM_THREADS=10; python3 .arena/python_corpus.py data/python.jsonl; timeout 300 python3 -m megatron_mosa data build configs/paper/tiny.yaml data.path=data/python "data.sources=[data/python.jsonl]" data.tokenizer_bytes=30000000 data.validation_fraction=0.02 > $D/corpus.txt 2>&1; say corpus) & corpus=$!
(python3 -m tarfile -e .arena/novels.tar.xz data; say novels) & novels=$!
for n in 1,2,3 5 4,6; do (CUDA_VISIBLE_DEVICES=0 timeout 130 python3 .spike/warm.py $n threshold dense > $D/warm_$n.txt 2>&1; say "warm $n rc $?") & warm="$warm $!"; done
for n in novels python; do python3 -m tarfile -e .arena/state_$n.tar.xz .; done
rm -f runs/arena_{novels,python}/timings/*.json; mkdir -p runs/arena_novels/timings/decoding; cp -n runs/arena_python/timings/decoding/*.json runs/arena_novels/timings/decoding/
[ $cards -lt 2 ] || { (tests 1 whole 440 -n 6 tests/gpu -k "not two_cards and not pairs and not sweep") & whole=$!; }
export CUDA_VISIBLE_DEVICES=0
wait $warm $novels $corpus
python3 .arena/grid.py novels data/paper_tiny_novels.yaml; python3 .arena/grid.py python data/paper_tiny_python.yaml
layer() { script=$1; name=$2; shift 2; timeout 60 python3 .spike/$script.py $D/layer_$name.json $* > $D/layer_$name.txt 2>&1; say "layer $name rc $?"; cut -c1-250 $D/layer_$name.txt; }
layer layer_time main threshold dense check 1 2 3 4 5 6; layer layer_dx dx check 5; layer layer_time main5 dense 5; layer layer_dx dx5 5 1
timeout 60 python3 .spike/layer_graph.py $D/layer_graph.json 1,2,3,4,5,6 > $D/layer_graph.txt 2>&1; say "layer graph rc $?"; cut -c1-200 $D/layer_graph.txt
measure() { timeout $3 python3 -m megatron_mosa isoflop run data/$1.yaml --output runs/$2 --no-train --measure --time-limit $(python3 -c "print($3/60)") > $D/measure_$2.txt 2>&1; say "measure $2 rc $?"; tail -1 $D/measure_$2.txt | cut -c1-200; }
measure paper_tiny_novels arena_novels ${TINY:-360}
mkdir -p runs/arena_python/timings; cp runs/arena_novels/timings/*.json runs/arena_python/timings/; measure paper_tiny_python arena_python 30
for n in novels python; do mosa report runs/arena_$n --output runs/report_$n > /dev/null 2>&1; cp runs/arena_$n/results.* runs/report_$n/; python3 .arena/state.py runs/arena_$n $D/state_$n.tar.xz; python3 .arena/table.py runs/arena_$n > $D/table_$n.txt; done
tar -C runs -cJf $D/reports.tar.xz report_novels report_python; say reports; cut -c1-130 $D/table_python.txt | awk '!s[$6]++'
[ -z "$whole" ] || wait $whole; say end
