"""conftest.py turns nbval's ways of failing late, often or not at all into one clear failure."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
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
    ours = ("PYTEST_", "OMP_NUM_THREADS")  # what a worker that runs this test was told
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


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


def test_workers_keep_a_notebooks_cells_together_and_each_to_one_core(tmp_path):
    alone = "import os\nassert os.environ['OMP_NUM_THREADS'] == '1'"
    sources = {name: [alone, *REPEATED["goes_on"]] for name in ("first", "second")}
    run = nbval(
        tmp_path,
        {**sources, "raises": NOTEBOOKS["raises"]},
        *("--each-twice", "-n2", "--dist=loadfile", "-v"),
    )
    workers = {}
    for worker, name in re.findall(r"\[(gw\d)\].* (\w+)\.ipynb::", run.stdout):
        workers.setdefault(name, set()).add(worker)
    assert sorted(map(len, workers.values())) == [1, 1, 1]
    assert set().union(*workers.values()) == {"gw0", "gw1"}
    for name in sources:
        assert f"FAILED {name}.ipynb::Cell 2 again" in run.stdout
        assert f"PASSED {name}.ipynb::Cell 3 again" in run.stdout
    assert "FAILED raises.ipynb::Cell 0 " in run.stdout
    assert "Cell 0 of this notebook did not finish" in run.stdout
    assert "3 failed, 14 passed, 5 skipped" in run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("cores", "gib", "smi", "workers"),
    [
        (2, 3.8, None, 2),
        (64, 3.8, None, 2),
        (64, 512, None, 8),
        (4, 512, None, 4),
        (2, 1, None, 1),
        (64, 512, "/usr/bin/nvidia-smi", 0),
    ],
)
def test_as_many_workers_as_cores_and_memory_are_enough_for(cores, gib, smi, workers, monkeypatch):
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(shutil, "which", lambda program: smi)
    monkeypatch.setattr(conftest, "_bytes_of_memory", lambda: int(gib * 2**30))
    assert conftest.pytest_xdist_auto_num_workers() == workers
