"""Run notebooks and store what they show: how the outputs in git are made.

On a GPU machine the outputs, and the time and memory in each head, are replaced. With --only-figures the notebook keeps
its outputs and only the figures of this machine's kind are replaced: that is how the CPU's get into the head.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from tqdm import tqdm

HEAD = re.compile(r"\*\*Measured:\*\*.*")
ASK = """
import json as _json, resource as _resource, torch as _torch
print(_json.dumps({
    "resident": _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss * 1024,
    "gpu": _torch.cuda.memory_reserved() if _torch.cuda.is_available() else 0,
}))
"""


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
    progress = tqdm(arguments.notebooks, unit="notebook")
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


def execute(path: Path) -> tuple[nbformat.NotebookNode, dict[str, float]]:
    """Run a notebook from top to bottom; return it with its outputs, and its time and memory."""
    notebook = nbformat.read(path, as_version=4)
    # while this is set the kernel drops what C code prints, as it does under nbval
    os.environ["PYTEST_CURRENT_TEST"] = "store"
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    start = time.perf_counter()
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index, execution_count=None)
        seconds = time.perf_counter() - start
        asked = nbformat.v4.new_code_cell(ASK)
        notebook.cells.append(asked)
        client.execute_cell(asked, len(notebook.cells) - 1)
        notebook.cells.pop()
    used = json.loads(asked.outputs[0]["text"])
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the run, which no reader looks at
    notebook.metadata["language_info"] = {"name": "python"}
    memory = used["gpu"] or used["resident"]
    return notebook, {"seconds": round(seconds), "gib": round(memory / 2**30, 1)}


def write_head(notebook: nbformat.NotebookNode) -> None:
    """Put the measured figures into the notebook's first cell."""
    measured = notebook.metadata["measured"]
    parts = []
    if cpu := measured.get("cpu"):
        parts.append(f"{cpu['seconds']} s and {cpu['gib']} GiB on two CPU cores")
    if gpu := measured.get("gpu"):
        parts.append(f"{gpu['seconds']} s and {gpu['gib']} GiB of GPU memory on an H200")
    head = notebook.cells[0]
    if not HEAD.search(head.source):
        raise SystemExit("the first cell has no line that starts with **Measured:**")
    head.source = HEAD.sub("**Measured:** " + "; ".join(parts) + ".", head.source)


if __name__ == "__main__":
    main()
