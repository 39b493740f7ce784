"""Run notebooks and store what they show: how the outputs in git are made.

At size "full" the outputs, and the time and memory in each head, are replaced. With --only-figures the notebook keeps
its outputs and only the figures of the size that runs here are replaced: on a CPU its own, and those of "lab" on the
kind of GPU that the outputs come from, with SIGLIP_SIZE=lab and SIGLIP_GPU_GIB=6.
"""

import argparse
import base64
import os
import re
import threading
import time
from pathlib import Path

import nbformat
import teaching_times
import torch
from nbclient import NotebookClient
from tqdm import tqdm

from siglip_lib import pick_size

README = Path(__file__).parent.parent / "README.md"
PICTURE = README.parent / ".github" / "attention.jpg"
GPU = re.compile(r"NVIDIA (H[12]00)")  # stored outputs come from one of these
HEAD = re.compile(r"\*\*Measured:\*\*.*")
ASK = "import resource as _r; print(_r.getrusage(_r.RUSAGE_SELF).ru_maxrss)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-figures", action="store_true", help="keep the stored outputs")
    parser.add_argument("notebooks", nargs="+", type=Path)
    arguments = parser.parse_args()
    here = pick_size()
    if here.name != "full" and not arguments.only_figures:
        parser.error(
            f"the stored outputs are those of size full; --only-figures keeps them; {here}"
        )
    gpu = GPU.match(torch.cuda.get_device_name()) if here.on_gpu else None
    if here.on_gpu and not gpu:
        name = torch.cuda.get_device_name()
        parser.error(f"the stored outputs come from an H100 or H200, this is {name}")
    # 00 shows the figures of the others, so it comes last
    paths = sorted(arguments.notebooks, key=lambda path: path.stem.startswith("00"))
    progress = tqdm(paths, unit="notebook")
    for path in progress:
        progress.set_description(path.stem)
        stored = nbformat.read(path, as_version=4)
        if gpu and arguments.only_figures and gpu[1] != gpu_of(stored):
            parser.error(f"the outputs of {path.name} come from an {gpu_of(stored)}")
        executed, figures = execute(path)
        result = stored if arguments.only_figures else executed
        result.metadata["measured"] = {**stored.metadata.get("measured", {}), here.name: figures}
        write_head(result)
        temporary = path.with_suffix(".tmp")
        nbformat.write(result, temporary)
        os.replace(temporary, path)  # an interrupted run leaves the old file whole
        write_row(path.name, result.metadata["measured"])
        if path.stem == "03_attention":
            PICTURE.write_bytes(attention_picture(result))
    teaching_times.main()  # the guide shows the same figures


def execute(path: Path) -> tuple[nbformat.NotebookNode, dict[str, float]]:
    """Run a notebook from top to bottom; return it with its outputs, and its time and memory."""
    notebook = nbformat.read(path, as_version=4)
    # while this is set the kernel drops what C code prints, as it does under nbval
    os.environ["PYTEST_CURRENT_TEST"] = "store"
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    asked = nbformat.v4.new_code_cell(ASK)
    start = time.perf_counter()
    with client.setup_kernel(), LeastFreeGPUMemory() as gpus:
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index, execution_count=None)
        seconds = time.perf_counter() - start
        notebook.cells.append(asked)
        client.execute_cell(asked, len(notebook.cells) - 1)
        notebook.cells.pop()
    memory = max(gpus.used, default=0) or int(asked.outputs[0]["text"]) * 1024
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the run, which no reader looks at
    notebook.metadata["language_info"] = {"name": "python"}
    figures = {"seconds": round(seconds), "gib": round(memory / 2**30, 1)}
    worked = sum(used > 0 for used in gpus.used)
    return notebook, figures | ({"gpus": worked} if worked > 1 else {})


class LeastFreeGPUMemory:
    """While entered, watch the GPUs' free memory; ``used`` is how much less it became, in bytes, on each GPU."""

    def __enter__(self) -> "LeastFreeGPUMemory":
        self.stop = threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.at_start = self._free()
        self.used = [0] * len(self.at_start)
        if self.used:
            self.watcher.start()
        return self

    def _free(self) -> list[int]:
        return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            taken = (start - free for start, free in zip(self.at_start, self._free(), strict=True))
            self.used = list(map(max, self.used, taken))

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.watcher.is_alive():
            self.watcher.join()


def gpu_of(notebook: nbformat.NotebookNode) -> str:
    """The GPU that the stored outputs come from, as its report says: H100 or H200."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    texts = (output.get("text", "") for cell in cells for output in cell.outputs)
    return next(found[1] for text in texts if (found := GPU.search(text)))


def write_head(notebook: nbformat.NotebookNode) -> None:
    """Put the measured figures into the notebook's first cell."""
    measured, gpu, parts = notebook.metadata["measured"], gpu_of(notebook), []
    if cpu := measured.get("cpu"):
        parts.append(f"{cpu['seconds']} s and {cpu['gib']} GiB on two CPU cores")
    full = measured["full"]  # the stored outputs came with it
    several = full.get("gpus")
    most = f"{'at most ' * bool(several)}{full['gib']} GiB of GPU memory"  # the largest of all GPUs
    place = f"each of {several} {gpu}s" if several else f"an {gpu}"
    parts.append(f"{full['seconds']} s and {most} on {place}")
    if lab := measured.get("lab"):
        place = f"on one {gpu}" if several else "there"
        parts.append(f"{lab['seconds']} s and {lab['gib']} GiB {place} at size `lab`")
    head = notebook.cells[0]
    if not HEAD.search(head.source):
        raise SystemExit("the first cell has no line that starts with **Measured:**")
    head.source = HEAD.sub("**Measured:** " + "; ".join(parts) + ".", head.source)


def attention_picture(notebook: nbformat.NotebookNode) -> bytes:
    """The picture of notebook 03 that the README shows, as a JPEG."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.get("text/plain", "").startswith("Photographs."):
                return base64.b64decode(data["image/jpeg"])
    raise SystemExit("notebook 03 has no picture whose text starts with 'Photographs.'")


def write_row(name: str, measured: dict[str, dict[str, float]]) -> None:
    """Put the measured figures into the notebook's row of the README's table."""
    lines = README.read_text(encoding="utf-8").splitlines(keepends=True)
    for index, line in enumerate(lines):
        if f"(notebooks/{name})" in line:
            cells = line.split("|")
            for column, size in enumerate(("cpu", "lab", "full"), start=4):
                if figures := measured.get(size):
                    cells[column] = f" {figures['seconds']} s, {figures['gib']} GiB "
            lines[index] = "|".join(cells)
    README.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
