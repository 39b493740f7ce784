"""Checks of notebook 12, first kernels. They launch the reader's kernels, and give known times to his stopwatch.

Every tensor is the beginning of a larger memory, so that a kernel that leaves its tensor is seen and breaks nothing.
"""

import ast
from collections.abc import Callable

import torch

from siglip_lib.classroom.exercises import Unanswered, answered, exercise
from siglip_lib.classroom.exercises.helpers import Clock, first_match, has_no_code, source_tree

_MEMORY = 4096  # elements behind each pointer
_GUARD = 7.0  # what stands there beyond the tensor


@exercise("12.1")
def average_kernel(answer) -> str | None:
    if problem := _not_a_kernel(answer):
        return problem
    for decay, size, block in ((0.75, 1000, 128), (0.5, 77, 128), (0.5, 700, 256)):
        if problem := _wrong_average(answer, decay, size, block):
            return problem
    return None


def _wrong_average(kernel, decay: float, size: int, block: int) -> str | None:
    generator = torch.Generator().manual_seed(size)
    before, weight = torch.randn(2, size, generator=generator)
    average_memory, weight_memory = _memory(before), _memory(weight)
    weight_memory[size:] = 0  # or an average of what stands beyond both ends would change nothing
    kernel[(-(-size // block),)](average_memory, weight_memory, size, decay, BLOCK=block)
    found, beyond = average_memory.cpu()[:size], average_memory.cpu()[size:]
    right = decay * before + (1 - decay) * weight
    exchanged = decay * weight + (1 - decay) * before
    if not torch.equal(weight_memory.cpu()[:size], weight):
        return "the weights changed; store where average_ptr points"
    if torch.equal(found, before) and (beyond == _GUARD).all():
        return "no average changed; store the result where average_ptr points"
    if not (beyond == _GUARD).all():
        return "numbers beyond the end were overwritten: mask the store with place < size"
    mistakes = {
        "decay belongs to the old average, 1 - decay to the weight": exchanged,
        "the old average must be multiplied by decay": before + (1 - decay) * weight,
        "the weight must be multiplied by 1 - decay": decay * before + weight,
        "the old average is missing": (1 - decay) * weight,
        "the weight is missing": decay * before,
        "decay is fixed in your code at another number": 0.75 * before + 0.25 * weight,
    }
    if _same(found, right):
        return None
    if reason := first_match(found, mistakes, _same):
        return reason
    changed = found != before
    if changed[:block].any() and not changed[block:].any() and size > block:
        return "only the first block changed; where is tl.program_id(0)?"
    if _same(found[changed], right[changed]):
        left = f"{int((~changed).sum())} of {size} averages did not change with a BLOCK of {block}"
        return f"{left}: does every place belong to one program?"
    place = int((found - right).abs().nan_to_num(torch.inf).argmax())
    return f"average {before[place]:.3f}, weight {weight[place]:.3f}, decay {decay}: {found[place]:.3f} is wrong"


@exercise("12.2")
def row_mean_kernel(answer) -> str | None:
    if problem := _not_a_kernel(answer):
        return problem
    for rows, columns, block in ((5, 100, 128), (3, 128, 128), (3, 200, 256)):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, columns, generator=generator) + 1
        memory = _memory(x)
        out = torch.full((_MEMORY,), torch.nan, device=memory.device)
        answer[(rows,)](memory, out, columns, BLOCK=block)
        found, flat = out.cpu(), memory.cpu()
        if not torch.equal(flat[: x.numel()], x.flatten()):
            return "the matrix changed; store the means where out_ptr points"
        if not found[rows:].isnan().all():
            return f"there are {rows} means, and more numbers were stored"
        if problem := _wrong_means(found[:rows], x, flat, block):
            return problem
    if _leaves_masked_open(answer.fn):
        return "the means are right by luck: what a masked place holds is open unless tl.load is given other=0.0"
    return None


def _leaves_masked_open(function: Callable) -> bool:
    """Whether a kernel has a load with a mask but no ``other``, and no tl.where; no memory shows it.

    The interpreter, and a GPU as a rule, give zeros there. False if the source can't be seen.
    """
    if (tree := source_tree(function)) is None:
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if any(_name(call) == "where" for call in calls):
        return False
    given = [
        dict(zip(("pointer", "mask", "other"), call.args, strict=False))
        | {word.arg: word.value for word in call.keywords}
        for call in calls
        if _name(call) == "load"
    ]
    return any("mask" in arguments and "other" not in arguments for arguments in given)


def _name(call: ast.Call) -> str | None:
    """``load`` of ``tl.load(...)`` and of ``load(...)``."""
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def _wrong_means(
    found: torch.Tensor, x: torch.Tensor, flat: torch.Tensor, block: int
) -> str | None:
    rows, columns = x.shape
    unmasked = torch.stack([flat[row * columns :][:block] for row in range(rows)]).sum(1)
    strided = torch.stack([flat[row * block :][:columns] for row in range(rows)])
    mistakes = {
        "that is the sum; divide it by the number of columns": x.sum(1),
        "divide by columns, not by BLOCK: masked places are no columns": x.sum(1) / block,
        "places beyond the row were added: mask the load, with other=0.0": unmasked / columns,
        "places beyond the row were added, and counted: mask the load": unmasked / block,
        "row r begins at r * columns, not at r * BLOCK": strided.mean(1),
        "every program read row 0; where is tl.program_id(0)?": x[:1].mean(1).expand(rows),
    }
    right = x.mean(1)
    if _same(found, right):
        return None
    if found.isnan().all():
        return "no mean was stored (or each is nan)"
    if found[1:].isnan().all():
        return "only out[0] was stored: program r writes to out_ptr + r"
    if reason := first_match(found, mistakes, _same):
        return reason
    row = int((found - right).abs().nan_to_num(torch.inf).argmax())
    return (
        f"row {row} of {columns} columns has the mean {right[row]:.4f}; yours is {found[row]:.4f}"
    )


@exercise("12.3")
def softmax_kernel(answer) -> str | None:
    if problem := _not_a_kernel(answer):
        return problem
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 100, generator=generator)
    found, out, flat = _launch_softmax(answer, x, 128)
    if found.isnan().all():
        return "nothing was stored, or all of it is nan"
    strided = torch.stack([out[row * 128 :][:100] for row in range(5)])
    if out[100:128].isnan().all() and not strided.isnan().any():
        return "row r begins at r * columns, not at r * BLOCK"
    if not out[x.numel() :].isnan().all():
        return "numbers beyond the end were overwritten: mask the store with column < columns"
    if not _same(found, x.softmax(1)):
        return _wrong_softmax(found, x, flat)
    for shift, reason in (
        (300.0, "right for small scores; large ones overflow: take the row's maximum off first"),
        (-30_000.0, "wrong for a row of negative scores: no masked place may be the maximum"),
    ):
        found, *_ = _launch_softmax(answer, x + shift, 128)
        if not _same(found, (x + shift).softmax(1)):
            return reason
    for columns, block in ((128, 128), (200, 256)):
        wide = torch.randn(3, columns, generator=generator)
        if not _same(_launch_softmax(answer, wide, block)[0], wide.softmax(1)):
            return f"right for 100 columns in a block of 128, wrong for {columns} in one of {block}"
    low = x.bfloat16()
    reason = "right in float32, wrong in bfloat16: cast to float32 right after the load"
    try:
        found, *_ = _launch_softmax(answer, low, 128)
    except Exception as error:
        return f"{reason} ({type(error).__name__})"
    if not torch.allclose(found.float(), low.float().softmax(1), rtol=1e-2, atol=1e-4):
        return reason
    return None


def _launch_softmax(
    kernel, x: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the result (rows, columns), the whole memory that it stands in, and that of x."""
    memory = _memory(x)
    out = torch.full_like(memory, torch.nan)
    kernel[(len(x),)](memory, out, x.shape[1], BLOCK=block)
    out = out.cpu()
    return out[: x.numel()].reshape(x.shape), out, memory.cpu()


def _wrong_softmax(found: torch.Tensor, x: torch.Tensor, flat: torch.Tensor) -> str:
    rows, columns = x.shape
    unmasked = torch.stack([flat[row * columns :][:128] for row in range(rows)])
    most = x.amax(1, keepdim=True)
    e = (x - most).exp()
    zeros = (-most.clamp(min=0)).exp() * (128 - columns)  # what masked zeros add to a sum
    with_zeros = e / (e.sum(1, keepdim=True) + zeros)
    mistakes = {
        "divide by the sum of the row, or its numbers do not add up to 1": e,
        "divide by the sum of the row: that is exp alone": x.exp(),
        "that is the logarithm of the softmax": x.log_softmax(1),
        "masked places count in the sum, as exp(0): let them hold minus infinity": with_zeros,
        "places beyond the row count in the sum: mask the load": unmasked.softmax(1)[:, :columns],
        "every program worked on row 0": x[:1].softmax(1).expand(rows, -1),
    }
    if reason := first_match(found, mistakes, _same):
        return reason
    if found[1:].isnan().all() and _same(found[0], x[0].softmax(0)):
        return "only row 0 was stored; where is tl.program_id(0)?"
    if found.isnan().any():
        return f"{int(found.isnan().sum())} of {x.numel()} numbers are nan or were not stored"
    sums = found.sum(1)
    if not _same(sums, torch.ones(rows)):
        return f"the rows must add up to 1; they add up to {sums.min():.3f} to {sums.max():.3f}"
    return "the rows add up to 1, but the numbers are no softmax of the rows"


_SIZE = 2**20
_COMPILES = 20.0  # ms that the first call with a size takes more
# ms: of run whatever the size is, of run and of copy for _SIZE numbers; and what limits it
_LIMITED = (
    (0.0, 4.0, 3.6, "memory"),
    (0.0, 6.0, 2.0, "arithmetic"),
    (0.5, 0.3, 0.7, "launch"),
    (0.5, 0.3, 0.1, "launch"),
    (0.0, 3.4, 2.0, "memory"),
    (0.3, 0.7, 0.8, "memory"),
)


@exercise("12.4")
def limit(answer) -> str | None:
    for fixed, growing, copying, right in _LIMITED:
        with Clock() as clock:
            run, ran = _timed(clock, fixed, growing)
            copy, copied = _timed(clock, 0.0, copying)
            found = answered(answer(run, copy, _SIZE))
        if not isinstance(found, str) or found not in ("launch", "memory", "arithmetic"):
            return f"limit returns {found!r}; it must be 'launch', 'memory' or 'arithmetic'"
        if found == right:
            continue
        if _SIZE // 8 not in ran:
            return f"run was never called with {_SIZE} // 8 numbers: is the launch its limit?"
        if any(len(seconds) == 1 for seconds in (*ran.values(), *copied.values())):
            return "the first call with a size compiles, so it must not count: call once before the clock starts"
        whole, eighth = fixed + growing, fixed + growing / 8
        return (
            f"run takes {whole:g} ms and {eighth:.3g} ms for an eighth of the numbers, copy {copying:g} ms:"
            f" that is {right!r}, and not {found!r}"
        )
    return None


def _timed(
    clock: Clock, fixed: float, growing: float
) -> tuple[Callable[[int], None], dict[int, list[float]]]:
    """A function of a size that takes so many ms, and by size the seconds that its calls took."""
    functions, seconds = {}, {}

    def call(size: int) -> None:
        if size not in functions:
            ms = fixed + growing * size / _SIZE
            functions[size] = clock.function(lambda call: ms if call else ms + _COMPILES)
            seconds[size] = clock.seconds[-1]
        functions[size]()

    return call, seconds


def _not_a_kernel(answer) -> str | None:
    """What keeps an answer from being launched; raises Unanswered for an untouched one."""
    if not hasattr(answer, "fn") or not hasattr(answer, "run"):
        return "that is no kernel: the line above def must be @triton.jit"
    if has_no_code(answer.fn):
        raise Unanswered
    return None


def _memory(values: torch.Tensor) -> torch.Tensor:
    """A memory (_MEMORY,) that begins with ``values``."""
    memory = torch.full((_MEMORY,), _GUARD, dtype=values.dtype)
    memory[: values.numel()] = values.flatten()
    import triton  # here, as the other notebooks need none

    return memory.to("cpu" if triton.knobs.runtime.interpret else "cuda")


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
