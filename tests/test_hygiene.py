"""The conventions of the notebooks: how they are built, what may be stored in them, and what they link to."""

import ast
import base64
import configparser
import importlib
import itertools
import json
import re
import statistics
from contextlib import suppress

import nbformat
import pytest
import torch
import yaml
from notebook_files import PATHS, ROOT, all_code_cells, code_cells, read
from store_outputs import GPU, gpu_of, write_head

from siglip_lib import attention_backends

TAGS = {"nbval-ignore-output"}
PRIVATE = re.compile(
    r"/(home|root|tmp|Users|opt|work)/"  # paths of a machine
    r"|\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"  # addresses
    r"|token=|hf_[A-Za-z0-9]{20}"  # secrets
)

notebooks = pytest.mark.parametrize(
    ("path", "notebook"), [pytest.param(path, read(path), id=path.stem) for path in PATHS]
)


def outputs(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def lines(cell) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]


def test_the_series_is_numbered_without_gaps():
    assert [path.stem[:2] for path in PATHS] == [f"{i:02d}" for i in range(len(PATHS))]


@notebooks
def test_every_cell_was_run_once_from_top_to_bottom(path, notebook):
    counts = [cell.execution_count for cell in all_code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@notebooks
def test_stored_outputs_hold_no_errors_and_nothing_private(path, notebook):
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output["text"]
        text = json.dumps({k: v for k, v in output.get("data", {}).items() if "image" not in k})
        found = PRIVATE.search(text + output.get("text", ""))
        assert not found, f"an output holds {found[0]!r}"
    assert path.stat().st_size < 1_000_000


@notebooks
def test_no_text_waits_for_a_figure(path, notebook):
    waiting = [cell.id for cell in notebook.cells if "@@" in cell.source]
    assert waiting == []


@pytest.mark.parametrize(
    ("full", "words"),
    [
        ({"seconds": 7, "gib": 1.5}, "7 s and 1.5 GiB of GPU memory on an H200"),
        (
            {"seconds": 7, "gib": 1.5, "gpus": 2},
            "7 s and at most 1.5 GiB of GPU memory on each of 2 H200s",
        ),
    ],
)
def test_the_head_tells_the_memory_on_one_gpu_and_on_several(full, words):
    cells = [nbformat.v4.new_markdown_cell("**Measured:** nothing"), nbformat.v4.new_code_cell()]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="device: NVIDIA H200")]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"measured": {"full": full}})
    write_head(notebook)
    assert notebook.cells[0].source == f"**Measured:** {words}."


@notebooks
def test_stored_outputs_come_from_the_gpu_they_name(path, notebook):
    named = {gpu for output in outputs(notebook) for gpu in GPU.findall(output.get("text", ""))}
    assert named == {gpu_of(notebook)}  # one kind in all cells
    assert set(notebook.metadata["measured"]) == {"cpu", "lab", "full"}
    head = notebook.cells[0].source
    write_head(notebook)
    assert notebook.cells[0].source == head  # says what was measured


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_prediction_offers_choices_and_its_answer_is_closed(path):
    predictions, open_ones, is_answered = 0, set(), False
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            assert not open_ones, f"an answer stands open below {open_ones}"
            is_answered = False
            _, asks, question = cell.source.rpartition("**Predict")
            if asks:
                assert "(a)" in question
                assert "(b)" in question
                predictions, open_ones = predictions + 1, {cell.id}
        elif cell.metadata.get("jupyter", {}).get("outputs_hidden"):
            open_ones, is_answered = set(), True
        elif is_answered:
            pictures = [output for output in cell.outputs if output.output_type == "display_data"]
            assert not pictures, f"the picture of {cell.id} shows the answer"
    assert not open_ones
    assert predictions >= 3


@notebooks
def test_tags_are_known_and_few(path, notebook):
    cells = code_cells(notebook)
    tags = [set(cell.metadata.get("tags", [])) for cell in cells]
    assert set().union(*tags) <= TAGS
    assert sum("nbval-ignore-output" in found for found in tags) <= len(cells) / 5
    assert not any("NBVAL" in cell.source for cell in cells)


@notebooks
def test_what_is_not_compared_is_at_least_shown(path, notebook):
    assert not [cell.id for cell in code_cells(notebook)
                if cell.metadata.get("tags") and not cell.outputs]  # fmt: skip


@notebooks
def test_code_cells_are_short(path, notebook):
    sizes = [len(lines(cell)) for cell in code_cells(notebook)]
    assert max(sizes) <= 40
    assert statistics.median(sizes) <= 8


@notebooks
def test_no_cell_uses_what_nbval_cannot_compare(path, notebook):
    for cell in code_cells(notebook):
        assert not cell.source.rstrip().endswith(";")
        assert not re.search(r"clear_output|\bOut\[|widgets\.Output|\binteract\(", cell.source)


@notebooks
def test_imports_stand_in_the_setup_cell(path, notebook):
    for cell in code_cells(notebook)[1:]:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                # what most machines lack is imported where it is used
                assert re.search(r"import flash_attn|(from|import) xformers", ast.unparse(node))


@notebooks
def test_anatomy(path, notebook):
    head, last = notebook.cells[0].source, notebook.cells[-1].source
    assert head.startswith(f"# {path.stem[:2]} · ")
    for part in ("You will be able to", "Needs:", "In the library:", "Measured:"):
        assert part in head
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "**Predict" in text
    assert "## Exercises" in text
    assert "## Summary" in last
    assert "**References" in last
    assert re.search(r"\| symbol \| meaning \| shape \|", text)


def pictures(notebook) -> list[tuple[str, str]]:
    """The pictures stored in a notebook, in base64, each with its alt text."""
    return [
        (data.replace("\n", ""), output.metadata[kind]["alt"])
        for output in outputs(notebook)
        for kind, data in output.get("data", {}).items()
        if kind.startswith("image/")
    ]


@notebooks
def test_pictures_have_alt_text(path, notebook):
    assert pictures(notebook)
    assert all(alt.strip() for _, alt in pictures(notebook))


@notebooks
def test_no_code_in_a_text_is_cut_by_a_line_that_begins_a_list(path, notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            for before, line in itertools.pairwise(text.splitlines()):
                cut = before.count("`") % 2 and re.match(r"([-+*>]|#+|\d+[.)]) ", line)
                assert not cut, f"{before} / {line}"


@notebooks
def test_links_between_notebooks_lead_somewhere(path, notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for name in re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text):
        assert (path.parent / name).exists(), name


def test_next_leads_from_each_notebook_to_the_following_one():
    for path, following in itertools.pairwise(PATHS):
        last = read(path).cells[-1].source
        paragraphs = [text for text in last.split("\n\n") if text.startswith("**Next:**")]
        assert len(paragraphs) == 1, path.name
        first_link = re.search(r"\]\((.*?)\)", paragraphs[0])
        assert first_link, path.name
        assert first_link[1] == following.name, path.name
    assert "**Next:**" not in read(PATHS[-1]).cells[-1].source


def test_the_map_of_the_series_shows_every_notebook_under_its_name():
    text = "\n".join(cell.source for cell in read(PATHS[0]).cells if cell.cell_type == "markdown")
    rows = re.findall(r"^\| \[(\d\d)\]\((.*?)\) (.*?) \|", text, re.MULTILINE)
    assert rows == [
        (path.stem[:2], path.name, read(path).cells[0].source.splitlines()[0].partition(" · ")[2])
        for path in PATHS
    ]


def test_what_fits_is_told_of_every_notebook():
    (cell,) = (c for c in code_cells(read(PATHS[0])) if 'metadata"]["measured"]' in c.source)
    pattern = re.search(r'Path\(\)\.glob\("(.*?)"\)', cell.source)[1]
    assert sorted((ROOT / "notebooks").glob(pattern)) == PATHS


def test_the_table_of_backends_has_each_in_the_order_of_auto():
    text = "\n".join(cell.source for cell in read(PATHS[0]).cells if cell.cell_type == "markdown")
    table = text.partition("| backend | what it is |\n")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == list(attention_backends("cpu", torch.float32, 72))


def in_the_locales_encoding(source: str) -> list[str]:
    """Calls that read or write a text without saying that it is UTF-8; an ASCII locale would take another encoding."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg for keyword in call.keywords}
        values = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        binary = any(
            isinstance(x, ast.Constant) and re.fullmatch("[rwax+]*b[+]?", str(x.value))
            for x in values
        )
        is_text = name.endswith((".read_text", ".write_text")) or "text" in given
        is_open = name == "open" or (
            name.endswith(".open") and not name.startswith(("Image", "os", "tarfile"))
        )
        if (is_text or (is_open and not binary)) and "encoding" not in given:
            found.append(ast.unparse(call))
    return found


CODE = [
    *(ROOT / "siglip_lib").rglob("*.py"),
    *(ROOT / "tools").glob("*.py"),
    *(ROOT / "tools/site").glob("*.py"),
    *(path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")),
]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_code_reads_and_writes_text_as_utf8(path):
    assert not in_the_locales_encoding(path.read_text(encoding="utf-8"))


@notebooks
def test_cells_read_and_write_text_as_utf8(path, notebook):
    for cell in code_cells(notebook):
        assert not in_the_locales_encoding(cell.source)


def test_nbval_can_read_its_settings_in_any_locale():
    settings = configparser.RawConfigParser()
    settings.read(ROOT / "tests/nbval_sanitize.cfg", encoding="ascii")
    assert re.fullmatch(settings["seconds"]["regex"], "1.5 µs")


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("open(name)", 1),
        ("path.open('w')", 1),
        ("path.read_text() + path.write_text(x)", 2),
        ("run(line, text=True)", 1),
        ("open(name, 'rb'), path.open(mode='wb'), Image.open(name)", 0),
        ("open(name, encoding='utf-8'), path.read_text(encoding='ascii')", 0),
    ],
)
def test_what_reads_in_the_locales_encoding_is_found(code, number):
    assert len(in_the_locales_encoding(code)) == number


def loaded_pictures(text: str) -> list[str]:
    """Where the pictures of a Markdown text come from."""
    return re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", text) + re.findall(
        r"<(?:img|source|image|video|iframe)\b[^>]*?(?:src|srcset|href)\s*=\s*[\"']?([^\"'\s>]+)",
        text,
    )


@notebooks
def test_pictures_of_a_text_come_with_the_notebook(path, notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for source in loaded_pictures(text):
        assert (path.parent / source).is_file(), f"{source} is no file of ours"


def test_pictures_of_the_readme_come_with_it():
    sources = loaded_pictures((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sources
    assert all((ROOT / source).is_file() for source in sources)


def test_the_badge_loads_nothing_itself():
    badge = (ROOT / "notebooks/open-in-colab.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"\s]+", badge) == ["http://www.w3.org/2000/svg"]  # a name
    assert "href" not in badge
    assert "url(" not in badge


@pytest.mark.parametrize(
    "workflow", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name
)
def test_workflows_read_only_and_use_what_nobody_can_move(workflow):
    parsed = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert parsed["permissions"] == {"contents": "read"}
    for job in parsed["jobs"].values():
        if "permissions" in job:  # to publish takes these two, in a job that runs no code of ours
            assert job["permissions"] == {"pages": "write", "id-token": "write"}
            assert [step["uses"].partition("@")[0] for step in job["steps"]] == [
                "actions/deploy-pages"
            ]
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40))
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_readme_has_a_row_for_each_notebook_with_its_measured_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in PATHS:
        row = next(line for line in readme.splitlines() if f"(notebooks/{path.name})" in line)
        measured = read(path).metadata["measured"]
        for column, size in enumerate(("cpu", "lab", "full"), start=4):
            figures = f"{measured[size]['seconds']} s, {measured[size]['gib']} GiB"
            assert row.split("|")[column].strip() == figures


def test_readme_shows_a_stored_picture():
    stored = [data for path in PATHS for data, _ in pictures(read(path))]
    shown = base64.b64encode((ROOT / ".github/attention.jpg").read_bytes()).decode()
    assert shown in stored
    assert "(.github/attention.jpg)" in (ROOT / "README.md").read_text(encoding="utf-8")


TEXTS = [
    ROOT / "README.md",
    *(
        path
        for folder in ("siglip_lib", "tools", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if "node_modules" not in path.parts
    ),
    *(ROOT / "siglip_lib").rglob("*.md"),
    *PATHS,
]


def text_of(path) -> str:
    """A file's text; of a notebook, its cells'."""
    if path.suffix == ".ipynb":
        return "\n".join(cell.source for cell in read(path).cells)
    return path.read_text(encoding="utf-8")


def resolves(dotted: str) -> bool:
    """Whether a module, or an attribute of one, has this name."""
    found, names = None, dotted.split(".")
    for place, name in enumerate(names):
        with suppress(ImportError):
            found = importlib.import_module(".".join(names[: place + 1]))
            continue
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def dead_names(text: str) -> list[str]:
    """What is imported from the library, or named with its module, and is not there."""
    names = re.findall(r"(?<![\w./])siglip_lib(?:\.[A-Za-z_]\w*)+", text)
    for module, imported in re.findall(
        r"from (siglip_lib[.\w]*) import (\([^)]*\)|[^\n\"';\\]+)", text
    ):
        imported = re.sub(r"#.*|[()]", "", imported)
        names += [f"{module}.{word.split()[0]}" for word in imported.split(",") if word.strip()]
    return sorted({name for name in names if not resolves(name)})


def dead_paths(text: str) -> list[str]:
    """Files and folders of the library that a text names and that are not there."""
    paths = re.findall(r"(?<![\w-])siglip_lib/[\w./-]*\w", text)
    return sorted({path for path in paths if not (ROOT / path).exists()})


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_of_the_library_is_there(path):
    text = text_of(path)
    assert not dead_names(text)
    assert not dead_paths(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import LIB.ring", ["LIB.ring"]),
        ("from LIB import (\n    attend,\n    losses as l,  # old\n)", ["LIB.losses"]),
        ("from LIB.train_command import main", ["LIB.train_command", "LIB.train_command.main"]),
        ("`LIB.backends._runs`, torch.ops.LIB.none", ["LIB.backends._runs"]),
        ("LIB.tower.block.Block, from LIB import pointing as p", []),
    ],
)  # fmt: skip
def test_what_is_no_longer_in_the_library_is_found(text, found):
    assert dead_names(text.replace("LIB", "siglip_lib")) == [
        name.replace("LIB", "siglip_lib") for name in found
    ]


def test_a_path_that_is_no_longer_in_the_library_is_found():
    text = "[a](../LIB/losses.py), `LIB/tower/block.py`, LIB/kernels."
    assert dead_paths(text.replace("LIB", "siglip_lib")) == ["siglip_lib" + "/losses.py"]
