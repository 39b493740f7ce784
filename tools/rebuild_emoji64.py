"""Rebuild emoji64.npz and emoji64.json from the npm packages that they come from, and compare with those stored here.

    python tools/rebuild_emoji64.py FOLDER

FOLDER, which must be empty or not there, gets the packages and the two files. Needed are npm (only ``npm pack`` is run:
no code of a package is), 34 MB of downloads, numpy, pillow, and ``pip install resvg-py==0.5.0``, which draws. It takes
a minute or two. The last lines say whether the files are the same; another version of resvg may draw edges a little
differently.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

STORED = Path(__file__).parent.parent / "siglip_lib/data"
SIZE = 64
VENDORS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji": "1.2.7",
    "emojione": "1.2.3",
    "fxemoji": "1.2.2",
}
NAMES = ("unicode-emoji-json", "0.9.0")
KEYWORDS = (("cldr-annotations-full", "48.2.0"), ("cldr-annotations-derived-full", "48.2.0"))
# people, faces, flags and symbols are left out
GROUPS = {"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"}


class Package:
    """The JSON files of one npm package."""

    def __init__(self, name: str, version: str, folder: Path):
        command = ["npm", "pack", "--silent", "--pack-destination", folder, f"{name}@{version}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
        self.file = folder / done.stdout.split()[-1]

    def read(self, path: str) -> dict:
        with tarfile.open(self.file) as archive:
            return json.load(archive.extractfile(f"package/{path}"))


class Icons:
    """The pictures of one designer, as SVG."""

    def __init__(self, package: Package):
        self.data = package.read("icons.json")
        self.by_code_points = package.read("chars.json")  # empty in some packages
        aliases = {name: alias["parent"] for name, alias in self.data.get("aliases", {}).items()}
        self.by_letters = {letters(name): parent for name, parent in aliases.items()}
        self.by_letters |= {letters(name): name for name in self.data["icons"]}

    def find(self, emoji: str, name: str) -> str | None:
        """Return the icon of an emoji: by its code points where the package has them, else by its name."""
        if not self.by_code_points:
            return self.by_letters.get(letters(name))
        for code_points in (
            emoji,
            emoji.replace("\ufe0f", ""),
        ):  # some leave out this mark of colour
            found = self.by_code_points.get("-".join(f"{ord(c):x}" for c in code_points))
            if found:
                return self.by_letters[letters(found)]
        return None

    def draw(self, icon: str) -> np.ndarray:
        """Return an icon as RGBA (SIZE, SIZE, 4); colour is 0 where alpha is 0."""
        # an icon's own box, else the package's
        box = {"left": 0, "top": 0} | self.data | self.data["icons"][icon]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box["left"]} {box["top"]} {box["width"]} {box["height"]}" '
            f'width="{SIZE}" height="{SIZE}">{box["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
        return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def letters(name: str) -> str:
    """What is left of a name without hyphens, spaces and apostrophes: some packages write them, some don't."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def concepts(folder: Path) -> list[dict]:
    """Return every emoji of the five groups, in Unicode's order, with its name and keywords."""
    table = Package(*NAMES, folder).read("data-by-emoji.json")
    plain, derived = (Package(*package, folder) for package in KEYWORDS)
    told = derived.read("annotationsDerived/en/annotations.json")["annotationsDerived"]
    told = (
        told["annotations"]
        | plain.read("annotations/en/annotations.json")["annotations"]["annotations"]
    )
    return [
        {
            "emoji": emoji,
            "name": entry["name"],
            "group": entry["group"],
            "keywords": (told.get(emoji) or told[emoji.replace("\ufe0f", "")])["default"],
        }
        for emoji, entry in table.items()
        if entry["group"] in GROUPS
    ]


def pictures(folder: Path, found: list[dict]) -> dict[str, np.ndarray]:
    """Draw what each designer has of the concepts."""
    sets = {
        name: Icons(Package(f"@iconify-json/{name}", version, folder))
        for name, version in VENDORS.items()
    }
    # the same designs by the same names
    sets["fluent-emoji"].by_code_points = sets["fluent-emoji-flat"].by_code_points
    images, concept, vendor = [], [], []
    for number, icons in enumerate(sets.values()):
        for i, entry in enumerate(found):
            icon = icons.find(entry["emoji"], entry["name"])
            if icon:
                images.append(icons.draw(icon))
                concept.append(i)
                vendor.append(number)
    return {
        "images": np.stack(images),
        "concept": np.array(concept, np.int16),
        "vendor": np.array(vendor, np.int8),
    }


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As ``np.savez_compressed`` does, and ``np.load`` reads, but a quarter smaller."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.save(stream, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), stream.getvalue(), zipfile.ZIP_LZMA)


def compare(folder: Path) -> None:
    """Print how near the files in ``folder`` come to those beside this script."""
    same = (folder / "emoji64.json").read_bytes() == (STORED / "emoji64.json").read_bytes()
    print(f"emoji64.json: {'the same bytes' if same else 'DIFFERS'}")
    with np.load(folder / "emoji64.npz") as new, np.load(STORED / "emoji64.npz") as old:
        for name in old.files:
            ours, theirs = new[name], old[name]
            if ours.shape != theirs.shape:
                verdict = f"DIFFERS, {ours.shape} and {theirs.shape}"
            elif (ours != theirs).any():
                verdict = f"DIFFERS in {(ours != theirs).mean():.3%} of its values"
            else:
                verdict = "the same values"
            print(f"emoji64.npz, {name}: {verdict}")


def main() -> None:
    """Rebuild into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    found = concepts(folder)
    table = json.dumps({"vendors": list(VENDORS), "concepts": found}, ensure_ascii=False, indent=0)
    (folder / "emoji64.json").write_text(table, encoding="utf-8")
    save(folder / "emoji64.npz", pictures(folder, found))
    compare(folder)


if __name__ == "__main__":
    main()
