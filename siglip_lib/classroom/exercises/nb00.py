"""Checks of notebook 00, check your machine."""

from siglip_lib.classroom.exercises import exercise

_WEIGHTS = 64 * 16 * 729 * 729


@exercise("00.1")
def packed_shape(answer) -> str | None:
    if not isinstance(answer, (tuple, list)):
        return f"shape is {answer!r}; it must be a tuple of five numbers"
    shape, right = tuple(answer), (2, 729, 3, 16, 72)
    if shape == (2, 729, 3456):
        return "that is what the linear layer returns; split its 3456 channels into 3, heads and head_dim"
    if len(shape) != 5:
        return (
            f"the shape has five axes, not {len(shape)}: pictures, tokens, q k v, heads, channels"
        )
    if shape == (2, 729, 3, 72, 16):
        return "there are 16 heads of 72 channels, not 72 heads of 16"
    if shape == (2, 729, 3, 16, 1152):
        return "1152 are the channels of all 16 heads together; one head has 72"
    if sorted(shape) == sorted(right) and shape != right:
        return "the numbers are right, the order is not: pictures, tokens, q k v, heads, channels"
    for name, found, wanted in zip(
        ("pictures", "tokens", "q, k, v", "heads", "channels"), shape, right, strict=True
    ):
        if found != wanted:
            return f"the axis of {name} has {wanted} entries, not {found}"
    return None


@exercise("00.2")
def weight_bytes(answer) -> str | None:
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return f"weight_bytes is {answer!r}; it must be a number"
    mistakes = {
        _WEIGHTS: "that is how many weights there are; each takes two bytes",
        4 * _WEIGHTS: "that is float32; a bfloat16 number takes two bytes",
        16 * _WEIGHTS: "bfloat16 has 16 bits; that is two bytes",
        2 * _WEIGHTS // 16: "every one of the 16 heads has its own weights",
        2 * _WEIGHTS // 64: "every one of the 64 pictures has its own weights",
        2 * _WEIGHTS // 729: "there is a weight for every pair of tokens: 729 * 729 of them",
        2
        * _WEIGHTS
        * 72: "a pair of tokens has one weight in a head; its 72 channels were summed up",
        2 * _WEIGHTS * 27: "that is for all 27 layers; the question is about one",
    }
    if answer in mistakes:
        return mistakes[answer]
    if answer != 2 * _WEIGHTS:
        return f"{answer:,} bytes is {answer / (2 * _WEIGHTS):.3g} times the right number"
    return None
