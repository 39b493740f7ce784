"""conftest.py turns nbval's ways of failing late, often or not at all into one clear failure."""

import shutil
import subprocess
import sys
import time

import nbformat
from notebook_files import ROOT

NOTEBOOKS = {
    "raises": ["x = 1 / 0", "print(x)", "print(x)"],
    "dies": ["import os; os._exit(1)", "1 + 1"],
    "swallows": [
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass",
        "1 + 1",
    ],
    "differs": ["print(2)", "y = 3", "assert y == 3"],
}


REPEATED = {
    "consumes": ["items = [1]", "print(items.pop())", "y = 3"],
    "goes_on": ["total = 0", "total += 1\nprint(total)", "y = 3"],
    "draws": ["import random\nrandom.seed(0)\nx = random.random()", "print(x > 1)"],
}
OUTPUTS = {
    "print(items.pop())": "1\n",
    "total += 1\nprint(total)": "1\n",
    "print(x > 1)": "False\n",
}


def nbval(folder, notebooks, *options):
    """Run notebooks, each a list of its cells' sources, under nbval and the project's conftest.py."""
    shutil.copy(ROOT / "conftest.py", folder)
    for name, sources in notebooks.items():
        cells = [nbformat.v4.new_code_cell(s, execution_count=i) for i, s in enumerate(sources, 1)]
        for cell in cells:
            if text := OUTPUTS.get(cell.source):
                cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "",
            "language": "python",
        }
        nbformat.write(notebook, folder / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", *options]
    command += ["--nbval-cell-timeout=5", "-rA", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_each_broken_notebook_fails_once_and_soon(tmp_path):
    start = time.monotonic()
    run = nbval(tmp_path, NOTEBOOKS)
    assert time.monotonic() - start < 40
    for name in NOTEBOOKS:
        assert f"FAILED {name}.ipynb::Cell 0" in run.stdout
    assert "4 failed" in run.stdout.splitlines()[-1]
    assert "XFAIL" not in run.stdout
    assert "Cell 0 of this notebook did not finish" in run.stdout
    assert "the kernel died" in run.stdout
    assert "the cell swallowed the interrupt" in run.stdout
    # an output that differs breaks nothing after it
    assert "PASSED differs.ipynb::Cell 2" in run.stdout


def test_a_cell_that_cannot_run_twice_fails_the_second_time(tmp_path):
    run = nbval(tmp_path, REPEATED, "--each-twice")
    assert "FAILED consumes.ipynb::Cell 1 again" in run.stdout
    assert "FAILED goes_on.ipynb::Cell 1 again" in run.stdout
    assert "PASSED goes_on.ipynb::Cell 2 again" in run.stdout
    assert "PASSED draws.ipynb::Cell 1 again" in run.stdout
    assert "2 failed" in run.stdout.splitlines()[-1]
