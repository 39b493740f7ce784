"""Execute one notebook; keep what was executed and its figures; put the figures (and at full the outputs) back."""
import os
import sys

kept, path = sys.argv[1:3]
sys.path.insert(0, "tools")
import threading
from pathlib import Path

import nbformat
import psutil
import pynvml
import store_outputs as s


class OfThisProcess(s.LeastFreeGPUMemory):
    """What the kernel and its children hold by NVML, where it tells (neighbours on the GPU don't count then)."""

    def __enter__(self):
        pynvml.nvmlInit()
        self.gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.held = 0
        self.second = threading.Thread(target=self.look, daemon=True)
        out = super().__enter__()
        self.second.start()
        return out

    def look(self):
        me = psutil.Process()
        while not self.stop.wait(0.1):
            pids = {p.pid for p in me.children(recursive=True)}
            used = sum(p.usedGpuMemory or 0 for p in pynvml.nvmlDeviceGetComputeRunningProcesses(self.gpu) if p.pid in pids)
            self.held = max(self.held, used)

    def __exit__(self, *a):
        super().__exit__(*a)
        self.second.join()
        print("by free memory", [u / 2**30 for u in self.used], "by NVML", self.held / 2**30)
        if self.held and len(self.used) == 1:
            self.used = [self.held]


s.LeastFreeGPUMemory = OfThisProcess
size = os.environ.get("SIGLIP_SIZE", "full")
nb, figures = s.execute(Path(path))
stored = nbformat.read(path, 4)
nb.metadata["measured"] = {**stored.metadata.get("measured", {}), size: figures}
stored.metadata["measured"] = nb.metadata["measured"]
nbformat.write(nb, kept)
nbformat.write(nb if size == "full" else stored, path)
print(path, size, figures)
