"""Run every notebook under nbval at some caps, several at once on each GPU: matrix.py KEEP LOGS SECONDS AT_ONCE CAP...

CAP is a number of GiB, or full for none. Longest first, by the notebooks' own figures. KEEP/matrix.txt gets a line for
each that came to its end: cap, notebook, a hash of its code cells and outputs, rc, seconds, the most GPU memory that its processes held
(NVML's figure, which neighbours don't change), how many OutOfMemoryErrors its log names, the log's last line. What is
green there (rc 0, the same hash) is skipped; where two lines name one, the later counts. After each, $OUT/matrix.txt
and $OUT/m.tgz (with the logs of what is red) are written. What SECONDS cut is no line.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

KEEP, LOGS = map(Path, sys.argv[1:3])
END, AT_ONCE = time.time() + float(sys.argv[3]), int(sys.argv[4])
OUT, CORES, GIB = Path(os.environ.get("OUT", LOGS)), 16, 2**30
COMMAND = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "--nbval",
    "--nbval-current-env",
]
COMMAND += ["--nbval-sanitize-with=tests/nbval_sanitize.cfg", "--nbval-cell-timeout=560"]
peaks = Counter()


class Job:
    def __init__(self, cap, path):
        self.cap, self.path, self.name = cap, path, f"{cap}_{path.stem[:2]}"
        notebook = json.loads(path.read_bytes())
        code = json.dumps([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
        self.key = f"{cap} {path.stem} {hashlib.md5(code.encode()).hexdigest()[:8]}"
        figures = notebook["metadata"]["measured"]["full" if cap == "full" else "lab"]
        self.seconds, self.several = figures["seconds"], figures.get("gpus", 1) > 1
        self.gib = figures["gib"] if cap == "full" else min(int(cap), 12)

    def start(self, gpu):
        self.gpu, self.began = gpu, time.time()
        seen = f"{gpu},{1 - gpu}" if self.several else str(gpu)
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": seen, "MATRIX_JOB": self.name}
        env |= {"SIGLIP_SIZE": "full"} if self.cap == "full" else {"SIGLIP_GPU_GIB": self.cap}
        if AT_ONCE > 1:
            env["OMP_NUM_THREADS"] = str(max(2, CORES // AT_ONCE))
        self.log = LOGS / f"m_{self.name}.log"
        cores = f"{CORES * gpu}-{CORES * (gpu + 1) - 1}"
        pinned = ["taskset", "-c", cores] if os.cpu_count() >= CORES * (gpu + 1) else []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*pinned, *COMMAND, self.path],
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def line(self):
        log = re.sub(r"\x1b\[[\d;]*m", "", self.log.read_text(errors="replace"))
        last = next((x.strip() for x in reversed(log.splitlines()) if x.strip()), "")
        if self.process.returncode == 0:
            self.log.unlink()
        else:
            self.log.write_text(log[-60_000:])
        peak = peaks[self.name] / GIB
        over = " OVER" if self.cap != "full" and peak > int(self.cap) else ""
        what = f"{time.time() - self.began:.0f} s, {peak:.2f} GiB{over}, {log.count('OutOfMemoryError')} oom"
        return f"{self.key} rc {self.process.returncode} {what}, {AT_ONCE} at once | {last[:90]}"


def job_of(pid):
    """The job that a process belongs to: what it starts inherits the variable."""
    try:
        found = re.search(rb"MATRIX_JOB=(\w+)", Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:  # it has ended
        return None
    return found and found[1].decode()


def watch():
    import pynvml

    pynvml.nvmlInit()
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    while True:
        for gpu in gpus:  # the largest of all GPUs counts
            held = Counter()
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu):
                held[job_of(process.pid)] += process.usedGpuMemory or 0
            for name, used in held.items():
                peaks[name] = max(peaks[name], used)
        time.sleep(0.1)


def pack():
    shutil.copy(KEEP / "matrix.txt", OUT / "matrix.txt")
    with tarfile.open(OUT / ".m.tgz", "w:gz") as tar:
        tar.add(KEEP / "matrix.txt", "keep/matrix.txt")
        for log in LOGS.glob("m_*.log"):
            tar.add(log, f"logs/{log.name}")
    os.replace(OUT / ".m.tgz", OUT / "m.tgz")


def fits(job, running):
    """Whether a GPU has room for it: size full is taken only where 60 GiB are free when it starts."""
    taken = sum(one.gib for one in running)
    return len(running) < AT_ONCE and taken + job.gib <= 130 and (job.cap != "full" or taken <= 70)


(KEEP / "matrix.txt").touch()
last = dict(line.split(" rc ", 1) for line in (KEEP / "matrix.txt").read_text().splitlines())
numbers = os.environ.get("NB", "").split()
jobs = [
    Job(cap, path)
    for cap in sys.argv[5:]
    for path in sorted(Path("notebooks").glob("[0-9]*.ipynb"))
]
jobs = [job for job in jobs if not numbers or job.path.stem[:2] in numbers]
jobs = [job for job in jobs if not last.get(job.key, "").startswith("0 ")]
jobs.sort(key=lambda job: -job.seconds)
print(
    f"{len(jobs)} to run, {sum(job.seconds for job in jobs)} s alone, one after the other",
    flush=True,
)
threading.Thread(target=watch, daemon=True).start()
running = []
while (jobs or running) and time.time() < END:
    for job in [job for job in running if job.process.poll() is not None]:
        running.remove(job)
        line = job.line()
        print(line, flush=True)
        with (KEEP / "matrix.txt").open("a") as file:
            file.write(line + "\n")
        pack()
    jobs = [job for job in jobs if job.seconds < END - time.time()]  # what can't end any more
    for gpu in (0, 1):
        here = [job for job in running if job.gpu == gpu]
        job = next((job for job in jobs if fits(job, here)), None)
        if job:
            jobs.remove(job)
            running.append(job)
            job.start(gpu)
    time.sleep(0.5)
for job in running:
    os.killpg(job.process.pid, signal.SIGKILL)  # its kernel notices within a second, and ends, too
    job.log.unlink()
    print("cut:", job.key, f"after {time.time() - job.began:.0f} s")
