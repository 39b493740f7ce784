"""Put mistakes into the library, one at a time, and see which cell of which notebook catches each.

The notebooks are the library's test; this tests the test. Each mistake of mutations.toml is made in a copy of the tree,
never in the checkout. The notebooks that run its lines run under nbval, those first that are likely to see it and
then the quick ones, up to the first cell that fails. Where that cell's outputs differ from the stored ones
in last digits alone, it is said so: another machine's rounding could as well have failed it.

What was found is kept in the file of --out, so a run that was stopped goes on; after a change of a notebook only what
hangs on that one runs again. The exit code is 1 if a mistake survived or was caught by a last digit alone.
"""

import argparse
import ast
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_name("mutations.toml")
COPIED = ("siglip_lib", "notebooks", "tests/nbval_sanitize.cfg", "conftest.py", "pyproject.toml")
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-sanitize-with=tests/nbval_sanitize.cfg")
WHICH = (
    "running",
    "likely",
    "all",
)  # of the notebooks: that run the mistake's lines, that the list names
SECONDS = 300  # for a cell; a mistake can make a loop endless
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")

# In the copy, every Python process notes which lines of the library it runs, each once.
TRACER = """\
import os, sys, threading
library, file = os.environ["MUTATE_LIBRARY"], os.open(os.environ["MUTATE_SEEN"], os.O_WRONLY | os.O_APPEND)
seen = set()
def line(frame, event, argument):
    place = frame.f_code.co_filename, frame.f_lineno
    if place not in seen:
        seen.add(place)
        os.write(file, f"{place[0][len(library) + 1:]}:{place[1]}\\n".encode())
    return line
def call(frame, event, argument):
    return line(frame, event, argument) if frame.f_code.co_filename.startswith(library) else None
threading.settrace(call)
sys.settrace(call)
"""

# In the copy, a plugin of pytest: of outputs that differ, it notes the stored and the new one, whole.
REPORTER = """\
import json, os
from nbval.plugin import IPyNbCell
formatted = IPyNbCell.format_output_compare
def noted(self, key, left, right):
    with open(os.environ["MUTATE_DIFFERS"], "a", encoding="utf-8") as file:
        file.write(json.dumps([str(left), str(right)]) + "\\n")
    return formatted(self, key, left, right)
IPyNbCell.format_output_compare = noted
"""


@dataclass(frozen=True)
class Mistake:
    """What becomes what in a file of the library, what a user would suffer, which notebooks are likely to see it."""

    name: str
    file: str
    old: str
    new: str
    harm: str
    likely: tuple[str, ...] = ()

    def lines(self, source: str) -> set[int]:
        """Lines of which one is run wherever the mistake is: of its statement, or of a function whose head it is in."""
        start = source.index(self.old)
        first = source.count("\n", 0, start) + 1
        last = source.count("\n", 0, start + len(self.old.rstrip("\n"))) + 1
        found: set[int] = set()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.stmt):
                continue
            body = getattr(node, "body", None)
            head = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            end = body[0].lineno - 1 if body else node.end_lineno
            if head <= last and first <= end:
                if isinstance(node, ast.FunctionDef):
                    head, end = body[0].lineno, node.end_lineno
                found |= {*range(head, end + 1)}
        return found


@dataclass(frozen=True)
class Outcome:
    """What a run of a notebook gave: the cell that failed, None if none did, and whether by last digits alone."""

    cell: str | None
    last_digit: bool = False


def read_list(path: Path = LIST) -> list[Mistake]:
    """Return the mistakes of a list."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mistake"]
    return [Mistake(**{**entry, "likely": tuple(entry.get("likely", ()))}) for entry in entries]


def apply(mistake: Mistake, tree: Path) -> str:
    """Make a mistake in the library of a tree; return what the file held before."""
    path = tree / "siglip_lib" / mistake.file
    source = path.read_text(encoding="utf-8")
    if (count := source.count(mistake.old)) != 1:
        raise ValueError(f"{mistake.name}: the old text is {count} times in {mistake.file}")
    path.write_text(source.replace(mistake.old, mistake.new), encoding="utf-8")
    return source


# --- one notebook in a copy of the tree ---


def copy_tree(root: Path, target: Path) -> Path:
    """Copy what the notebooks need to a new folder."""
    for name in COPIED:
        source, copied = root / name, target / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif source.exists():
            shutil.copy(source, copied)
    return target


def run_notebook(tree: Path, notebook: str, **variables: str) -> Outcome:
    """Run the cells of a notebook in a tree, each once, up to the first that fails."""
    (tree / "mutate_reporter.py").write_text(REPORTER, encoding="utf-8")
    differing = tree / "differing"
    differing.write_text("", encoding="utf-8")
    # a file's bytecode is told from a change by size and seconds, which a mistake may leave as they are
    settings = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *NBVAL]
    command += ["-p", "mutate_reporter", f"--nbval-cell-timeout={SECONDS}"]
    done = subprocess.run(
        [*command, f"notebooks/{notebook}.ipynb"],
        cwd=tree,
        env=os.environ | settings | {"MUTATE_DIFFERS": str(differing)},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode == 0:
        return Outcome(None)
    if done.returncode != 1:  # neither passed nor failed
        raise RuntimeError(f"pytest did not run {notebook}:\n{done.stdout}{done.stderr}")
    found = re.search(r"^(?:FAILED|ERROR) \S+::(Cell \d+)", done.stdout, re.MULTILINE)
    pairs = [json.loads(line) for line in differing.read_text(encoding="utf-8").splitlines()]
    by_digits = bool(pairs) and all(differ_by_last_digits(*pair) for pair in pairs)
    return Outcome(found[1] if found else "before the first cell", by_digits)


def differ_by_last_digits(stored: str, found: str) -> bool:
    """Whether two outputs have the same words, and numbers that are the same when rounded to one digit less.

    What rounding does to a difference depends on where it lies, so five units of the last digit count as the same
    everywhere. A single digit is a count, and has to be the same.
    """
    ours, theirs = _NUMBER.findall(stored), _NUMBER.findall(found)
    if _NUMBER.sub("#", stored).split() != _NUMBER.sub("#", found).split():
        return False
    return all(a == b or _near(a, b) for a, b in zip(ours, theirs, strict=True))


def _near(a: str, b: str) -> bool:
    if min(len(re.sub(r"[eE].*|\D", "", x)) for x in (a, b)) < 2:
        return False
    a, b = Decimal(a), Decimal(b)
    unit = Decimal(10) ** min(x.as_tuple().exponent for x in (a, b))
    return abs(a - b) <= 5 * unit


# --- all of them ---


class Found:
    """What was found so far, in a file that a further run goes on with."""

    def __init__(self, root: Path, path: Path | None) -> None:
        self._path, self._lock = path, threading.Lock()
        library = hashlib.sha256()
        for file in sorted((root / "siglip_lib").rglob("*.py")):
            library.update(str(file.relative_to(root)).encode() + file.read_bytes())
        self.digests = {
            notebook.stem: hashlib.sha256(library.digest() + notebook.read_bytes()).hexdigest()[:16]
            for notebook in sorted((root / "notebooks").glob("*.ipynb"))
        }
        self.all = {"clean": {}, "seen": {}, "mistakes": {}}
        if path and path.exists():
            self.all |= json.loads(path.read_text(encoding="utf-8"))

    def knows(self, notebook: str) -> bool:
        """Whether it is known which lines a notebook runs, as it is now."""
        return self.all["seen"].get(notebook, {}).get("digest") == self.digests[notebook]

    def is_clean(self, notebook: str) -> bool:
        """Whether a notebook, as it is now, has passed without a mistake."""
        return self.knows(notebook) or self.all["clean"].get(notebook) == self.digests[notebook]

    def note_clean(self, notebook: str) -> None:
        self._keep("clean", notebook, self.digests[notebook])

    def seen(self, notebook: str, file: str) -> set[int]:
        """The lines of a file that a notebook runs."""
        return {*map(int, self.all["seen"][notebook]["lines"].get(file, "").split())}

    def note_seen(self, notebook: str, lines: dict[str, set[int]]) -> None:
        short = {file: " ".join(map(str, sorted(some))) for file, some in sorted(lines.items())}
        self._keep("seen", notebook, {"digest": self.digests[notebook], "lines": short})

    def run(self, mistake: Mistake, notebook: str) -> dict | None:
        """What a run of this notebook with this mistake gave, None if it has not run as both are now."""
        entry = self.all["mistakes"].get(mistake.name, {})
        if entry.get("old") != mistake.old or entry.get("new") != mistake.new:
            return None
        run = entry["runs"].get(notebook)
        return run if run and run["digest"] == self.digests[notebook] else None

    def note_run(self, mistake: Mistake, notebook: str, outcome: Outcome, seconds: float) -> None:
        entry = self.all["mistakes"].get(mistake.name, {})
        same = entry.get("old") == mistake.old and entry.get("new") == mistake.new
        run = {"digest": self.digests[notebook], "seconds": round(seconds)} | vars(outcome)
        runs = (entry["runs"] if same else {}) | {notebook: run}
        kept = {"file": mistake.file, "old": mistake.old, "new": mistake.new, "harm": mistake.harm}
        self._keep("mistakes", mistake.name, kept | {"runs": runs})

    def _keep(self, kind: str, name: str, entry: dict | str) -> None:
        with self._lock:
            self.all[kind][name] = entry
            if self._path:
                temporary = self._path.with_name(self._path.name + ".part")
                temporary.write_text(json.dumps(self.all, indent=1) + "\n", encoding="utf-8")
                os.replace(temporary, self._path)


def lines_run(tree: Path, notebook: str) -> dict[str, set[int]]:
    """The lines of the library that a notebook runs, by file."""
    (tree / "sitecustomize.py").write_text(TRACER, encoding="utf-8")
    noted = tree / "seen"
    noted.write_text("", encoding="utf-8")
    try:
        library = str((tree / "siglip_lib").resolve())
        outcome = run_notebook(tree, notebook, MUTATE_LIBRARY=library, MUTATE_SEEN=str(noted))
    finally:
        (tree / "sitecustomize.py").unlink()
    check_clean(notebook, outcome)
    found: dict[str, set[int]] = {}
    for place in noted.read_text(encoding="utf-8").splitlines():
        file, _, number = place.rpartition(":")
        found.setdefault(file, set()).add(int(number))
    return found


def check_clean(notebook: str, outcome: Outcome) -> None:
    """Raise an error if a notebook failed in which no mistake was made."""
    if outcome.cell:
        raise RuntimeError(f"{notebook} fails without a mistake, in {outcome.cell}; mend it first")


def in_order(mistake: Mistake, root: Path, found: Found, which: str) -> list[str]:
    """The notebooks to run with a mistake, see ``WHICH``; the likely ones first, then the quick."""
    source = (root / "siglip_lib" / mistake.file).read_text(encoding="utf-8")
    lines = mistake.lines(source)
    chosen = [
        n
        for n in found.digests
        if which == "all"
        or (which == "likely" and n[:2] in mistake.likely)
        or (which == "running" and lines & found.seen(n, mistake.file))
    ]

    def place(notebook: str) -> tuple[int, float]:
        text = (root / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
        seconds = json.loads(text)["metadata"].get("measured", {}).get("cpu", {}).get("seconds", 0)
        likely = mistake.likely
        return likely.index(notebook[:2]) if notebook[:2] in likely else len(likely), seconds

    return sorted(chosen, key=place)


def try_mistake(mistake: Mistake, notebooks: list[str], tree: Path, found: Found) -> None:
    """Run the notebooks with a mistake until a cell fails, those left out that have run."""
    runs = [found.run(mistake, notebook) for notebook in notebooks]
    if any(run and run["cell"] for run in runs):
        return
    before = apply(mistake, tree)
    try:
        for notebook, run in zip(notebooks, runs, strict=True):
            if run:
                continue
            start = time.perf_counter()
            outcome = run_notebook(tree, notebook)
            found.note_run(mistake, notebook, outcome, time.perf_counter() - start)
            if outcome.cell:
                return
    finally:
        (tree / "siglip_lib" / mistake.file).write_text(before, encoding="utf-8")


def measure(
    mistakes: list[Mistake], root: Path, found: Found, jobs: int = 1, which: str = WHICH[0]
) -> None:
    """Run all that has not run yet; ``found`` gets what came out."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch, ThreadPoolExecutor(jobs) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            trees.put(copy_tree(root, Path(scratch, str(job))))
        stopped = threading.Event()

        def in_a_tree(work, *given):
            if stopped.is_set():
                return None
            tree = trees.get()
            try:
                return work(tree, *given)
            finally:
                trees.put(tree)

        def all_of(work, items: list, what: str) -> None:
            futures = [pool.submit(in_a_tree, work, item) for item in items]
            try:
                for future in tqdm(futures, desc=what, disable=not items):
                    future.result()
            except BaseException:
                stopped.set()
                raise

        def look(tree: Path, notebook: str) -> None:
            if which == "running":
                found.note_seen(notebook, lines_run(tree, notebook))
            else:
                check_clean(notebook, run_notebook(tree, notebook))
                found.note_clean(notebook)

        def attempt(tree: Path, mistake: Mistake) -> None:
            try_mistake(mistake, in_order(mistake, root, found, which), tree, found)

        # a cell that fails anyway would seem to catch everything
        if which == "running":
            unknown = [n for n in found.digests if not found.knows(n)]
        else:
            needed = {n for mistake in mistakes for n in in_order(mistake, root, found, which)}
            unknown = [n for n in sorted(needed) if not found.is_clean(n)]
        all_of(look, unknown, "notebooks without a mistake")
        all_of(attempt, mistakes, "mistakes")


def table(
    mistakes: list[Mistake], root: Path, found: Found, which: str = WHICH[0]
) -> tuple[str, bool]:
    """Return a line for each mistake and a summary, and whether cells caught all, none by a last digit alone."""
    rows, counts = [], {"caught": 0, "by a last digit": 0, "survived": 0}
    for mistake in mistakes:
        notebooks = in_order(mistake, root, found, which)
        runs = {notebook: found.run(mistake, notebook) for notebook in notebooks}
        caught = next(((n, run) for n, run in runs.items() if run and run["cell"]), None)
        if caught:
            kind = "by a last digit" if caught[1]["last_digit"] else "caught"
            where = f"{caught[0][:2]} {caught[1]['cell']}"
        elif None in runs.values():
            raise ValueError(f"{mistake.name} has not run")
        else:
            kind, where = (
                "survived",
                f"{mistake.harm}; ran: {' '.join(n[:2] for n in runs) or 'none'}",
            )
        counts[kind] += 1
        rows.append(f"{mistake.name:46} {mistake.file:27} {kind:15} {where}")
    summary = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    lines = [*rows, f"{len(mistakes)} mistakes: {summary}"]
    return "\n".join(lines), counts["caught"] == len(mistakes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="only mistakes whose name or file holds one of them"
    )
    parser.add_argument("--out", type=Path, help="JSON of what was found, to go on with")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time (1)")
    parser.add_argument(
        "--notebooks",
        choices=WHICH,
        default=WHICH[0],
        help="those that run the mistake's lines, which are found out first; those that the list names; or all",
    )
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs} must be at least 1")
    mistakes = [
        m
        for m in read_list()
        if not given.words or any(w in f"{m.name} {m.file}" for w in given.words)
    ]
    if not mistakes:
        parser.error(f"no mistake has {' or '.join(given.words)} in its name or file")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = Found(ROOT, given.out)
    measure(mistakes, ROOT, found, given.jobs, given.notebooks)
    text, good = table(mistakes, ROOT, found, given.notebooks)
    print(text)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
