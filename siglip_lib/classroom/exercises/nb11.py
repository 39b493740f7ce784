"""Checks of notebook 11, attention maps."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    first_match,
    is_tensor,
    near,
    two_numbers,
    was_changed,
)
from siglip_lib.evaluate.maps import attention_maps
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
def twins(answer) -> str | None:
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        tower = VisionTransformer(
            24, 4, embed_dim=24, depth=2, num_heads=3, class_token=False, global_pool="map", num_classes=0
        )  # fmt: skip
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, 0.1, 0.3)
        tower.eval()
        pixels = torch.rand(3, 3, 24, 24) * 2 - 1
        # of 6 x 6 patches, whose centres stand at 2, 6, ... 22; the second box of each scene is not asked for
        boxes = torch.tensor([[0, 0, 12, 7], [2, 1, 10, 12], [5, 3, 11, 10.0]])
        boxes = torch.stack((boxes, boxes + torch.tensor([12, 0, 12, 0])), 1)
        given = pixels.clone()
        result = answered(answer(tower, given, boxes.clone(), 1, 2))
        if was_changed(given, pixels):
            return "your function changed the pixels that it was given"
        found = two_numbers(result)
        if found is None:
            return "the result must be two numbers: the own object's share and the twin's"

        def scene(to: slice, source: Tensor = pixels) -> Tensor:
            changed = pixels.clone()
            changed[:, :, to, to] = source[:, :, :12, :12]
            return changed

        def shares(
            scene: Tensor,
            block: int = 1,
            head: int = 2,
            box: int = 0,
            away: int = 12,
            by_scene=False,
        ):
            with attention_maps(tower, [block]) as maps:
                tower(scene)
            (weights,) = maps.values()
            own, twin = (
                _inside(6, 6, boxes[:, box] + move, 24).flatten(1).float() for move in (0, away)
            )
            kept = torch.einsum("bq, bqk -> bk", own, weights[:, head])
            each = torch.stack([(kept * there).sum(1) for there in (own, twin)])  # (2, B)
            ends = (each / own.sum(1)).mean(1) if by_scene else each.sum(1) / own.sum()
            return ends.tolist()

        end = slice(12, None)
        right = shares(scene(end))
        mistakes = {
            "the order is the own object's share, then the twin's": right[::-1],
            "that is without a twin; copy the first quarter over the last before the tower runs": shares(
                pixels
            ),
            "that is of another head": shares(scene(end), head=1),
            "that is of another block": shares(scene(end), block=0),
            "all patches of all scenes count alike; do not take the mean over scenes": shares(
                scene(end), by_scene=True
            ),
            "divide by the number of the object's patches, and not by the weight that you found": [
                x / sum(right) for x in right
            ],
        }

    def same(found: tuple, value: list[float]) -> bool:
        return all(map(near(1e-3), found, value))

    if same(found, right):
        return None
    rule = "does a patch count by its centre, and are the twin's patches half a picture further right and down?"
    return first_match(found, mistakes, same) or f"the shares are wrong; {rule}"


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
