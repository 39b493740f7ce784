"""The notebooks as pages: in parts, with answers closed, progress bars as a line and widgets as stills."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"
ANSWER = {
    "code_prompt_show": "Show what was measured",
    "code_prompt_hide": "Hide what was measured",
}
SETUP = {"code_prompt_show": "Show the imports", "code_prompt_hide": "Hide the imports"}
HERE = (
    "This page shows a stored run, on the device named below. What was measured after a **Predict** is closed until "
    "you open it; the text below it tells the outcome, so choose before you read on. The cells in which a reader notes "
    "a prediction are left out. To change and run all of it, "
    "[start your own copy](../index.md#run-them-yourself)."
)
# a cell that notes a reader's prediction or counts those that came true
_PREDICTION = re.compile(r'(predict|count_predictions)\("')
# what tqdm stores of a bar that is about to start
_BAR = re.compile(r"\| 0/(\d+) \[.*\?(\w+)/s\]")
# of a widget that has no still
_ONLY_LIVE = {
    "search_box": "a field for a text, and below it the pictures that fit it best",
    "attention_viewer": "a picture whose patches can be clicked, to see where each looks",
}


@dataclass(frozen=True)
class Part:
    """A run of notebooks under one heading."""

    title: str
    about: str
    numbers: range


PARTS = (
    Part("The image tower", "SigLIP's image tower, one component at a time.", range(9)),
    Part(
        "SigLIP", "The loss, a training, and maps of where the trained tower looks.", range(9, 12)
    ),
    Part("Kernels", "What runs underneath, written in Triton.", range(12, 14)),
    Part("Many GPUs", "The loss and the training, shared by several GPUs.", range(14, 15)),
    Part("Language", "From the tower to a language model.", range(15, 16)),
    Part("Hopper", "Attention once more, for one generation of GPUs.", range(16, 17)),
)


def in_parts(paths: list[Path]) -> list[tuple[Part, list[Path]]]:
    """The parts that have notebooks, each with its own.

    Raises:
        ValueError: a notebook's number is in no part.
    """
    found = [(part, [p for p in paths if int(p.stem[:2]) in part.numbers]) for part in PARTS]
    lost = set(paths) - {path for _, some in found for path in some}
    if lost:
        raise ValueError(f"no part of the series holds {sorted(path.name for path in lost)}")
    return [(part, some) for part, some in found if some]


def title_and_claim(notebook: NotebookNode) -> tuple[str, str]:
    """A notebook's title and its first paragraph."""
    title, claim = notebook.cells[0].source.split("\n\n")[:2]
    if claim.startswith("[!["):  # badges, where `make links` wrote them
        claim = notebook.cells[0].source.split("\n\n")[2]
    return title.removeprefix("# "), claim.replace("\n", " ")


def prepare(
    notebook: NotebookNode, stills: dict[str, Callable[[], str]], names: dict[str, str]
) -> NotebookNode:
    """Return the notebook as its page shows it; the one given stays as it is.

    Args:
        notebook: as stored.
        stills: functions that return the HTML of a widget's still, by the id of the cell that shows the widget.
        names: where the reference describes a name of the library, such as "Block": "siglip_lib.tower.Block".
    """
    notebook = nbformat.from_dict(notebook)
    notebook.cells = [cell for cell in notebook.cells if not notes_a_prediction(cell)]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # the first one looks for the library, which a page does without
    notebook.cells[notebook.cells.index(code[0])] = nbformat.v4.new_markdown_cell(HERE)
    _tag(code[1], "hide-input", SETUP)
    for cell in code[1:]:
        cell.outputs = _joined(cell.outputs)
        if cell.metadata.get("jupyter", {}).get("outputs_hidden"):
            _tag(cell, "hide-output", ANSWER)
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                output["data"] = _without_widget(cell, output["data"]["text/plain"], stills)
    notebook.cells[0].source = _with_links(notebook.cells[0].source, names)
    return notebook


def notes_a_prediction(cell: NotebookNode) -> bool:
    """Whether it is a cell without output, which only a running notebook can answer."""
    return cell.cell_type == "code" and bool(_PREDICTION.match(cell.source))


def alternative_texts(notebook: NotebookNode) -> dict[str, str]:
    """The alternative text of each stored picture, by the SHA-256 of its bytes."""
    found = {}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        for kind, data in output.get("data", {}).items():
            if kind.startswith("image/"):
                digest = hashlib.sha256(base64.b64decode(data)).hexdigest()
                found[digest] = output["metadata"][kind]["alt"]
    return found


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs, where what was printed in several pieces one after the other is one."""
    joined = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if (
            output.output_type == before.get("output_type") == "stream"
            and output.name == before.name
        ):
            before.text += output.text
        else:
            joined.append(output)
    return joined


def _tag(cell: NotebookNode, tag: str, prompts: dict[str, str]) -> None:
    cell.metadata["tags"] = [*cell.metadata.get("tags", []), tag]
    cell.metadata["mystnb"] = prompts


def _without_widget(
    cell: NotebookNode, words: str, stills: dict[str, Callable[[], str]]
) -> dict[str, str]:
    """What is shown in a widget's place."""
    if bar := _BAR.search(words):
        number, unit = int(bar[1]), "rounds" if bar[2] == "it" else f"{bar[2]}s"
        return {"text/plain": f"(a progress bar, of {number:,} {unit})"}
    if still := stills.get(cell.id):
        return {"text/html": still()}
    call = ast.parse(cell.source).body[-1].value
    return {"text/plain": f"(in a running notebook: {_ONLY_LIVE[ast.unparse(call.func)]})"}


def _with_links(head: str, names: dict[str, str]) -> str:
    """The head of a notebook, in which each name of its library line leads to the reference."""

    def link(match: re.Match) -> str:
        return f"[`{match[1]}`](#{names[match[1]]})" if match[1] in names else match[0]

    before, line, after = head.partition("- **In the library:**")
    line_text, rest, end = after.partition("\n- **")
    return before + line + re.sub(r"`(\w+)`", link, line_text) + rest + end
