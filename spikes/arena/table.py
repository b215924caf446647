"""table.py DIR: one line for each cell of results.jsonl."""
import json
import sys
from pathlib import Path

def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"

print(f"{'cell':52} {'status':8} {'loss':>7} {'causal':>7} {'leak':>7} {'flip':>6} {'ms':>6} {'GiB':>5} {'train s':>7}  decode ms")
for line in (Path(sys.argv[1]) / "results.jsonl").read_text().splitlines():
    r = json.loads(line)
    ms = None if r["step_seconds"] is None else 1000 * r["step_seconds"]
    print(f"{r['cell'][-52:]:52} {r['status'][:8]:8} {number(r['loss'], 4):>7} {number(r['causal_loss'], 4):>7} "
          f"{number(r['leak'], 4):>7} {number(r['flip_rate'], 3):>6} {number(ms, 1):>5}{' ' if r['step_alone'] else '~'} "
          f"{number(r['peak_memory_gib'], 1):>5} {number(r['train_seconds'], 0):>7}  "
          f"{' '.join(f'{k}: {v:.2f}' for k, v in r['decode_ms'].items()) or '-'} {r['reason'][:80]}")
