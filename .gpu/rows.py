import sys; sys.path.insert(0,"tools")
import nbformat, store_outputs as s, teaching_times
from pathlib import Path
for p in sorted(Path("notebooks").glob("*.ipynb")):
    s.write_row(p.name, nbformat.read(p,4).metadata["measured"])
teaching_times.main()
