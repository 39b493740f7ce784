"""The website that `make site` built, as a reader has it: static files, a headless Chromium, keys and clicks.

Run by `make test-site`. The server listens on this machine alone, and the browser reaches nothing else.
"""

import html
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import groupby
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
import torch
from chromium import chromium, webdriver
from notebook_files import PATHS, ROOT, read

pytest.importorskip("sphinx", reason="needs the extra [site]: make site installs it")
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from siglip_lib import attention_maps, embed_texts, load_emoji64, load_siglip, make_scenes
from siglip_lib.data import captions, split
from siglip_lib.siglip import EMOJI64_WEIGHTS, SigLIP, Tokenizer

SITE = ROOT / "build/site"
AXE = ROOT / "tools/site/node_modules/axe-core/axe.min.js"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
NOTEBOOKS = [f"notebooks/{path.stem}.html" for path in PATHS]
PATIENCE = 60  # seconds; a busy machine is no failure
PHONE, DESK = (390, 844), (1400, 1000)  # pixels
MOST = 15_000_000  # bytes that the page "Try it" may load

pytestmark = [
    pytest.mark.site,
    pytest.mark.skipif(not PAGES, reason="there is no build/site: make site builds it"),
]
pages = pytest.mark.parametrize("name", PAGES)


class Page(HTMLParser):
    """What a page holds of links, anchors, pictures, disclosures and what it loads."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.links, self.loads, self.anchors, self.images, self.details = [], [], set(), [], []
        self.in_article = False  # below it stands no menu
        self.feed((SITE / name).read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.in_article |= tag == "article"
        self.anchors |= {found.get("id"), found.get("name")}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(found["href"])
        if tag == "img":
            self.images.append(found)
        if tag == "details" and self.in_article:
            self.details.append(found)
        if found.get("src"):
            self.loads.append(found["src"])


@cache
def parsed(name: str) -> Page:
    return Page(name)


@pages
def test_links_and_anchors_hold(name):
    for link in parsed(name).links:
        if urlparse(link).scheme:
            continue
        target, anchor = urldefrag(urljoin(name, link))
        target = unquote(target) or name
        assert (SITE / target).is_file(), link
        if anchor and target.endswith(".html"):
            assert unquote(anchor) in parsed(target).anchors, link


@pages
def test_what_a_page_loads_comes_with_the_site(name):
    for source in parsed(name).loads:
        if not source.startswith("data:"):
            assert not urlparse(source).netloc, source
            assert (SITE / urljoin(name, urlparse(source).path)).is_file(), source


def test_styles_load_nothing_from_elsewhere():
    for style in SITE.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        sources = re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", text)
        assert not [s for pair in sources for s in pair if re.match(r"(https?:)?//", s)], style.name


@pages
def test_every_picture_has_words(name):
    assert all(image.get("alt", "").strip() for image in parsed(name).images)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_shown_with_what_it_stored(path):
    page, notebook = parsed(f"notebooks/{path.stem}.html"), read(path)
    stored = [
        output["metadata"][kind]["alt"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        for kind in output.get("data", {})
        if kind.startswith("image/")
    ]
    shown = [image["alt"] for image in page.images]
    assert [alt for alt in shown if alt in stored] == stored
    text = (SITE / f"notebooks/{path.stem}.html").read_text(encoding="utf-8")
    assert "VBox(" not in text
    assert "%|" not in text  # a progress bar
    hidden = sum(
        bool(cell.metadata.get("jupyter", {}).get("outputs_hidden")) for cell in notebook.cells
    )
    assert sum("below-input" in d.get("class", "") for d in page.details) == hidden
    solutions = sum(cell.source.count("<details>") for cell in notebook.cells)
    assert sum(not d for d in page.details) == solutions
    assert not [d for d in page.details if "open" in d]


def test_cells_that_only_a_running_notebook_answers_are_left_out():
    calls = re.compile(r'<span class="n">(?:count_)?predict(?:ions)?</span><span class="p">\(')
    for name in NOTEBOOKS:
        assert not calls.search(text_of(name)), name
        assert "are left out" in text_of(name), name


def test_a_line_that_begins_with_a_percent_sign_is_text():
    lines = [
        (path.stem, line)
        for path in PATHS
        for cell in read(path).cells
        if cell.cell_type == "markdown"
        for line in cell.source.split("\n")
        if line.startswith("% ")
    ]
    assert lines
    for stem, line in lines:
        assert line[:30] in html.unescape(text_of(f"notebooks/{stem}.html")), (stem, line)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_was_printed_in_pieces_is_one_block(path):
    blocks = 0
    for cell in read(path).cells[2:]:  # from the setup cell's output on
        kinds = [output.output_type for output in cell.get("outputs", ())]
        blocks += sum(kind == "stream" for kind, _ in groupby(kinds))
    shown = len(re.findall('<div class="output stream', text_of(f"notebooks/{path.stem}.html")))
    assert shown == blocks


def test_every_widget_has_a_still():
    widgets = {
        cell.id: f"notebooks/{path.stem}.html"
        for path in PATHS
        for cell in read(path).cells
        for output in cell.get("outputs", ())
        if "VBox(" in output.get("data", {}).get("text/plain", "")
    }
    assert widgets
    stills = [name for name in NOTEBOOKS for _ in re.findall(r'<div class="still">', text_of(name))]
    assert sorted(stills) == sorted(widgets.values())
    assert "A search, as it stands at first" in text_of(NOTEBOOKS[0])


def text_of(name: str) -> str:
    return (SITE / name).read_text(encoding="utf-8")


def test_every_notebook_and_every_public_name_is_there():
    import siglip_lib

    assert set(NOTEBOOKS) <= set(PAGES)
    index = parsed("reference/index.html")
    named = {urldefrag(link)[1].rpartition(".")[2] for link in index.links}
    assert set(siglip_lib.__all__) <= named


def wait_for(what: str, get: Callable[[], object]) -> object:
    """Return what ``get`` gives as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := get():
                return found
        except (WebDriverException, LookupError):
            pass
        time.sleep(0.05)
    pytest.fail(f"{what}: not within {PATIENCE} s")


class Files(http.server.SimpleHTTPRequestHandler):
    """The site's files, as any host of static pages sends them."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args, directory=str(SITE))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Browser:
    """A headless Chromium that opens pages of the site and tells what they asked for and complained of."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, name: str, size: tuple[int, int] = DESK, scheme: str = "light") -> None:
        self.complaints(), self.requests()  # those of the page before
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(self.address + name)
        # mathematics is set after the page has come
        ready = "return !window.MathJax || MathJax.startup.promise.then(() => true)"
        assert self.driver.execute_script(ready)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        told = self.driver.get_log("browser")
        return [entry["message"] for entry in told if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        told = (
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        )
        return [
            e["params"]["request"]["url"]
            for e in told
            if e["method"] == "Network.requestWillBeSent"
        ]

    def all_of(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        found = self.all_of(selector)
        if len(found) != 1:
            raise LookupError(f"{len(found)} elements are {selector}")
        return found[0]

    def focused(self):
        return self.driver.switch_to.active_element

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def call(self, code: str, *arguments: object) -> object:
        """What an asynchronous function in JavaScript returns."""
        wrapped = f"""
            const done = arguments[arguments.length - 1];
            (async (...args) => {{ {code} }})(...arguments).then(done, e => done({{error: String(e)}}));
        """
        found = self.driver.execute_async_script(wrapped, *arguments)
        assert not (isinstance(found, dict) and "error" in found), found
        return found


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser"), logs=True) as page:
        page.set_script_timeout(120)
        yield Browser(page, address)


@pages
def test_a_page_loads_without_a_complaint_or_a_request_to_elsewhere_and_fits_a_phone(browser, name):
    browser.open(name, PHONE)
    assert browser.complaints() == []
    # chrome: and chrome-untrusted: are the browser's own page, which it started with
    here = (browser.address, "data:", f"blob:{browser.address}", "chrome")
    assert [url for url in browser.requests() if not url.startswith(here)] == []
    browser.driver.execute_script(
        "document.querySelectorAll('details').forEach(d => d.open = true)"
    )
    wide = """
        const page = document.documentElement, width = page.clientWidth;
        const scrolls = e => e && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
        const out = e => e.getClientRects().length && e.getBoundingClientRect().right > width + 1;
        if (page.scrollWidth <= width) return [];
        return [...document.querySelectorAll("main *")].filter(e => out(e) && !scrolls(e.parentElement))
            .map(e => `${e.outerHTML.slice(0, 80)} to ${e.getBoundingClientRect().right}`).slice(0, 5);
    """
    found = browser.driver.execute_script(wide)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_mathematics_is_set_and_nothing_of_its_source_is_seen(browser, name):
    browser.open(name)
    formulas = text_of(name).count('<span class="math') + text_of(name).count('<div class="math')
    assert len(browser.all_of("mjx-container")) == formulas
    told = "return [...document.querySelectorAll('mjx-assistive-mml')].map(e => e.textContent)"
    assert not [text for text in browser.driver.execute_script(told) if "\\" in text]


@pages
@pytest.mark.parametrize(
    ("scheme", "size", "rules"),
    [
        ("light", DESK, None),
        # what colours and width can change
        ("dark", DESK, ["color-contrast"]),
        ("light", PHONE, ["scrollable-region-focusable"]),
    ],
    ids=["light", "dark", "phone"],
)
def test_contrast_alternative_texts_and_roles(browser, name, scheme, size, rules):
    """All that axe-core looks for, with every disclosure open."""
    browser.open(name, size, scheme)
    assert browser.driver.execute_script("return document.documentElement.dataset.theme") == scheme
    browser.driver.execute_script(
        # colours on their way are nobody's
        "const still = '* { animation: none !important; transition: none !important }';"
        "document.head.append(Object.assign(document.createElement('style'), {textContent: still}));"
        "document.querySelectorAll('details').forEach(d => d.open = true)"
    )
    browser.driver.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.call(
        "const r = await axe.run(document, {...args[0], resultTypes: ['violations']});"
        "return r.violations.map(v => [v.id, v.nodes.length, ...v.nodes.slice(0, 4).map(n => n.html.slice(0, 160)"
        "  + ' ' + n.failureSummary.slice(0, 300))]);",
        {"runOnly": rules} if rules else {},
    )
    assert not found, json.dumps(found, indent=1)


def test_the_search_finds_layer_scale_by_keyboard_alone(browser):
    browser.open("index.html")
    browser.press(Keys.TAB)
    assert browser.focused().get_attribute("textContent") == "Skip to main content"
    for _ in range(6):
        browser.press(Keys.TAB)
        if "search-button" in browser.focused().get_attribute("class"):
            break
    browser.press(Keys.ENTER)
    wait_for("the search field", lambda: browser.focused().get_attribute("name") == "q")
    browser.press("LayerScale", Keys.ENTER)
    found = wait_for("results", lambda: [a.text for a in browser.all_of("ul.search li > a")])
    assert "05 · LayerScale and DropPath" in found
    assert any("LayerScale" in title for title in found[:3])


def test_a_search_quotes_a_pages_text_and_not_its_menus(browser):
    browser.open("search.html?q=flash+attention")

    def quotes() -> list[str]:
        return [p.text for p in browser.all_of("ul.search p.context")]

    # they come one after the other
    wait_for("a quote of the words", lambda: any("flash" in text for text in quotes()))
    assert not [text for text in quotes() if "System Settings" in text]


def test_a_picture_that_a_phone_makes_smaller_opens_at_its_size(browser):
    browser.open("notebooks/03_attention.html", (390, 844))
    first = wait_for("links", lambda: browser.all_of(".cell_output a.larger"))[0]
    picture = first.find_element(By.TAG_NAME, "img")
    assert first.get_attribute("href") == picture.get_attribute("src")
    assert int(picture.get_property("naturalWidth")) > picture.size["width"]


def test_an_answer_opens_by_keyboard_and_is_closed_before(browser):
    browser.open("notebooks/06_block.html")
    answers = browser.all_of("details.below-input")
    assert answers
    outputs = [a.find_element(By.CSS_SELECTOR, ".cell_output") for a in answers]
    assert not any(output.is_displayed() for output in outputs)
    browser.driver.execute_script("document.querySelector('details.above-input summary').focus()")
    for _ in range(30):
        browser.press(Keys.TAB)
        if browser.focused().text == "Show what was measured":
            break
    assert browser.focused() == answers[0].find_element(By.TAG_NAME, "summary")
    outline = browser.focused().value_of_css_property("outline-style")
    assert outline != "none"  # the focus can be seen
    browser.press(Keys.ENTER)
    wait_for("the answer", outputs[0].is_displayed)


@pytest.fixture(scope="module")
def shipped() -> tuple[SigLIP, Tokenizer]:
    model, tokenizer = load_siglip(EMOJI64_WEIGHTS)
    return model.eval(), tokenizer


def press_and_wait(browser, section: str, controls: str) -> None:
    browser.open("try.html")
    button = wait_for("the button", lambda: browser.one(f"#{section} button:not([hidden])"))
    button.click()
    wait_for("the controls", browser.one(f"#{section} {controls}").is_displayed)


def found_names(browser) -> list[str]:
    return [item.text for item in browser.all_of("#try-search li p")]


def test_a_text_finds_an_apple_and_the_page_loads_only_what_was_asked_for(browser):
    browser.open("try.html")
    wait_for("the button", lambda: browser.one("#try-search button:not([hidden])"))
    before = [urlparse(url).path for url in browser.requests()]
    assert "/_static/try/files.json" in before
    assert not [path for path in before if path.endswith((".gz", "ort.mjs"))]
    press_and_wait(browser, "try-search", "input")
    wait_for("pictures", lambda: len(found_names(browser)) == 8)
    assert found_names(browser)[0].startswith("red apple ")
    assert browser.focused() == browser.one("#try-search input")
    browser.press(Keys.CONTROL, "a", Keys.NULL, "a bomb")
    wait_for("a bomb", lambda: any(name.startswith("bomb ") for name in found_names(browser)[:3]))
    picture = browser.all_of("#try-search .try-picture")[0]
    assert picture.get_attribute("aria-label").startswith("Drawing: ")
    loaded = {urlparse(url).path for url in browser.requests() if url.startswith(browser.address)}
    assert not [path for path in loaded if path.startswith("/_static/try/scene")]
    whole = sum(
        (SITE / path.lstrip("/")).stat().st_size for path in loaded if (SITE / path[1:]).is_file()
    )
    maps = sum(
        path.stat().st_size for path in (SITE / "_static/try").glob("*.gz") if path.name[0] in "ms"
    )
    assert whole + maps < MOST
    assert browser.complaints() == []


def test_the_button_says_how_much_it_loads(browser):
    browser.open("try.html")
    text = wait_for("the button", lambda: browser.one("#try-search button:not([hidden])").text)
    folder = SITE / "_static/try"
    names = ("runtime.gz", "model.gz", "tokenizer.gz", "vectors.gz", "sheet.gz", "ort.mjs")
    size = sum((folder / name).stat().st_size for name in names)
    assert text == f"Load the model ({size / 1e6:.1f} MB)"


def test_what_does_not_arrive_is_told_with_what_to_do(browser):
    browser.open("try.html")
    browser.driver.execute_cdp_cmd("Network.enable", {})
    browser.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*model.gz"]})
    try:
        button = wait_for("the button", lambda: browser.one("#try-search button:not([hidden])"))
        button.click()
        status = browser.one("#try-search [role=status]")
        wait_for("an error", lambda: "press the button again" in status.text)
        assert button.is_enabled()
    finally:
        browser.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    button.click()
    wait_for("the field", browser.one("#try-search input").is_displayed)


AWKWARD = (
    "", " ", "!?", "A  Red\tApple ", "naïve café", "ﬁve ﬂags", "①②③ ½", "ＦＵＬＬ ｗｉｄｔｈ", "ΑΣ ΣΑΣ",
    "İstanbul", "straße", "北京 烤鸭", "한국어", "한국어", "e\u0301clair", "a\u00a0b\u2003c\u3000d",
    "x\u200by\ufeffz", "\x1ca\x1db\x85c", "tab\tand\nline", "🍎 red 🍏🍎", "👩‍👩‍👧", "a" * 300,
    "supercalifragilisticexpialidocious", "▁under▁score", "</s> <pad> <unk>", "don't stop-me_now", "½ cup",
    "x²+y³", "ﷺ", "Ǆ ǆ", "zz" * 40,
    "a picture of a red apple, fruit, green, and many other words that go on and on", "~ ～ `", "•·…",
    "“quoted” ‘text’", "\u202eright\u202c", "i̇", "ŉ", "ﬀ", "K Å Ω", "ⅷ", "か\u3099", "\x00\x01 a", "\ufffd",
    "q\u0307\u0323", "𝔘𝔫𝔦",
)  # fmt: skip
TOKENS = """
    const {facts, load} = await import("/_static/try/loading.js");
    const {Tokenizer} = await import("/_static/try/tokenizer.js");
    const about = await facts(), {tokenizer} = await load({tokenizer: about.sizes.search.tokenizer}, () => {});
    const cutter = new Tokenizer(JSON.parse(new TextDecoder().decode(tokenizer)), about.context);
    return args[0].map(text => cutter.encode(text));
"""


def test_the_tokenizer_in_the_page_gives_what_the_librarys_gives(browser, shipped):
    emoji = load_emoji64()
    texts = [
        text
        for name, words in zip(emoji.names, emoji.keywords, strict=True)
        for text in captions(name, words)
    ]
    texts = [*AWKWARD, *emoji.symbols, *dict.fromkeys(texts)]
    assert len(texts) > 20_000
    browser.open("try.html")
    found = [
        ids for i in range(0, len(texts), 5000) for ids in browser.call(TOKENS, texts[i : i + 5000])
    ]
    wanted = shipped[1](texts).tolist()
    wrong = [(t, f, w) for t, f, w in zip(texts, found, wanted, strict=True) if f != w]
    assert wrong == []


def test_vectors_and_cosines_in_the_page_are_the_librarys(browser, shipped):
    emoji = load_emoji64()
    texts = ["a red apple", "a bird singing", "green book", *AWKWARD, *emoji.names[::40]]
    browser.open("try.html")
    found, hits = browser.call(
        """
        const {facts} = await import("/_static/try/loading.js");
        const {loadSearch} = await import("/_static/try/search.js");
        const about = await facts(), search = await loadSearch(about, () => {});
        const vectors = [], hits = [];
        for (const text of args[0]) {
            vectors.push([...await search.embed(text)]);
            hits.push(await search.find(text, about.names.length));
        }
        return [vectors, hits];
        """,
        texts,
    )
    wanted = embed_texts(*shipped, texts)
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-3, rtol=0)
    parts = split(emoji)
    places = torch.cat((parts.seen, parts.unseen))
    with torch.no_grad():
        from siglip_lib.siglip import embed_pictures

        cosines = wanted @ embed_pictures(shipped[0], emoji.pictures[places]).T
    for row, own in zip(hits, cosines, strict=True):
        in_order = torch.empty(len(places))
        in_order[[hit["place"] for hit in row]] = torch.tensor([hit["cosine"] for hit in row])
        torch.testing.assert_close(in_order, own, atol=1e-3, rtol=0)
    assert [hit["name"] for hit in hits[0][:1]] == ["red apple"]
    trained = set(parts.train.tolist())
    assert not trained & set(places.tolist())
    unseen = {emoji.names[i] for i in emoji.concept[parts.unseen]}
    assert {hit["name"] for hit in hits[0] if hit["unseen"]} == unseen


def test_maps_in_the_page_are_the_librarys(browser, shipped):
    emoji, tower = load_emoji64(), shipped[0].image
    seen = split(emoji).seen
    drawn = torch.Generator().manual_seed(0)
    pixels = make_scenes(
        emoji.pictures[seen], emoji.concept[seen], 400, size=64, generator=drawn
    ).pixels[:3]
    with torch.no_grad(), attention_maps(tower) as maps:
        tower.forward_head(tower.forward_features(pixels))
    *blocks, pooling = maps.values()
    browser.open("try.html")
    cases = [(0, 0, 0, 0), (1, 5, 3, 63), (2, 3, -1, 20), (2, 6, 1, 5), (0, 6, -1, 9)]
    found = browser.call(
        """
        const {facts} = await import("/_static/try/loading.js");
        const {loadMaps} = await import("/_static/try/maps.js");
        const {weightsOf} = await loadMaps(await facts(), () => {});
        return args[0].map(which => [...weightsOf(...which)]);
        """,
        cases,
    )
    for (scene, block, head, query), weights in zip(cases, found, strict=True):
        own = pooling[scene, :, 0] if block == 6 else blocks[block][scene, :, query]
        own = own.mean(0) if head < 0 else own[head]
        torch.testing.assert_close(torch.tensor(weights), own, atol=1e-4, rtol=0)


def test_clicks_and_arrow_keys_move_the_patch_that_looks(browser):
    press_and_wait(browser, "try-maps", "canvas")
    frame, canvas = browser.one(".try-frame"), browser.one(".try-frame canvas")
    caption = browser.one("#try-maps .try-controls > p")

    def after(do: Callable[[], object]) -> str:
        before = browser.driver.execute_script("return arguments[0].toDataURL()", canvas)
        do()
        wait_for(
            "another map",
            lambda: (
                browser.driver.execute_script("return arguments[0].toDataURL()", canvas) != before
            ),
        )
        return caption.text

    def click(row: float, column: float) -> None:
        x, y = (column / 8 - 0.5) * canvas.size["width"], (row / 8 - 0.5) * canvas.size["height"]
        webdriver.ActionChains(browser.driver).move_to_element_with_offset(
            frame, x, y
        ).click().perform()

    assert "row 5, column 5" in caption.text
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
    assert "row 2, column 7" in after(lambda: click(1.5, 6.5))
    assert "row 3, column 7" in after(lambda: browser.press(Keys.ARROW_DOWN))
    assert "row 3, column 6" in after(lambda: browser.press(Keys.ARROW_LEFT))
    scene, block, head = map(Select, browser.all_of("#try-maps select"))
    assert "row 3, column 6" in after(lambda: head.select_by_visible_text("head 2"))
    assert "row 3, column 6" in after(lambda: scene.select_by_index(1))
    assert "pooling head" in after(lambda: block.select_by_visible_text("pooling head"))
    assert not browser.one(".try-frame span").is_displayed()
    assert canvas.get_attribute("aria-label") == caption.text
    assert browser.complaints() == []
