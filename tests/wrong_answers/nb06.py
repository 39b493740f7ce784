"""Wrong answers to notebook 06's exercises, each with a piece of what the check must say."""

_KEPT = """
def kept(module, x):
    learnt = {{p.untyped_storage().data_ptr() for p in module.parameters()}}
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        output = module(x)
    others = [t for t in found if t.untyped_storage().data_ptr() not in learnt]
    once = {{t.untyped_storage().data_ptr(): t for t in {count}}}
    return {answer}
"""


def _kept(
    count: str = "others", answer: str = "sum(t.untyped_storage().nbytes() for t in once.values())"
) -> str:
    return _KEPT.format(count=count, answer=answer)


_PARALLEL = """
def parallel(block, x):
    attended = block.ls1(block.attn(block.norm1(x)))
    return x + {}(attended) + {}(block.ls2(block.mlp(block.norm2(x))))
"""

WRONG = {
    "06.1": {
        _kept(count="found"): "parameters are counted",
        _kept(answer="sum(t.untyped_storage().nbytes() // 4 for t in once.values())"): "4 bytes",
        _kept(answer="sum(t.untyped_storage().nbytes() for t in others)"): "counted twice",
        _kept(answer="sum(t.nbytes for t in others)"): "counted",
        _kept(answer="sum(t.nbytes for t in once.values())"): "a view is",
        _kept(answer="0"): "the input is kept too",
        _kept(answer="output.nbytes"): "what the outputs take",
        _kept(answer="str(output.nbytes)"): "must be a number",
        _kept(answer="1"): "are kept",
    },
    "06.2": {
        "def parallel(block, x): return block(x)": "ordinary block",
        """
def parallel(block, x):
    return x + block.attn(block.norm1(x)) + block.mlp(block.norm2(x))
""": "LayerScales",
        """
def parallel(block, x):
    a = x + block.ls1(block.attn(block.norm1(x)))
    return a + x + block.ls2(block.mlp(block.norm2(x)))
""": "twice",
        """
def parallel(block, x):
    return block.ls1(block.attn(block.norm1(x))) + block.ls2(block.mlp(block.norm2(x)))
""": "x itself is missing",
        """
def parallel(block, x):
    n = block.norm1(x)
    return x + block.ls1(block.attn(n)) + block.ls2(block.mlp(n))
""": "its own norm",
        _PARALLEL.format("", ""): "drop_path1 and drop_path2 are missing",
        _PARALLEL.format("block.drop_path1", ""): "drop_path2, is missing",
        _PARALLEL.format("", "block.drop_path2"): "drop_path1, is missing",
        _PARALLEL.format("block.drop_path2", "block.drop_path1"): "are exchanged",
        _PARALLEL.format("block.drop_path1", "block.drop_path1"): "by its own DropPath",
        """
def parallel(block, x):
    a, m = block.ls1(block.attn(block.norm1(x))), block.ls2(block.mlp(block.norm2(x)))
    x += a + m
    return x
""": "changed its input",
    },
    "06.3": {
        "def idle(dim): return 0, dim": "another amount for every key",
        "def idle(dim): return 2 * dim, 3 * dim": "weights sum to 1",
        "def idle(dim): return dim, 2 * dim - 1": "after the last",
        "def idle(dim): return 96, 192": "right for a width of 96",
        "def idle(dim): return dim": "must be a pair",
    },
}
