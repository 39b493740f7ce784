"""Execute one notebook; keep what was executed and its figures; put the figures (and at full the outputs) back."""
import sys, os
kept, path = sys.argv[1:3]
sys.path.insert(0, "tools")
from pathlib import Path
import nbformat, json, store_outputs as s
size = os.environ.get("SIGLIP_SIZE", "full")
nb, figures = s.execute(Path(path))
stored = nbformat.read(path, 4)
nb.metadata["measured"] = {**stored.metadata.get("measured", {}), size: figures}
stored.metadata["measured"] = nb.metadata["measured"]
nbformat.write(nb, kept)
nbformat.write(nb if size == "full" else stored, path)
print(path, size, figures)
