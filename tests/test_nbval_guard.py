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


def test_each_broken_notebook_fails_once_and_soon(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    for name, sources in NOTEBOOKS.items():
        cells = [nbformat.v4.new_code_cell(s, execution_count=i) for i, s in enumerate(sources, 1)]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "",
            "language": "python",
        }
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"]
    options = ["--nbval-cell-timeout=5", "-rA", "-p", "no:cacheprovider", str(tmp_path)]
    start = time.monotonic()
    run = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
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
