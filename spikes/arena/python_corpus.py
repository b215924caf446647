"""python_corpus.py OUT.jsonl: every .py file of the site-packages folder that holds torch, one document each."""
import json
import os
import sys
from pathlib import Path

import importlib.util
root = Path(importlib.util.find_spec("torch").origin).parents[1]
files = total = 0
with open(sys.argv[1], "w") as out:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("."):
                try:
                    text = Path(folder, name).read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text:
                    out.write(json.dumps({"text": text}) + "\n")
                    files, total = files + 1, total + len(text.encode())
print(f"{root}: {files} files, {total / 1e6:.0f} MB of Python source")
