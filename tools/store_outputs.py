"""Run notebooks and store what they show: how the outputs in git are made.

On a GPU machine the outputs, and the time and memory in each head, are replaced. With --only-figures the notebook keeps
its outputs and only the figures of this machine's kind are replaced: that is how the CPU's get into the head.
"""

import argparse
import base64
import os
import re
import threading
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from tqdm import tqdm

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
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and not arguments.only_figures:
        parser.error(
            "the stored outputs come from a GPU, and torch sees none; --only-figures keeps them"
        )
    if kind == "gpu" and not GPU.match(torch.cuda.get_device_name()):
        parser.error(
            f"the stored outputs come from an H100 or H200, this is {torch.cuda.get_device_name()}"
        )
    # 00 shows the figures of the others, so it comes last
    paths = sorted(arguments.notebooks, key=lambda path: path.stem.startswith("00"))
    progress = tqdm(paths, unit="notebook")
    for path in progress:
        progress.set_description(path.stem)
        stored = nbformat.read(path, as_version=4)
        executed, figures = execute(path)
        result = stored if arguments.only_figures else executed
        result.metadata["measured"] = {**stored.metadata.get("measured", {}), kind: figures}
        write_head(result)
        temporary = path.with_suffix(".tmp")
        nbformat.write(result, temporary)
        os.replace(temporary, path)  # an interrupted run leaves the old file whole
        write_row(path.name, result.metadata["measured"])
        if path.stem == "03_attention":
            PICTURE.write_bytes(attention_picture(result))


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
    with client.setup_kernel(), LeastFreeGPUMemory() as gpu:
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index, execution_count=None)
        seconds = time.perf_counter() - start
        notebook.cells.append(asked)
        client.execute_cell(asked, len(notebook.cells) - 1)
        notebook.cells.pop()
    memory = gpu.used or int(asked.outputs[0]["text"]) * 1024
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the run, which no reader looks at
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook, {"seconds": round(seconds), "gib": round(memory / 2**30, 1)}


class LeastFreeGPUMemory:
    """While entered, watch the GPU's free memory; ``used`` is how much less it became, in bytes."""

    used = 0

    def __enter__(self) -> "LeastFreeGPUMemory":
        self.stop = threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        if torch.cuda.is_available():
            self.at_start = torch.cuda.mem_get_info()[0]
            self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.used = max(self.used, self.at_start - torch.cuda.mem_get_info()[0])

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.watcher.is_alive():
            self.watcher.join()


def gpu_of(notebook: nbformat.NotebookNode) -> str:
    """The GPU that the stored outputs come from, as the setup cell tells: H100 or H200."""
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code")
    return GPU.search(setup.outputs[0]["text"])[1]


def write_head(notebook: nbformat.NotebookNode) -> None:
    """Put the measured figures into the notebook's first cell."""
    measured = notebook.metadata["measured"]
    parts = []
    if cpu := measured.get("cpu"):
        parts.append(f"{cpu['seconds']} s and {cpu['gib']} GiB on two CPU cores")
    if gpu := measured.get("gpu"):
        parts.append(
            f"{gpu['seconds']} s and {gpu['gib']} GiB of GPU memory on an {gpu_of(notebook)}"
        )
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
            cells = line.split(" | ")
            for column, kind in ((-3, "cpu"), (-2, "gpu")):
                if figures := measured.get(kind):
                    cells[column] = f"{figures['seconds']} s, {figures['gib']} GiB"
            lines[index] = " | ".join(cells)
    README.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
