"""Write the times into the teacher's guide: what its tables say of each notebook is counted here and nowhere else."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "tools" / "site" / "teaching.md"
# a reader's pace in technical text and in code, and how long a prediction takes
WORDS_A_MINUTE, LINES_A_MINUTE, PREDICTION = 120, 25, 2
SESSION, CLASS = 90, 60  # minutes of a term's session, and those of it that the notebook gets


@dataclass
class Part:
    """What a reader meets in one section of a notebook; ``exercises`` has the minutes of each, by its number."""

    words: int = 0
    lines: int = 0
    predictions: int = 0
    exercises: dict[str, int] = field(default_factory=dict)

    @property
    def reading(self) -> float:
        """Minutes for text and code."""
        return self.words / WORDS_A_MINUTE + self.lines / LINES_A_MINUTE

    @property
    def minutes(self) -> float:
        """Minutes for all but the exercises."""
        return self.reading + PREDICTION * self.predictions


def parts(path: Path) -> dict[str, Part]:
    """Count a notebook by its sections: "head", "1", "2", ..., "Exercises", "Summary".

    Folded solutions don't count, nor do the lines in which a reader notes a prediction.
    """
    found = {"head": Part()}
    part = found["head"]
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if line.strip()]
            part.lines += sum(not line.startswith("predict(") for line in lines)
            continue
        text = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL)
        for piece in re.split(r"^(?=## )", text, flags=re.MULTILINE):
            if title := re.match(r"## (\d+|\w+)", piece):
                part = found.setdefault(title[1], Part())
            part.words += len(piece.split())
            _, asks, choices = piece.rpartition("**Predict")
            part.predictions += bool(asks) and "(a)" in choices
            for number, minutes in re.findall(r"^\*\*(\d) \((\d+) minutes", piece, re.MULTILINE):
                part.exercises[f"{path.stem[:2]}.{number}"] = int(minutes)
    return found


def fives(minutes: float) -> int:
    """Round up to a multiple of five."""
    return 5 * math.ceil(minutes / 5)


def reader(found: dict[str, Part]) -> tuple[int, int, int]:
    """A reader's minutes for a whole notebook: reading, predictions, exercises."""
    predictions = PREDICTION * sum(part.predictions for part in found.values())
    exercises = sum(sum(part.exercises.values()) for part in found.values())
    return fives(sum(part.reading for part in found.values())), predictions, exercises


def left_for_home(found: dict[str, Part]) -> int:
    """Minutes that a notebook takes beyond a term's session."""
    return fives(max(0, sum(reader(found)) - CLASS))


def cost(found: dict[str, Part], sections: Iterable[str], exercises: Iterable[str]) -> float:
    """Minutes for some sections and exercises of a notebook.

    Raises:
        KeyError: the notebook has no such section or exercise.
    """
    of_exercises = found["Exercises"].exercises
    return sum(found[name].minutes for name in sections) + sum(of_exercises[n] for n in exercises)


def table_of_times(paths: list[Path]) -> str:
    """The rows of "Times": the machine's as measured, the reader's as counted."""
    rows = []
    for path in paths:
        measured = nbformat.read(path, as_version=4).metadata["measured"]
        machine = [
            f"{measured[size]['seconds']} s, {measured[size]['gib']} GiB"
            for size in ("cpu", "lab", "full")
        ]
        minutes = reader(parts(path))
        at_home = left_for_home(parts(path))
        cells = [link(path), *machine, *map(str, (*minutes, sum(minutes), at_home))]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def link(path: Path) -> str:
    """A notebook's number and title, as a link from the guide."""
    title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
    return f"[{title}](../../notebooks/{path.name})"


def renewed(text: str, paths: list[Path]) -> str:
    """Return the guide with its counted figures as they are now: the table of times, and what leaving out saves."""
    counted = {path.stem[:2]: parts(path) for path in paths}
    text = re.sub(
        r"^(\| notebook \|.*\n\|[-|]+\|\n)(?:\|.*\n)*",
        lambda match: f"{match[1]}{table_of_times(paths)}\n",
        text,
        flags=re.MULTILINE,
    )
    at_home = sum(map(left_for_home, counted.values()))
    text = re.sub(
        r"For all \d+ notebooks that makes \d+ minutes in class and \d+ at home",
        f"For all {len(paths)} notebooks that makes {SESSION * len(paths)} minutes in class and {at_home} at home",
        text,
    )

    def saving(match: re.Match) -> str:
        saved = cost(counted[number], *named(match[1]))
        return f"{match[1]}(saves {5 * round(saved / 5)} minutes)"

    chapters = re.split(r"^(?=### \d\d · )", text, flags=re.MULTILINE)
    for place, chapter in enumerate(chapters):
        if title := re.match(r"### (\d\d)", chapter):
            number = title[1]
            chapters[place] = re.sub(
                r"(\*\*Short of time:\*\* [^()]*)\(saves \d+ minutes\)", saving, chapter
            )
    return "".join(chapters)


def named(text: str) -> tuple[list[str], list[str]]:
    """The sections and the exercises that a line of the guide names: "sections 5, 8 and 9, exercise 03.2"."""
    exercises = re.findall(r"\b\d\d\.\d\b", text)
    sections: list[str] = []
    for listed in re.findall(r"\bsections? (\d+(?:(?:, | and | to )\d+)*)", text):
        for piece in re.split(r", | and ", listed):
            first, _, last = piece.partition(" to ")
            sections += map(str, range(int(first), int(last or first) + 1))
    return sections, exercises


def main() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    GUIDE.write_text(renewed(text, sorted((ROOT / "notebooks").glob("*.ipynb"))), encoding="utf-8")


if __name__ == "__main__":
    main()
