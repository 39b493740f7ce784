"""The widgets as a reader has them: JupyterLab in a headless Chromium, keys and clicks.

JupyterLab listens on this machine alone, behind a random token, and the browser reaches nothing else.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import nbformat
import pytest
from chromium import chromium, programs, webdriver
from notebook_files import ROOT
from serving import listens

from siglip_lib.classroom.predictions import OUTCOMES

pytest.importorskip("jupyterlab", reason="needs jupyterlab")
pytest.importorskip("anywidget", reason="needs anywidget")
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

PATIENCE = 60  # seconds; a busy machine is no failure
CELLS = (
    """
import torch
from siglip_lib import attention_viewer, search_box
from siglip_lib import load_emoji64
from siglip_lib.data import compose, split
from siglip_lib.siglip import EMOJI64_WEIGHTS, embed_pictures, load_siglip

emoji = load_emoji64()
model, tokenizer = load_siglip(EMOJI64_WEIGHTS)
places = split(emoji).seen[::8]
vectors = embed_pictures(model, emoji.pictures[places])
titles = [emoji.names[i] for i in emoji.concept[places]]
search_box(model, tokenizer, vectors, lambda i: emoji.picture(int(places[i])), titles, query="a coin")
""",
    """
attention_viewer(model.image, compose(emoji.pictures[places[:3]]), names=titles[:3])
""",
    """
attention_viewer(torch.eye(16)[None] + torch.arange(16) / 100, compose(emoji.pictures[places[:1]]))
""",
    """
from siglip_lib.classroom import predict

predict("04.1", "a")
""",
    """
from siglip_lib.classroom.exercises import require_exercise

require_exercise("03.1", None)
""",
    """
"noted"
""",
    """
print("measured")
""",
)


def wait_for(what: str, get: Callable[[], object]) -> object:
    """Return what ``get`` gives as soon as it is true; elements that the page replaces meanwhile are asked again."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := get():
                return found
        except WebDriverException:
            pass
        time.sleep(0.05)
    pytest.fail(f"{what}: not within {PATIENCE} s")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab with a notebook, whose settings and state are its own."""
    programs()
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in CELLS])
    asks, test, _, measures = notebook.cells[-4:]
    asks.id, measures.id = "predict-04-1", OUTCOMES["04.1"].measured_by
    test.metadata.tags = ["raises-exception"]  # as in the copies of a class
    measures.metadata.jupyter = {"outputs_hidden": True}
    measures.outputs = [nbformat.v4.new_output("stream", text="the answer\n")]
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    (folder / "files").mkdir()
    nbformat.write(notebook, folder / "files" / "tiny.ipynb")
    (folder / "config" / "labconfig").mkdir(parents=True)
    no_news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (folder / "config" / "labconfig" / "page_config.json").write_text(
        json.dumps(no_news), encoding="utf-8"
    )
    shutil.copytree(ROOT / ".ci/custom", folder / "config" / "custom")
    own = {
        f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")
    }
    token = secrets.token_hex()
    options = (
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0",
        f"--ServerApp.root_dir={folder / 'files'}",
        "--ServerApp.open_browser=False",
        "--ServerApp.allow_root=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.custom_css=True",  # the style of `make lab`
    )
    own |= {"JUPYTER_TOKEN": token, "IPYTHONDIR": str(folder / "ipython")}
    command = [sys.executable, "-m", "jupyterlab", *options]
    log = folder / "log"
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(command, env=os.environ | own, stdout=output, stderr=output)

    def address() -> str | None:
        assert server.poll() is None, log.read_text(encoding="utf-8")
        for file in (folder / "runtime").glob("jpserver-*.json"):
            told = json.loads(file.read_text(encoding="utf-8") or "{}")
            if told and listens(told["port"]):
                return told["url"]
        return None

    try:
        yield f"{wait_for('JupyterLab', address)}doc/tree/tiny.ipynb?token={token}"
    finally:
        server.terminate()  # it ends its kernels
        server.wait(PATIENCE)


@pytest.fixture(scope="module")
def page(lab, tmp_path_factory) -> Iterator:
    """The browser in which all cells of the notebook were run."""
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        page.get(lab)
        idle = """
            const [open] = window.jupyterapp.shell.widgets("main");
            return open.sessionContext.session.kernel.status === "idle";
        """
        wait_for("a kernel", lambda: page.execute_script(idle))
        # a click makes the notebook the current one, on which commands act
        first = (By.CSS_SELECTOR, ".jp-CodeCell")
        wait_for("a cell", lambda: page.find_element(*first).click() or True)
        enabled = "return jupyterapp.commands.isEnabled('notebook:run-all-cells')"
        wait_for("cells that can run", lambda: page.execute_script(enabled))
        closed = (By.CSS_SELECTOR, ".jp-OutputPlaceholder")
        page.told_while_closed = wait_for(
            "a closed output", lambda: page.find_element(*closed)
        ).text
        page.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
        yield page


def all_of(page, selector: str) -> list:
    return page.find_elements(By.CSS_SELECTOR, selector)


def sources(page) -> list[str]:
    """What the pictures found are, in order."""
    return [image.get_attribute("src") for image in all_of(page, "figure img")]


def found(page) -> list[str]:
    """The titles of the pictures found, in order."""
    return [title.text for title in all_of(page, "figcaption div")]


def test_search_as_a_reader_types(page):
    wait_for("pictures of the first query", lambda: len(sources(page)) == 8)
    before = sources(page)
    assert "coin" in found(page)[:3]
    field = all_of(page, ".widget-text input")[0]
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("a bomb")  # no Enter
    wait_for("a bomb", lambda: "bomb" in found(page)[:3])
    assert set(sources(page)) != set(before)
    assert all(source.startswith("data:image/png") for source in sources(page))


def test_clicks_and_arrow_keys_move_the_patch_that_looks(page):
    frame = wait_for("the viewer", lambda: all_of(page, ".siglip-patches > div"))[0]
    image, mark = all_of(page, ".siglip-patches img")[0], all_of(page, ".siglip-patches span")[0]
    caption = all_of(page, ".siglip-patches p")[0]
    wait_for("the picture", lambda: image.size["height"] > 100)

    def after(do: Callable[[], object]) -> str:
        """What the caption tells after an action that should change the picture."""
        before = image.get_attribute("src")
        do()
        wait_for("another map", lambda: image.get_attribute("src") != before)
        return caption.text

    def click(row: float, column: float) -> None:
        """Click on a place counted in patches from the upper left corner."""
        x, y = (column / 8 - 0.5) * image.size["width"], (row / 8 - 0.5) * image.size["height"]
        webdriver.ActionChains(page).move_to_element_with_offset(frame, x, y).click().perform()

    assert "row 2, column 7" in after(lambda: click(1.5, 6.5))
    for key, place in (
        (Keys.ARROW_UP, "row 1, column 7"),
        (Keys.ARROW_LEFT, "row 1, column 6"),
        (Keys.ARROW_DOWN, "row 2, column 6"),
        (Keys.ARROW_RIGHT, "row 2, column 7"),
    ):
        assert place in after(lambda key=key: page.switch_to.active_element.send_keys(key))
    assert page.switch_to.active_element == frame  # JupyterLab took none of them for its cells
    assert mark.is_displayed()
    assert image.get_attribute("alt") == caption.text

    layers = Select(all_of(page, ".widget-dropdown select")[1])
    assert "pooling head" in after(lambda: layers.select_by_visible_text("pooling head"))
    assert not mark.is_displayed()
    click(5.5, 0.5)
    assert "row 2, column 7" in after(lambda: layers.select_by_visible_text("block 0"))
    assert mark.is_displayed()


def test_a_click_on_weights_alone(page):
    frame = wait_for("both viewers", lambda: all_of(page, ".siglip-patches > div")[1:])[0]
    image, caption = (all_of(page, f".siglip-patches {tag}")[1] for tag in ("img", "p"))
    wait_for("the picture", lambda: image.size["height"] > 100)
    assert "row 3, column 3" in caption.text
    before = image.get_attribute("src")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
    x, y = -0.375 * image.size["width"], 0.375 * image.size["height"]  # the lower left patch
    webdriver.ActionChains(page).move_to_element_with_offset(frame, x, y).click().perform()
    wait_for("another map", lambda: image.get_attribute("src") != before)
    assert "row 4, column 1 attends" in caption.text
    assert "from 0.000 (violet) to 1.120 (yellow)" in caption.text
    assert len(all_of(page, ".widget-dropdown select")) == 3  # the tower's; here is no choice


def test_a_closed_output_tells_nothing(page):
    """JupyterLab by itself shows its first line, right below the prediction."""
    assert page.told_while_closed == ""


def test_a_prediction_is_answered_below_what_was_measured(page):
    """And both are open, though the cell's output was stored closed; so when the cell runs again."""
    answer = "measured\nprediction 04.1: you chose (a); it is (b)"
    last = """
        const [open] = window.jupyterapp.shell.widgets("main");
        const cell = open.content.widgets.at(-1);
        return [cell.model.executionCount, cell.outputHidden, cell.outputArea.node.innerText.trim()];
    """
    run = """
        const [open] = window.jupyterapp.shell.widgets("main");
        open.content.activeCellIndex = open.content.widgets.length - 1;
        jupyterapp.commands.execute('notebook:run-cell');
    """
    wait_for("the answer", lambda: page.execute_script(last) == [7, False, answer])
    page.execute_script(run)
    wait_for("the answer again", lambda: page.execute_script(last) == [8, False, answer])


def test_the_test_cell_of_a_class_says_why_and_run_all_goes_on(page):
    """Neither it nor a cell of the reader's own, both below a prediction, is taken for the one that measures."""
    above = """
        const [open] = window.jupyterapp.shell.widgets("main");
        return open.content.widgets.slice(-3).map(cell => cell.outputArea.node.innerText.trim());
    """
    wait_for("the last cell", lambda: "measured" in page.execute_script(above)[-1])
    test, noted, _ = page.execute_script(above)
    assert test.endswith("WrongAnswer: exercise 03.1: not answered yet")
    assert noted.endswith("'noted'")


def test_nothing_comes_from_elsewhere(page):
    wait_for("the viewer", lambda: all_of(page, ".siglip-patches > div"))
    asked = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    here = page.execute_script("return location.origin")
    assert [url for url in asked if not url.startswith((here, "data:", f"blob:{here}"))] == []
