"""stamp.py LOG COMMAND...: runs it, each line of output with the seconds since launch."""
import subprocess, sys, time
log, *command = sys.argv[1:]
start = time.time()
p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
with open(log, "w") as f:
    for line in p.stdout:
        f.write(f"{time.time()-start:7.2f} {line}"); f.flush()
    p.wait(); f.write(f"{time.time()-start:7.2f} exit {p.returncode}\n")
