"""zero_run.py OUT CASE...: times cases such as zero=3,micro=4[,trace][,eager][,set=KEY:VALUE] of the tree in PYTHONPATH, one after the other.

Under torchrun. Writes OUT.json after every case, and OUT.CASE.trace.json.gz of one step on rank 0.
"""
import json, os, sys, time
from dataclasses import asdict
begin = time.time()
import deepspeed, torch
from torch import distributed as dist
from megatron_mosa.config import load_config
from megatron_mosa.parallel import destroy_parallel, initialize_parallel, join_store
from megatron_mosa.tools.bench import profile as profiles
from megatron_mosa.tools.bench.measure import Profiling, measure
from megatron_mosa.tools.scaling.sweep_worker import release_memory
from megatron_mosa.engine import graphed
import megatron_mosa

out, *cases = sys.argv[1:]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
config_file = os.environ.get("ZERO_CONFIG", "configs/scale/1b_mosa.yaml")
sequences = int(os.environ.get("ZERO_SEQUENCES", "16")) * world
steps, warmup = int(os.environ.get("ZERO_STEPS", "5")), int(os.environ.get("ZERO_WARMUP", "3"))
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
store = join_store(60)
original = profiles.profile
def say(text):
    if rank == 0: print(f"{time.time() - begin:6.1f} {text}", flush=True)
say(f"imported {os.path.dirname(megatron_mosa.__file__)}, {world} ranks")
results = []
for number, case in enumerate(cases):
    words = case.split(",")
    options = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("set="))
    overrides = [f"parallel.zero_stage={options['zero']}", f"train.micro_batch_size={options['micro']}",
                 f"train.global_batch_size={sequences}", f"parallel.tensor_model_parallel_size={options.get('tp', 1)}", "run.directory=runs/x",
                 *(word[4:].replace(":", "=", 1) for word in words if word.startswith("set="))]
    config = load_config(config_file, overrides)
    graphed.WARM_UPS = 1 << 30 if "eager" in words else 2
    class Traced(original):
        def __exit__(self, *error):
            super().__exit__(*error)
            if rank == 0 and error[0] is None:
                self.export_chrome_trace(f"{out}_{options['zero']}_{options['micro']}.trace.json.gz")
    profiles.profile = Traced if "trace" in words else original
    queued = []
    from megatron_mosa.engine import DeepSpeedEngine
    layout = initialize_parallel(int(options.get("tp", 1)), config.run.seed, store=dist.PrefixStore(f"case-{number}", store))
    start = time.time()
    try:
        found = measure(config, layout, steps, warmup, vocab_size=config.data.vocab_size or 32000, times_loop=False,
                        profiling=Profiling(1 if "trace" in words else 2, 1),
                        watch=lambda phase, step, of: say(f"{case}: {phase} {step}") if step in (0, 1) and phase != "profiling" else None)
    except BaseException as error:
        import traceback
        if rank == 0: traceback.print_exc()
        print(f"rank {rank} {case} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
        sys.stderr.flush(); os._exit(1)
    row = asdict(found)
    row.update(case=case, tree=os.path.dirname(megatron_mosa.__file__).split("/")[-2], wall=time.time() - start, median=found.median)
    results.append(row)
    if rank == 0: json.dump(results, open(out + ".json", "w"), indent=1)
    p = found.profile or {}
    say(f"{case}: {found.median:.1f} ms ({min(found.milliseconds):.0f} to {max(found.milliseconds):.0f}), profile busy {p.get('busy', 0):.0f} "
        f"collectives {p.get('communicating', 0):.0f} exposed {p.get('exposed', 0):.0f} calls {p.get('host_calls', 0)}, {found.allocated_gib:.1f} GiB, {found.acceleration}")
    deepspeed.comm.destroy_process_group(); destroy_parallel()
    left = release_memory()
    say(f"left {left / 2**20:.0f} MiB; the case took {time.time() - start:.0f} s")
    store.set(f"left-{number}-{rank}", "")
if rank == 0:
    for r in range(world): store.get(f"left-{len(cases) - 1}-{r}")
