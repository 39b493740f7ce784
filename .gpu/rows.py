import sys; sys.path.insert(0,"tools")
import nbformat, store_outputs as s, teaching_times
from pathlib import Path
for p in sorted(Path("notebooks").glob("*.ipynb")):
    nb=nbformat.read(p,4); s.write_head(nb); nbformat.write(nb,p); s.write_row(p.name, nb.metadata["measured"])
teaching_times.main()
