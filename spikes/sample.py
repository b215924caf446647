"""sample.py OUT -m MODULE ARGS | FILE ARGS: samples the main thread's stack every 20 ms."""
import sys, threading, time, runpy, collections, atexit, os
out, *rest = sys.argv[1:]
main = threading.main_thread().ident
start = time.time(); samples = []
def loop():
    while True:
        f = sys._current_frames().get(main); s = []
        while f:
            s.append(f"{f.f_code.co_filename}:{f.f_code.co_name}:{f.f_lineno}"); f = f.f_back
        samples.append((time.time() - start, s)); time.sleep(0.02)
threading.Thread(target=loop, daemon=True).start()
def dump():
    with open(out, "w") as g:
        for t, s in samples: g.write(f"{t:.2f} " + ";".join(reversed([x.replace(os.getcwd()+"/", "") for x in s])) + "\n")
atexit.register(dump)
if rest[0] == "-m":
    sys.argv = rest[1:]; runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = rest; runpy.run_path(rest[0], run_name="__main__")
