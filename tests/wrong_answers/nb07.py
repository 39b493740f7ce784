"""Wrong answers to notebook 07's exercises, each with a piece of what the check must say."""

WRONG = {
    "07.1": {
        """
def count(height, width, patch, pad):
    tokens = height * width // patch**2
    return tokens, height * width - tokens * patch**2
""": "divide each side by itself",
        """
def count(height, width, patch, pad):
    rows, columns = round(height / patch + 0.49), round(width / patch + 0.49)
    return rows * columns, 0
""": "only whole patches",
        """
def count(height, width, patch, pad):
    rows, columns = height // patch, width // patch
    return rows * columns, height * width - rows * columns * patch**2
""": "incomplete patches become tokens too",
        """
def count(height, width, patch, pad):
    rows, columns = height // patch, width // patch
    if pad:
        return (rows + 1) * (columns + 1), 0
    return rows * columns, height * width - rows * columns * patch**2
""": "needs no padding",
        """
def count(height, width, patch, pad):
    rows, columns = height // patch, width // patch
    unseen = height * width - rows * columns * patch**2
    if pad:
        rows, columns = -(-height // patch), -(-width // patch)
    return rows * columns, unseen
""": "every pixel",
        """
def count(height, width, patch, pad):
    return (height // patch) * (width // patch), (height % patch) * (width % patch)
""": "corner where the two strips cross",
        """
def count(height, width, patch, pad):
    unseen = (height % patch) * width + (width % patch) * height
    return (height // patch) * (width // patch), unseen
""": "counted twice",
        """
def count(height, width, patch, pad):
    rows, columns = height // patch, width // patch
    return rows * columns, 3 * (height * width - rows * columns * patch**2)
""": "not colour values",
        "def count(height, width, patch, pad): return (height // patch) ** 2": "must be a pair",
        """
def count(height, width, patch, pad):
    side, up = height // patch, -(-height // patch)
    return (up**2, 0) if pad else (side**2, height**2 - side**2 * patch**2)
""": "number of tokens is wrong",
    },
    "07.2": {
        """
def to_convolution(weight):
    p = round((weight.shape[1] / 3) ** 0.5)
    return weight.reshape(-1, 3, p, p)
""": "colour last",
        """
def to_convolution(weight):
    p = round((weight.shape[1] / 3) ** 0.5)
    return weight.unflatten(1, (p, p, 3)).transpose(1, 3)
""": "rows and columns",
        """
def to_convolution(weight):
    return weight.unflatten(1, (14, 14, 3)).permute(0, 3, 1, 2)
""": "raised",
        """
def to_convolution(weight):
    p = round((weight.shape[1] / 3) ** 0.5)
    return weight.unflatten(1, (p, p, 3))
""": "must be (5, 3, 4, 4)",
        """
def to_convolution(weight):
    p = round((weight.shape[1] / 3) ** 0.5)
    return weight.unflatten(1, (p, 3, p)).permute(0, 2, 1, 3)
""": "order wrong",
    },
    "07.3": {
        """
def enlarge(weight, q):
    return F.interpolate(weight, size=(q, q), mode="bilinear")
""": "interpolated weights",
        """
def enlarge(weight, q):
    scale = (weight.shape[-1] / q) ** 2
    return scale * F.interpolate(weight, size=(q, q), mode="bilinear")
""": "right size, but not the same",
        """
def enlarge(weight, q):
    p = weight.shape[-1]
    onehot = torch.eye(q * q, dtype=weight.dtype).reshape(q * q, 1, q, q)
    B = F.interpolate(onehot, size=(p, p), mode="bilinear").flatten(1).T
    return (weight.flatten(2) @ B).unflatten(2, (q, q))
""": "off by",
        """
def enlarge(weight, q):
    return weight
""": "the result must be",
    },
    "07.4": {
        """
def times_as_long(slow, fast):
    slow, fast = (measure(call, device, repeats=1, warmup=0).median_ms for call in (slow, fast))
    return slow / fast
""": "the first call takes longer",
        """
def times_as_long(slow, fast):
    slow, fast = (measure(call, device, repeats=20).median_ms for call in (slow, fast))
    return fast / slow
""": "divide the other way",
        """
def times_as_long(slow, fast):
    import time
    means = []
    for call in (slow, fast):
        start = time.perf_counter()
        for _ in range(20):
            call()
        means.append(time.perf_counter() - start)
    return means[0] / means[1]
""": "take the median",
        """
def times_as_long(slow, fast):
    slow, fast = (measure(call, device, repeats=20).median_ms for call in (slow, fast))
    return slow - fast
""": "the ratio is 0.5",
        "def times_as_long(slow, fast): return slow() or fast() or 'a'": "must return a number",
    },
}
