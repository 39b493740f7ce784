"""Make nbval fail once and clearly, and share the cores. The notebooks also pass without this file (--noconftest)."""

import copy
import json
import os
import queue
import shutil
import time
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch: each worker has a core, and so has what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from nbval.kernel import RunningKernel
    from nbval.plugin import IPyNbCell, NbCellError
except ImportError:  # the unit tests need no nbval
    IPyNbCell = ()
else:

    def _await_reply(self: RunningKernel, msg_id: str, timeout: float | None = None) -> None:
        """nbval's own, but a kernel that died is noticed within a second, not at the cell's timeout."""
        end = None if timeout is None else time.monotonic() + timeout
        while end is None or time.monotonic() < end:
            try:
                message = self.get_message(stream="shell", timeout=1)
            except queue.Empty:
                if not self.is_alive():
                    raise RuntimeError("the kernel died; was its memory enough?") from None
                continue
            if message["parent_header"].get("msg_id") == msg_id:
                return
        raise queue.Empty

    RunningKernel.await_reply = _await_reply


MEMORY = (
    3 * 2**29
)  # bytes, more than a worker takes: torch, and a notebook's kernel or timm and transformers
MOST = 8  # the longest file takes an eighth of the time


def _bytes_of_memory() -> int:
    """What this machine has, or less where it is a container with a limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return memory if told == "max" else min(memory, int(told))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many workers ``-n auto`` starts: one a core, as far as the memory goes; none on a GPU, which is measured."""
    if shutil.which("nvidia-smi"):
        return 0
    return max(1, min(len(os.sched_getaffinity(0)), _bytes_of_memory() // MEMORY, MOST))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--each-twice",
        action="store_true",
        help="nbval: run every cell twice in a row, as readers do, and compare both times",
    )


# the unit tests that take longest, in seconds of a core
LONGEST = {
    "test_train_distributed.py": 60,
    "test_class.py": 110,  # where nbgrader is installed
    "test_kernels_compiled.py": 35,
    "test_mutate.py": 33,
    "test_nbval_guard.py": 33,
    "test_train.py": 31,
    "test_backends.py": 28,
    "test_exercises.py": 27,
    "test_grade_apart.py": 26,
    "test_variants.py": 25,
    "test_checkpoints.py": 22,
    "test_browser.py": 19,
    "test_siglip.py": 19,
    "test_vision_transformer.py": 15,
    "test_kernels_residual.py": 14,
    "test_kernels_sampler.py": 12,
    "test_wheel.py": 12,
    "test_block.py": 12,
}


def _seconds(path: Path) -> float:
    """About how long a file takes: a notebook as it was measured, twice; 0 for what is quick."""
    if path.suffix != ".ipynb":
        return LONGEST.get(path.name, 0)
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    return 2 * metadata.get("measured", {}).get("cpu", {}).get("seconds", 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # the longest file first: then no worker waits long at the end
        seconds = {path: _seconds(path) for path in {item.path for item in items}}
        items.sort(key=lambda item: -seconds[item.path])
    if not config.option.each_twice:
        return
    for place, cell in reversed([*enumerate(items)]):
        if isinstance(cell, IPyNbCell):
            again = IPyNbCell.from_parent(
                cell.parent,
                name=f"{cell.name} again",
                cell_num=cell.cell_num,
                cell=copy.deepcopy(cell.cell),  # comparing changes the outputs
                options=cell.options,
            )
            items.insert(place + 1, again)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Don't run what follows a cell that broke: it would only fail for want of that cell's names."""
    if isinstance(item, IPyNbCell) and hasattr(item.parent, "broken_by"):
        pytest.skip(f"{item.parent.broken_by} of this notebook did not finish")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Remember a cell that raised, died or ran out of time; fail one that swallowed its timeout."""
    if not isinstance(item, IPyNbCell):
        return (yield)
    try:
        result = yield
    except NbCellError as error:
        if "outputs differ" not in str(error):
            item.parent.broken_by = item.name
        raise
    except BaseException:
        item.parent.broken_by = item.name
        raise
    if item.parent.timed_out:
        item.parent.broken_by = item.name
        item.raise_cell_error("the cell swallowed the interrupt that its timeout sent")
    return result
