"""Checks of notebook 00, check your machine."""

import operator

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import Clock, first_match, near, number


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
    names = "pictures", "tokens", "q, k, v", "heads", "channels"
    for name, found, wanted in zip(names, shape, right, strict=True):
        if found != wanted:
            return f"the axis of {name} has {wanted} entries, not {found}"
    return None


@exercise("00.2")
def weight_bytes(answer) -> str | None:
    if (found := number(answer)) is None:
        return f"weight_bytes is {answer!r}; it must be a number"
    weights = 64 * 16 * 729 * 729
    right = 2 * weights
    mistakes = {
        "that is how many weights there are; each takes two bytes": weights,
        "that is float32; a bfloat16 number takes two bytes": 4 * weights,
        "bfloat16 has 16 bits; that is two bytes": 16 * weights,
        "every one of the 16 heads has its own weights": right // 16,
        "every one of the 64 pictures has its own weights": right // 64,
        "there is a weight for every pair of tokens: 729 * 729 of them": right // 729,
        "a pair of tokens has one weight in a head; its 72 channels were summed up": right * 72,
        "that is for all 27 layers; the question is about one": right * 27,
    }
    if reason := first_match(found, mistakes, operator.eq):
        return reason
    if found != right:
        return f"{found:,} bytes is {found / right:.3g} times the right number"
    return None


@exercise("00.3")
def gigabytes_per_second(answer) -> str | None:
    moved, ms = 3 * 10**8, 10
    with Clock() as clock:
        # the first call is slow, as one that compiles
        fn = clock.function(lambda call: ms if call else 40 * ms)
        returned = answered(answer(fn, moved))
    if (found := number(returned)) is None:
        return f"gigabytes_per_second returns {returned!r}; it must return a number"
    right = moved / ms / 1e6
    # a GPU's clock is the real one, in which some calls take a little longer
    timed = [ms / 1e3] if clock.was_read else clock.seconds[0][1:] or [ms / 1e3]
    if moved / max(timed) * 0.98 <= found * 1e9 <= moved / min(timed) * 1.02:
        return None
    if near(0.02)(found, right * 1e9 / 2**30):
        return f"{found:.3g} is the rate in GiB/s; a GB is 10**9 bytes, not 2**30"
    mistakes = {
        "a millisecond is a thousandth of a second: moved / milliseconds / 1e6": right / 1e3,
        "that is bytes in a second; a GB is 10**9 bytes": right * 1e9,
        "that is bytes in a millisecond": right * 1e6,
        "that is seconds; divide the bytes by the time": ms / 1e3,
    }
    if reason := first_match(found, mistakes, near(0.4)):
        return reason
    case = (
        f"{found:.3g} GB/s where a call takes {ms} ms for 3 * 10**8 bytes: that is {right:g} GB/s"
    )
    if found < right:
        return f"{case}, but for the first call, which takes longer and must not count"
    return case
