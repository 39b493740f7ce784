"""Write where this repository stands on GitHub, by ``git remote get-url origin``, into the notebooks and the README.

A notebook gets a badge that opens it on Colab, and its first cell, where the library is missing, installs it from there
instead of saying so; the README's table gets a column of links. Another address takes the place of one written before.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
GITHUB = re.compile(
    r"(?:https://(?:[^@/]*@)?github\.com/|(?:ssh://)?git@github\.com[:/])"
    r"([A-Za-z0-9-]+/[A-Za-z0-9_-][\w.-]*?)(?:\.git)?/?",
    re.ASCII,
)
COLAB = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}"
BADGE = "[![Open in Colab](open-in-colab.svg)]({colab})"
INSTALL = '%pip install --quiet "siglip-notebooks[lab] @ git+https://github.com/{repository}"'


def origin(root: Path) -> str:
    """The owner/name on GitHub that a checkout's origin has.

    Raises:
        ValueError: if it has none.
    """
    command = ["git", f"--git-dir={root / '.git'}", "remote", "get-url", "origin"]
    found = subprocess.run(command, capture_output=True, encoding="utf-8")
    address = found.stdout.strip()
    if match := GITHUB.fullmatch(address):
        return match[1]
    address = re.sub("//[^/]*@", "//", address) or "none"  # without a password
    raise ValueError(
        f"the remote origin is {address}, and links are to a repository on GitHub; name yours:"
        f" git remote {'set-url' if found.stdout else 'add'} origin https://github.com/OWNER/NAME"
    )


def linked_notebook(notebook: nbformat.NotebookNode, repository: str, name: str) -> None:
    """Put badge and installation into a notebook, whose file has this name.

    Raises:
        ValueError: if its second cell does not look for the library.
    """
    head, first = notebook.cells[:2]
    if 'find_spec("siglip_lib")' not in first.source:
        raise ValueError(f"the second cell of {name} must look for siglip_lib, as the others' do")
    title, text = head.source.split("\n\n", 1)
    text = re.sub(r"^\[!\[Open in Colab\].*\n\n", "", text)
    badge = BADGE.format(colab=COLAB.format(repository=repository, name=name))
    head.source = f"{title}\n\n{badge}\n\n{text}"
    condition, _ = first.source.rsplit("\n", 1)
    first.source = f"{condition}\n    {INSTALL.format(repository=repository)}"


def linked_readme(text: str, repository: str) -> str:
    """The README with a column of links, the last one, in the table of notebooks."""
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if line.startswith("| notebook | claim |"):
            lines[index] = line.removesuffix(" on Colab |") + " on Colab |"
            lines[index + 1] = "|" + "---|" * (lines[index].count("|") - 1)
        elif row := re.match(r"\| \[.*?\]\(notebooks/(\w+\.ipynb)\) \|", line):
            colab = COLAB.format(repository=repository, name=row[1])
            lines[index] = re.sub(r" \[open\]\(.*?\) \|$", "", line) + f" [open]({colab}) |"
    return "\n".join(lines)


def write_links(root: Path) -> str:
    """Write the links into a checkout; return the owner/name that they lead to."""
    repository = origin(root)
    readme = root / "README.md"
    texts = {readme: linked_readme(readme.read_text(encoding="utf-8"), repository)}
    for path in root.glob("notebooks/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        linked_notebook(notebook, repository, path.name)
        texts[path] = nbformat.writes(notebook) + "\n"
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return repository


if __name__ == "__main__":
    try:
        print(f"links: to https://github.com/{write_links(ROOT)}")
    except ValueError as error:
        sys.exit(f"links: {error}")
