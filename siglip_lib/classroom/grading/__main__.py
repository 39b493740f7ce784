"""``python -m siglip_lib.classroom.grading``: read answers as JSON, grade each in a child, write verdicts line by line.

This process never runs an answer. It imports what grading needs, and does nothing that would start a thread, so that
it can fork.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch._dynamo  # noqa: F401  torch imports it when it first needs it, and that replaces torch.manual_seed

import siglip_lib.kernels  # noqa: F401  before anything imports Triton: the interpreter
from siglip_lib.classroom.exercises import load_checks
from siglip_lib.classroom.grading import landlock
from siglip_lib.classroom.grading.answer import verdict
from siglip_lib.classroom.grading.limits import Limits
from siglip_lib.classroom.grading.patches import Watch

_END_WITH_PARENT, _TAKE_ORPHANS = 1, 36  # of prctl
_LONGEST = 4000  # bytes of a verdict
_SYSTEM = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys/devices/system/cpu"]


def main() -> None:
    """Grade what standard input asks for."""
    job = json.load(sys.stdin)
    limits = Limits(**job["limits"])
    load_checks()
    watch = Watch()
    _prctl(_END_WITH_PARENT, signal.SIGKILL)
    _prctl(_TAKE_ORPHANS, 1)
    print("ready", flush=True)
    for answer in job["answers"]:
        print(json.dumps(_in_a_child(answer, limits, watch)), flush=True)


def _in_a_child(answer: dict, limits: Limits, watch: Watch) -> str:
    folder = tempfile.mkdtemp(prefix="answer-")
    read, write = os.pipe()
    end = time.monotonic() + limits.by_the_clock
    child = os.fork()
    if not child:
        _be_the_child(answer, limits, watch, folder, write)
    os.close(write)
    said, late = b"", False
    while len(said) < _LONGEST:
        ready = select.select([read], [], [], max(0, end - time.monotonic()))[0]
        if late := not ready:
            break
        if not (some := os.read(read, _LONGEST)):
            break
        said += some
    os.close(read)
    # a child that has said something ends by itself
    status, seconds = _wait(child, 0 if late else min(5, max(0, end - time.monotonic())))
    _kill_all(child)
    shutil.rmtree(folder, ignore_errors=True)
    if late or status is None or _used_up(status, seconds, limits):
        return f"wrong: your code had not ended after {limits.seconds:g} s"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"wrong: your code ended Python, with signal {name}"
    if not said or os.WEXITSTATUS(status):
        return f"wrong: your code ended Python, with exit status {os.WEXITSTATUS(status)}"
    return said.decode("utf-8", "replace")


def _be_the_child(answer: dict, limits: Limits, watch: Watch, folder: str, write: int) -> None:
    """Grade one answer, say so, and end."""
    finish, say = os._exit, os.write  # as they are before the answer's code runs
    try:
        os.setsid()
        _prctl(_END_WITH_PARENT, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.chdir(folder)
        landlock.confine(_readable(), [folder, os.devnull])
        limits.impose()
        said = verdict(answer["number"], answer["name"], answer["cells"], watch, limits.gib)
        say(write, said.encode("utf-8", "replace")[:_LONGEST])
    except BaseException:
        finish(2)
    finish(0)


def _readable() -> list[str]:
    """Where Python, its packages and this library lie, and not what else lies beside the library."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    library = str(Path(__file__).parents[2])
    devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
    return [sys.prefix, sys.base_prefix, *packages, library, *_SYSTEM, *devices]


def _wait(child: int, seconds: float) -> tuple[int | None, float]:
    """Return how a child ended, or None if it has not within that time, and the seconds that it used of a core."""
    end = time.monotonic() + seconds
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done or time.monotonic() > end:
            return status if done else None, used.ru_utime + used.ru_stime
        time.sleep(0.01)


def _used_up(status: int, seconds: float, limits: Limits) -> bool:
    """Whether the kernel ended a child for its time on a core: by a first signal, or a last one if it ignored that."""
    if not os.WIFSIGNALED(status):
        return False
    return os.WTERMSIG(status) == signal.SIGXCPU or seconds >= limits.seconds


def _kill_all(child: int) -> None:
    """Kill the child's group, and what has left it: that came to this process when its parent ended."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    orphans = Path("/proc/self/task", str(os.getpid()), "children")  # not in every kernel
    end = time.monotonic() + 5
    while time.monotonic() < end:
        for orphan in orphans.read_text(encoding="ascii").split() if orphans.exists() else ():
            os.kill(int(orphan), signal.SIGKILL)
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)
        except ChildProcessError:
            return


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
