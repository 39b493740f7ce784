import json,re,sys,configparser
sys.path.insert(0,"/work/main")
cfg=configparser.RawConfigParser(); cfg.read("/work/main/tests/nbval_sanitize.cfg")
rules=[(cfg.get(x,"regex"),cfg.get(x,"replace")) for x in cfg.sections()]
def text(o):
    t=o.get("text") or o.get("data",{}).get("text/plain","") if o["output_type"]!="error" else "ERROR "+o["ename"]+o["evalue"]
    t="".join(t)
    for a,b in rules: t=re.sub(a,b,t)
    return t
def outs(c):
    d={}
    for o in c.get("outputs",[]):
        k=o.get("name",o["output_type"])
        if k=="stderr": continue
        d[k]=d.get(k,"")+text(o)
    return d
a,b=(json.load(open(f)) for f in sys.argv[1:3]); n=0
for i,(x,y) in enumerate(zip(a["cells"],b["cells"])):
    if x["cell_type"]!="code": continue
    tags=x["metadata"].get("tags",[])
    if any(o["output_type"]=="error" for o in y.get("outputs",[])) : print(i,x["id"],"ERROR")
    if "nbval-ignore-output" in tags: continue
    n+=1
    if outs(x)!=outs(y): print(i,x["id"],"DIFF\n<",outs(x),"\n>",outs(y))
print(sys.argv[1][-25:],n,"cells compared")
