"""state.py DIR OUT.tar.xz: what a later call of the grid needs, and what the report needs; no checkpoints.

Of cells that are not done nothing is kept but logs: without their checkpoints they start again at step 0.
"""
import json
import sys
import tarfile
from pathlib import Path

folder, target = Path(sys.argv[1]), sys.argv[2]
done = {p.stem for p in folder.glob("cells/*.json") if json.loads(p.read_text()).get("status") in ("done", "diverged")}
with tarfile.open(target, "w:xz") as tar:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or path.is_symlink() or path.suffix == ".new":
            continue
        if parts[0] in ("cells", "configs") and path.stem not in done:
            continue
        if parts[0] == "runs" and (parts[1] not in done or len(parts) != 3 or path.suffix not in (".yaml", ".jsonl", ".json", ".log")):
            continue
        if parts[0].endswith(".lock"):
            continue
        tar.add(path)
size = Path(target).stat().st_size
print(f"{target}: {size / 2**20:.2f} MiB, {len(done)} cells done")
