"""Sphinx's settings. What it reads is laid out by build.py in build/site-source."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "build" / "site-source"

project = "SigLIP notebooks"
html_title = project
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["static"]

nb_execution_mode = "off"  # the stored outputs are shown
nb_ipywidgets_js = {}  # which would come from elsewhere; widgets are shown as stills
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shapes", "notes_style"), ("Source", "notes_style")]

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_content_items": ["licences"],
}
html_context = {"default_mode": "auto"}
html_favicon = "static/favicon.svg"
html_sidebars = {"**": ["home", "search-button-field", "sbt-sidebar-nav"]}
html_static_path = ["static", str(SOURCE / "static")]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_copy_source = False
templates_path = ["templates"]
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {
    "loader": {"load": ["[tex]/textmacros"]},
    "tex": {"packages": {"[+]": ["textmacros"]}},  # for names such as \text{fan\_in}
    "options": {"enableMenu": False},  # a menu would load what isn't here
}


def alternative_texts(app, doctree) -> None:
    """Give stored pictures, which MyST-NB names by their digest, the texts that the notebooks hold for them."""
    texts = json.loads((SOURCE / "alternative_texts.json").read_text(encoding="utf-8"))
    for image in doctree.findall(lambda node: node.tagname == "image"):
        if text := texts.get(Path(image["uri"]).stem):
            image["alt"] = text


def accessible(app, pagename, templatename, context, doctree) -> None:
    """Mend what keeps a screen reader from a page's words."""
    if body := context.get("body"):
        # MyST-NB labels what it closes "Toggle hidden content"; its own words say more
        body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
        body = body.replace('<th class="head"><p></p></th>', "<td></td>")  # it heads nothing
        # a signature in lines is a list of descriptions without terms
        context["body"] = re.sub(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>", _parameters, body)


def _parameters(match: re.Match) -> str:
    lines = match[1].replace("<dd>", "<span>").replace("</dd>", "</span>")
    return f'<span class="parameters">{lines}</span>'


def leave_out(app, what, name, member, skip, options) -> bool | None:
    """A named tuple's fields describe themselves in no other words than these."""
    return True if (member.__doc__ or "").startswith("Alias for field number") else None


def setup(app) -> None:
    app.connect("autodoc-skip-member", leave_out)
    app.connect("doctree-read", alternative_texts)
    app.connect("html-page-context", accessible)
