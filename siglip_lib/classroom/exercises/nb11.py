"""Checks of notebook 11, attention maps."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, is_tensor, was_changed
from siglip_lib.tower.vision_transformer import VisionTransformer


def _inside(rows: int, columns: int, boxes: Tensor, size: int) -> Tensor:
    y, x = ((torch.arange(n) + 0.5) * size / n for n in (rows, columns))
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]


@exercise("11.1")
def mass(answer) -> str | None:
    maps = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    # centres stand at 3, 9, ... 21 down and at 2, 6, ... 22 across; the third box begins and ends on some
    boxes = torch.tensor([[0, 0, 12, 7], [5, 8, 23, 24], [6, 3, 14, 21.0]])
    inside = _inside(4, 6, boxes, 24)
    total = maps.sum((1, 2))
    found = answered(answer(maps.clone(), boxes.clone(), 24))
    if not is_tensor(found, 3):
        return "the result must be a tensor of shape (B,): one share for each map"
    right = (maps * inside).sum((1, 2)) / total
    if torch.allclose(found.float(), right):
        return None
    swapped = _inside(4, 6, boxes[:, [1, 0, 3, 2]], 24)
    with_end = _inside(4, 6, boxes + torch.tensor([0, 0, 1e-3, 1e-3]), 24)
    sums, exchanged = right * total, (maps * swapped).sum((1, 2))
    mistakes = {
        "that is the sum inside the box; divide it by the map's own sum": sums,
        "divide by the sum of each map, not by that of all maps": sums / maps.sum(),
        "that counts patches; the map's values must decide": inside.float().mean((1, 2)),
        "that is the mean inside the box, not its share of the whole": sums / inside.sum((1, 2)),
        "x and y are swapped: a box is x0, y0, x1, y1, and x runs along the columns": exchanged
        / total,
        "a centre at x1 or y1 is outside": (maps * with_end).sum((1, 2)) / total,
    }
    rule = "is a patch inside when its centre is, in pixels and not in patches?"
    return first_match(found.float(), mistakes) or f"the shares are wrong; {rule}"


@exercise("11.2")
def keeping(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(2, 3, 5, 5, generator=generator).mul(2).softmax(-1) for _ in range(3)]
    pool = torch.randn(2, 3, 1, 5, generator=generator).softmax(-1)

    def roll(blocks: list[Tensor], keep: float, heads=lambda w: w.mean(1)) -> Tensor:
        read = heads(pool)
        for weights in blocks:
            read = keep * read + (1 - keep) * read @ heads(weights)
        return read[:, 0]

    given = [weights.clone() for weights in blocks]
    found = answered(answer(given, pool.clone(), 0.8))
    if was_changed(given, blocks):
        return "your function changed the weights that it was given"
    if not is_tensor(found, 2, 5):
        return "the result must be a tensor of shape (B, N)"
    found = found.float()
    back, transposed = blocks[::-1], [weights.mT for weights in blocks[::-1]]
    same = partial(torch.allclose, atol=1e-6)
    if same(found, roll(back, 0.8)):
        if not same(answer(blocks, pool, 1.0).float(), pool.mean(1)[:, 0]):
            return "right for keep = 0.8, but keep = 1 does not give the pooling head's own map"
        return None
    mistakes = {
        "that keeps one half, whatever keep is": roll(back, 0.5),
        "keep is the share of what a token was; you give it to what it looked at": roll(back, 0.2),
        "begin at the last block: the pooling head reads what that one wrote": roll(blocks, 0.8),
        "a row says where a token looks; you follow the columns": roll(transposed, 0.8),
        "take the mean over the heads": roll(back, 0.8, lambda w: w.amax(1)),
    }
    rule = "each block must turn r into keep * r + (1 - keep) * r @ A"
    return first_match(found, mistakes, same) or f"the map is wrong; {rule}"


@exercise("11.3")
def squares(answer) -> str | None:
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        tower = VisionTransformer(
            (16, 24), 4, embed_dim=24, depth=1, num_heads=2, class_token=False, global_pool="map", num_classes=0
        ).double()  # fmt: skip
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, 0.1, 0.3)
        tower.eval()
        pixels = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1
        text = torch.randn(2, 24, dtype=torch.float64)

        def scores(ground: Tensor, figure: Tensor, score=F.cosine_similarity) -> Tensor:
            found = torch.empty(2, 2, 3, dtype=torch.float64)
            for row in range(2):
                for column in range(3):
                    some = ground.clone()
                    part = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                    some[part] = figure[part]
                    found[:, row, column] = score(tower(some), text)
            return found

        given, white = pixels.clone(), torch.ones_like(pixels)
        found = answered(answer(tower, given, text, 8))
        if was_changed(given, pixels):
            return "your function changed the pixels that it was given"
        if not is_tensor(found, 2, 2, 3):
            return "the result must have the shape (B, rows, columns); 16 x 24 pixels have (2, 3) squares of 8"
        found = found.double()
        right, covered = scores(white, pixels), scores(pixels, white)
        on_grey, on_black = scores(0 * white, pixels), scores(-white, pixels)
        products = scores(white, pixels, lambda z, t: (z * t).sum(1))
        whole = F.cosine_similarity(tower(pixels), text)[:, None, None]
        mistakes = {
            "that covers the square; it must cover all but the square": covered,
            "that is occlusion, the fall when the square is covered": whole - covered,
            "isolation is the score itself, not how much lower than the whole it is": whole - right,
            "cover with white, which is 1.0 on the pixels' scale; you cover with 0, a grey": on_grey,
            "cover with white, which is 1.0 on the pixels' scale; you cover with -1, black": on_black,
            "the score is a cosine; divide by both lengths": products,
        }
    same = partial(torch.allclose, atol=1e-5)
    if same(found, right):
        return None
    rule = "is all white but the rows and columns of pixels of one square?"
    return first_match(found, mistakes, same) or f"the scores are wrong; {rule}"
