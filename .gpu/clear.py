import json,sys,glob
for n in sys.argv[1:]:
    for p in glob.glob(f"notebooks/{n}*.ipynb"):
        nb=json.load(open(p))
        for c in nb["cells"]:
            if c["cell_type"]=="code": c["outputs"]=[]; c["execution_count"]=None
        json.dump(nb,open(p,"w"),indent=1,ensure_ascii=False); open(p,"a").write("\n")
