# . .spike/lib.sh: installs, and gives the functions below. All results go to $D, which `keep` packs into one file of $OUT:
# only eight files come back, and only what lies there when the time is over.
. .spike/install.sh; R=$PWD; D=/tmp/results; mkdir -p $D; export TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=2
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > $D/card.txt; cat $D/card.txt
keep() { tar -C $D --exclude='*.distcp' --exclude='*.bin' --exclude='*.pt' --exclude=texts.jsonl --exclude=checkpoints -cf $OUT/.$BASHPID.tar . 2>/dev/null; mv $OUT/.$BASHPID.tar $OUT/results.tar; }
say() { echo "$* at $SECONDS" | tee -a $D/log.txt; keep; }
# steps CARD NAME SECONDS CASE...: a case that compiles anew needs 100 to 150 s, one with a warm cache 40
steps() { (card=$1; name=$2; limit=$3; shift 3; CUDA_VISIBLE_DEVICES=$card timeout $limit python3 -m benchmarks.step "$@" --acceleration auto --out $D/step_$name.json > $D/step_$name.txt 2>&1; say "step $name rc $?"; cut -c1-180 $D/step_$name.txt); }
# tests CARDS NAME SECONDS PYTEST-ARGUMENT...
tests() { (cards=$1; name=$2; limit=$3; shift 3; CUDA_VISIBLE_DEVICES=$cards timeout -k 5 $limit python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 200 --durations 5 "$@" > $D/tests_$name.txt 2>&1; say "tests $name rc $?"; grep -E "^(FAILED|ERROR|E  )|passed|failed" $D/tests_$name.txt | cut -c1-250 | head -20); }
