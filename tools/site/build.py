"""Build the website into build/site from the stored outputs: no notebook is run and nothing is fetched.

``make site`` installs what it needs, Sphinx and what ``npm ci`` puts into tools/site/node_modules, and calls it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import reference
import series
from demo import lay_out_demo
from sphinx.cmd.build import main as sphinx
from stills import STILLS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
MODULES = HERE / "node_modules"


def main() -> int:
    if not MODULES.is_dir():
        raise SystemExit(
            "tools/site/node_modules is missing; make site calls npm ci, which fills it"
        )
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for folder in (SOURCE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    (SOURCE / "static").mkdir(parents=True)
    lay_out_notebooks(paths)
    lay_out_pages(paths)
    lay_out_mathjax()
    lay_out_demo(SOURCE / "static/try", MODULES)
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--fresh-env", "--jobs=auto"]
    doctrees = str(ROOT / "build" / "site-doctrees")
    failed = sphinx([*options, "-c", str(HERE), "-d", doctrees, str(SOURCE), str(SITE)])
    for template in (SITE / "_static").glob("*.html"):  # the themes leave them there
        template.unlink()
    return failed


def lay_out_notebooks(paths: list[Path]) -> None:
    names, texts = reference.public_names(), {}
    (SOURCE / "notebooks").mkdir()
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        texts |= series.alternative_texts(notebook)
        nbformat.write(series.prepare(notebook, STILLS, names), SOURCE / "notebooks" / path.name)
    (SOURCE / "alternative_texts.json").write_text(json.dumps(texts), encoding="utf-8")
    shutil.copy(ROOT / "notebooks/open-in-colab.svg", SOURCE / "notebooks")


def lay_out_pages(paths: list[Path]) -> None:
    """The start page with the parts, the reference, and what is written by hand."""
    parts, menus = "", ""
    for part, some in series.in_parts(paths):
        parts += f"## {part.title}\n\n{part.about}\n\n"
        menus += f"\n```{{toctree}}\n:caption: {part.title}\n:hidden:\n\n"
        for path in some:
            title, claim = series.title_and_claim(nbformat.read(path, as_version=4))
            parts += f"[{title}](notebooks/{path.name})\n: {claim}\n\n"
            menus += f"notebooks/{path.stem}\n"
        menus += "```\n"
    index = (HERE / "index.md").read_text(encoding="utf-8")
    index = index.replace("PARTS\n", parts).replace("MENUS\n", menus)
    wings = "".join(f"reference/{wing}\n" for wing in (*reference.WINGS, "kernels"))
    index = index.replace("WINGS\n", wings)
    (SOURCE / "index.md").write_text(index, encoding="utf-8")
    shutil.copy(HERE / "try.md", SOURCE)
    (SOURCE / "teaching.md").write_text(teaching(), encoding="utf-8")
    (SOURCE / "credits.md").write_text(credits(), encoding="utf-8")
    shutil.copy(ROOT / ".github/attention.jpg", SOURCE)
    (SOURCE / "reference").mkdir()
    for name, text in reference.pages().items():
        (SOURCE / "reference" / name).write_text(text, encoding="utf-8")


def teaching() -> str:
    """The teacher's guide, whose links to notebooks lead to their pages; those to other files become text."""
    text = (HERE / "teaching.md").read_text(encoding="utf-8")
    text = text.replace("](../../notebooks/", "](notebooks/")
    return re.sub(r"\[([^\]]*)\]\(\.\./\.\./[^)]*\)", r"\1", text)


def credits() -> str:
    """Who made the pictures, and under which licences: what lies beside them in the library, one below the other."""
    text = (HERE / "credits.md").read_text(encoding="utf-8")
    for folder in ("data", "classroom/pictures"):
        found = (ROOT / "siglip_lib" / folder / "CREDITS.md").read_text(encoding="utf-8")
        text += "\n" + re.sub("^#", "##", found, flags=re.MULTILINE)
    return text


def lay_out_mathjax() -> None:
    """MathJax with its fonts and an extension, in the folder from which it loads them."""
    mathjax, kept = MODULES / "mathjax/es5", SOURCE / "static/mathjax"
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(mathjax / fonts, kept / fonts)
    for script in ("tex-chtml.js", "input/tex/extensions/textmacros.js"):
        (kept / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(mathjax / script, kept / script)


if __name__ == "__main__":
    sys.exit(main())
