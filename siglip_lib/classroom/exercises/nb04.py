"""Checks of notebook 04, timing attention."""

import math
import operator

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, near


@exercise("04.1")
def useful(answer) -> str | None:
    found = answered(answer(729, 72, 64, 96))
    keys, channels = 729 / 768, 72 / 96
    both = keys * channels
    mistakes = {
        "only the keys are padded there; 72 channels are padded to 96 too": keys,
        "only the channels are padded there; 729 keys fill 12 blocks of 64 too": channels,
        "that is computed over useful; the useful share is at most 1": 1 / both,
        "that is the wasted share; the rest is useful": 1 - both,
        "a part of a block costs a whole block, so round up": 729 / 704 * channels,
        "the shares of keys and channels multiply; that is their mean": (keys + channels) / 2,
        "queries are not padded here, only keys and channels are": keys * both,
    }
    if reason := first_match(found, mistakes, near(1e-6)):
        return reason
    for case in ((729, 72, 64, 96), (729, 72, 32, 16), (256, 64, 64, 64), (100, 80, 128, 128)):
        tokens, head_dim, block, width = case
        right = tokens / (-(-tokens // block) * block) * head_dim / (-(-head_dim // width) * width)
        found = answer(*case)
        if found > 1 + 1e-9:
            return f"useful{case} is {found:.4f}, more than 1: a part of a block costs a whole block, so round up"
        if not math.isclose(found, right, rel_tol=1e-6):
            return f"useful{case} is {found:.4f}; counting multiplications gives {right:.4f}"
    return None


@exercise("04.2")
def longest(answer) -> str | None:
    right = math.isqrt(10**9 // (4 * 8 * 16))
    found = answered(answer(10**9, 8, 16))
    # by reason what the memory was divided by, then the number of tokens
    divisors = {
        "there are two tensors, P and its gradient, of 2 bytes a number": 2 * 8 * 16,
        "a bfloat16 number takes 2 bytes, and there are two tensors": 8 * 16,
        "each sample of the batch has its own P": 4 * 16,
        "each head has its own P": 4 * 8,
        "a bfloat16 number takes 2 bytes, not 4": 8 * 8 * 16,
    }
    mistakes = {reason: math.isqrt(10**9 // divisor) for reason, divisor in divisors.items()}
    mistakes["P has N * N numbers a head; take the square root"] = 10**9 // (4 * 8 * 16)
    mistakes["that does not fit any more; round down"] = right + 1
    if found != right and (reason := first_match(math.floor(found), mistakes, operator.eq)):
        return reason
    for memory, batch, heads in ((10**9, 8, 16), (4 * 729**2 * 64 * 16, 64, 16), (10**12, 1, 1)):
        found, right = answer(memory, batch, heads), math.isqrt(memory // (4 * batch * heads))
        if found != right:
            whole = "" if found == int(found) else ", and a number of tokens is whole"
            return f"longest({memory}, {batch}, {heads}) is {found}; {right} tokens are the most that fit{whole}"
    return None


@exercise("04.3")
def whole(answer) -> str | None:
    found = answered(answer(0.1, 2.0))
    mistakes = {
        "only a tenth of the time becomes shorter, the rest stays": 2.0,
        "that is the new time; how many times faster is its inverse": 0.95,
        "that adds the saved time to 1; divide the old time by the new one": 1.05,
        "the part does not vanish; it still takes share / faster": 1 / 0.9,
        "share times faster is no speed; add up the new time first": 0.2,
        "the part takes share / faster, not share * faster": 1 / 1.1,
    }
    if reason := first_match(found, mistakes, near(1e-6)):
        return reason
    for share, faster in ((0.1, 2.0), (0.5, 4.0), (1.0, 3.0), (0.0, 7.0)):
        found, right = answer(share, faster), 1 / (1 - share + share / faster)
        if not math.isclose(found, right, rel_tol=1e-6):
            return f"whole({share}, {faster}) is {found:.4f}; the old time over the new one is {right:.4f}"
    return None
