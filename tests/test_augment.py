"""compose and augment: exact where nothing is random, and the bounds of what is."""

import math

import numpy as np
import pytest
import torch

from siglip_lib.data.augmentation import COLUMNS, DRAWS, augment, compose
from siglip_lib.data.preprocessing import preprocess

SIZE = 64
C, S = math.cos(math.radians(15)), math.sin(math.radians(15))


def neutral(number: int, device: torch.device | str = "cpu", **columns: float) -> torch.Tensor:
    """Draws at which nothing changes, except for the columns named: no shift, no turn, white ground."""
    draws = torch.full((number, DRAWS), 0.5, dtype=torch.float64, device=device)
    untouched = {"scale": 0.8, "grey": 0.99, "blur": 0.99, "erase": 0.99, "background": 0.99}
    for name, value in (untouched | columns).items():
        draws[:, COLUMNS.index(name)] = value
    return draws.float()


def blob(colour=(255, 0, 0), box=(16, 48, 16, 48), alpha=255) -> torch.Tensor:
    """One picture (1, 4, 64, 64): a rectangle of one colour, transparent around it."""
    top, bottom, left, right = box
    rgba = torch.zeros(1, 4, SIZE, SIZE, dtype=torch.uint8)
    values = torch.tensor([*colour, alpha], dtype=torch.uint8)
    rgba[:, :, top:bottom, left:right] = values.view(4, 1, 1)
    return rgba


def soft(number: int = 8) -> torch.Tensor:
    """Pictures of soft colours and alpha, none like its mirror image; colour is 0 where alpha is."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    a, b, c = torch.rand(3, number, 1, 1)
    colour = torch.stack([x * (0.3 + 0.7 * a) + 0 * y, y * b + 0 * x, (1 - x) * c * y + 0 * a], 1)
    centre = (x - 0.4) ** 2 / 0.09 + (y - 0.5) ** 2 / (0.1 + 0.1 * a)
    alpha = ((1.3 - centre).clamp(0, 0.3) / 0.3)[:, None]
    return (torch.cat([colour * (alpha > 0), alpha], 1) * 255).round().byte()


def letter() -> torch.Tensor:
    """An F, black (1, 4, 64, 64): none of its mirror images looks like it."""
    boxes = ((12, 52, 20, 28), (12, 20, 20, 44), (28, 36, 20, 38))
    alpha = torch.stack([blob(box=box)[:, 3] for box in boxes]).amax(0)
    return torch.stack([0 * alpha, 0 * alpha, 0 * alpha, alpha], 1)


def dot(right: float, below: float, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """A soft black dot (1, 4, height, width), so many pixels to the right of the middle and below it."""
    x = (torch.arange(width) + 0.5 - width / 2 - right) / 3
    y = (torch.arange(height) + 0.5 - height / 2 - below) / 3
    alpha = ((-(x**2) - y[:, None] ** 2) / 2).exp()
    return torch.stack([0 * alpha, 0 * alpha, 0 * alpha, alpha])[None].mul(255).round().byte()


def opacity(rgba: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where augmented pictures are opaque (B, H, W): where black ones on white are dark."""
    black, draws = rgba.clone(), draws.clone()
    black[:, :3] = 0
    for name, value in {"contrast": 0.5, "brightness": 0.5, "background": 0.99}.items():
        draws[:, COLUMNS.index(name)] = value
    return (1 - augment(black, draws)).mean(1) / 2


def centres(opaque: torch.Tensor) -> torch.Tensor:
    """Centres of mass (B, 2), right and below, in pixels from the picture's middle."""
    height, width = opaque.shape[1:]
    right, below = (torch.arange(side) + 0.5 - side / 2 for side in (width, height))
    total = opaque.sum((1, 2))
    sums = ((opaque.sum(1) * right).sum(1), (opaque.sum(2) * below).sum(1))
    return torch.stack(sums, 1) / total[:, None]


def test_compose_is_pils(device):
    rgba = torch.randint(0, 256, (3, 4, SIZE, SIZE), dtype=torch.uint8)
    rgba[0, 3] = 255
    got = compose(rgba.to(device)).cpu()
    assert (got.dtype, got.shape) == (torch.float32, (3, 3, SIZE, SIZE))
    # within the step to which PIL rounds; where all is opaque nothing is rounded
    arrays = [picture.permute(1, 2, 0).numpy() for picture in rgba]
    expected = preprocess(arrays, SIZE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1.01 * 2 / 255)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=2e-7)


def test_compose_on_colours():
    rgba, colours = soft(3), torch.rand(3, 3) * 2 - 1
    alpha = rgba[:, 3:].double() / 255
    expected = (rgba[:, :3].double() / 127.5 - 1) * alpha + colours.double()[:, :, None, None] * (
        1 - alpha
    )
    torch.testing.assert_close(compose(rgba, colours).double(), expected, rtol=0, atol=3e-7)
    one = compose(rgba, (0.25, -1, 1))
    assert torch.equal(one, compose(rgba, torch.tensor([[0.25, -1, 1]]).expand(3, -1)))
    assert torch.equal(compose(rgba), compose(rgba, (1, 1, 1)))
    assert torch.equal(compose(rgba)[0, :, 0, 0], torch.ones(3))


def test_strength_0_is_compose():
    rgba = soft()
    assert torch.equal(augment(rgba, torch.rand(8, DRAWS), strength=0), compose(rgba))
    assert torch.equal(augment(rgba, torch.rand(8, DRAWS), strength=0.0), compose(rgba))


def test_all_ranges_shrink_with_strength():
    rgba, draws = soft(), torch.rand(8, DRAWS)
    # rates of what happens rarely: these draws are above them
    for name in ("grey", "blur", "erase", "background"):
        draws[:, COLUMNS.index(name)] = 0.9
    distance = [
        (augment(rgba, draws, strength) - compose(rgba)).abs().amax().item()
        for strength in (1e-5, 0.01, 0.1, 1.0)
    ]
    assert distance[0] < 2e-3
    assert distance == sorted(distance)
    assert distance[-1] > 0.5


def test_nothing_changes_at_neutral_draws():
    rgba = soft()
    torch.testing.assert_close(augment(rgba, neutral(8)), compose(rgba), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", COLUMNS)
def test_each_column_of_the_draws_does_something(name):
    rgba = soft(1)
    on = {"erase": 0.0} if name.startswith("erase_") else {}
    on |= {"background": 0.0} if name in ("red", "green", "blue") else {}
    low, high = (augment(rgba, neutral(1, **on | {name: value})) for value in (0.02, 0.98))
    assert (low - high).abs().amax() > 0.05


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_results_are_in_range_and_differ(strength, device):
    noise = torch.randint(0, 256, (32, 4, SIZE, SIZE), dtype=torch.uint8)
    white = blob((255, 255, 255), box=(0, 64, 0, 64)).expand(32, -1, -1, -1)
    rgba = torch.cat([soft(64), noise, white])
    got = augment(rgba.to(device), torch.rand(128, DRAWS, device=device), strength)
    assert (got.dtype, got.shape, got.device.type) == (torch.float32, (128, 3, 64, 64), device.type)
    assert got.isfinite().all()
    assert -1 <= got.min() <= got.max() <= 1
    assert got[:64].flatten(1).unique(dim=0).shape[0] == 64


def test_the_ends_of_the_draws_are_harmless():
    white = blob((255, 255, 255), box=(0, 64, 0, 64)).expand(8, -1, -1, -1)
    for rgba, value in ((soft(), 0.0), (soft(), 1 - 2**-24), (white, 0.0), (white, 1 - 2**-24)):
        got = augment(rgba, torch.full((8, DRAWS), value))
        assert got.isfinite().all()
        assert -1 <= got.min() <= got.max() <= 1


def test_same_draws_same_result():
    rgba, draws = soft(), torch.rand(8, DRAWS)
    kept = (rgba.clone(), draws.clone())
    first = augment(rgba, draws)
    torch.manual_seed(7)
    assert torch.equal(first, augment(rgba, draws))
    assert torch.equal(rgba, kept[0])
    assert torch.equal(draws, kept[1])
    assert not torch.equal(first, augment(rgba, torch.rand(8, DRAWS)))


def test_a_picture_does_not_depend_on_its_batch():
    rgba, draws = soft(), torch.rand(8, DRAWS)
    together = augment(rgba, draws)
    for i in range(8):
        alone = augment(rgba[i : i + 1], draws[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    back = augment(rgba.flip(0), draws.flip(0)).flip(0)
    torch.testing.assert_close(back, together, rtol=0, atol=1e-5)


def test_no_dark_borders():
    # a white picture on white stays white, wherever its edges come to lie
    draws = torch.rand(64, DRAWS)
    for name, value in {"contrast": 0.5, "brightness": 0.5, "background": 0.9}.items():
        draws[:, COLUMNS.index(name)] = value
    white = blob((255, 255, 255)).expand(64, -1, -1, -1)
    torch.testing.assert_close(augment(white, draws), torch.ones(64, 3, 64, 64), rtol=0, atol=1e-5)
    # and a red one has no pixel that is neither red, white nor between them
    for name, value in {"hue": 0.5, "saturation": 0.5, "grey": 0.9}.items():
        draws[:, COLUMNS.index(name)] = value
    red, green, blue = augment(blob().expand(64, -1, -1, -1), draws).unbind(1)
    assert red.min() > 1 - 1e-5
    torch.testing.assert_close(green, blue, rtol=0, atol=1e-5)
    assert green.min() < -0.9


def test_never_mirrored():
    draws = torch.rand(256, DRAWS)
    for name, value in {"scale": 0.8, "shift_x": 0.5, "shift_y": 0.5, "erase": 0.99}.items():
        draws[:, COLUMNS.index(name)] = value  # in place and whole, to be laid over
    rgba = letter().expand(256, -1, -1, -1)
    moved, plain = opacity(rgba, draws), opacity(letter(), neutral(1))
    like, left_right, upside_down, turned = (
        (moved * image).sum((1, 2))
        for image in (plain, plain.flip(2), plain.flip(1), plain.flip(1, 2))
    )
    assert (like > left_right).all()
    assert (like > upside_down).all()
    assert (like > turned).all()


def test_stays_mostly_in_the_picture():
    draws = torch.rand(512, DRAWS)
    draws[:, COLUMNS.index("erase")] = 0.99
    scale = 0.6 + 0.5 * draws[:, COLUMNS.index("scale")]
    whole = blob(box=(0, 64, 0, 64)).expand(512, -1, -1, -1)
    left = opacity(whole, draws).mean((1, 2)) / scale**2
    assert left.min() > 0.7  # the rest was moved out
    assert left.median() > 0.93
    assert left.max() < 1.01


@pytest.mark.parametrize(
    ("columns", "place"),
    [
        ({}, (16, 8)),
        ({"scale": 0.0}, (9.6, 4.8)),
        ({"scale": 1.0}, (17.6, 8.8)),
        ({"aspect": 1.0}, (16 * math.exp(0.075), 8 * math.exp(-0.075))),
        ({"rotation": 1.0}, (16 * C - 8 * S, 16 * S + 8 * C)),  # to the right, as y points down
        ({"rotation": 0.0}, (16 * C + 8 * S, -16 * S + 8 * C)),
        ({"shear": 1.0}, (16 + 0.15 * 8, 8)),
        ({"shift_x": 1.0}, (16 + 3.2, 8)),
        ({"shift_y": 0.0}, (16, 8 - 3.2)),
        ({"scale": 0.9, "shift_x": 0.0}, (16.8 - 3.2, 8.4)),
        ({"scale": 0.0, "shift_x": 0.0}, (9.6 - 0.5 * 32, 4.8)),
        (
            {"scale": 0.0, "rotation": 1.0, "shear": 1.0},
            (0.6 * (17.2 * C - 8 * S), 0.6 * (17.2 * S + 8 * C)),
        ),
    ],
)
def test_each_move_leads_where_it_should(columns, place):
    found = centres(opacity(dot(16, 8), neutral(1, **columns)))
    torch.testing.assert_close(found, torch.tensor([place]).float(), rtol=0, atol=0.02)


def test_turning_keeps_distances_where_sides_differ():
    found = centres(opacity(dot(20, 0, height=48, width=80), neutral(1, rotation=1.0)))
    torch.testing.assert_close(found, torch.tensor([[20 * C, 20 * S]]), rtol=0, atol=0.02)


def middle(rgba, **columns) -> list[float]:
    """The colour in the middle of an augmented picture, each channel in 0..255."""
    return ((augment(rgba, neutral(1, **columns))[0, :, 32, 32] + 1) * 127.5).tolist()


@pytest.mark.parametrize(
    ("columns", "colour"),
    [
        ({}, (200, 100, 50)),
        ({"grey": 0.0}, (124.2, 124.2, 124.2)),  # .299, .587 and .114 of the three
        ({"grey": 0.11}, (200, 100, 50)),
        ({"saturation": 0.0}, (169.68, 109.68, 79.68)),
        ({"contrast": 1.0}, (218.125, 93.125, 30.625)),
        ({"brightness": 0.0}, (161.75, 61.75, 11.75)),
        ({"brightness": 1.0, "contrast": 1.0}, (255, 131.375, 68.875)),
        ({"brightness": 0.0, "contrast": 1.0}, (179.875, 54.875, 0)),
    ],
)
@pytest.mark.parametrize("alpha", [255, 102])
def test_each_change_of_colour(columns, colour, alpha):
    # what is half transparent changes by the same; here grey is seen through it
    grey = {"background": 0.0, "red": 0.5, "green": 0.5, "blue": 0.5}
    seen = [127.5 + alpha / 255 * (value - 127.5) for value in colour]
    got = middle(blob((200, 100, 50), alpha=alpha), **columns | grey)
    assert got == pytest.approx(seen, abs=0.01)


def test_hue_turns_towards_yellow_and_towards_violet_and_leaves_grey():
    red, yellow, violet = (middle(blob((180, 60, 60)), hue=hue) for hue in (0.5, 1.0, 0.0))
    assert yellow[1] - red[1] > 20 > yellow[2] - red[2]
    assert violet[2] - red[2] > 20 > violet[1] - red[1]
    assert sum(yellow) == pytest.approx(sum(red), abs=0.01)
    # a rotation: as far from grey as before
    spread = [np.std(colour) for colour in (red, yellow, violet)]
    assert spread == pytest.approx([spread[0]] * 3, abs=0.01)
    assert middle(blob((90, 90, 90)), hue=1.0) == pytest.approx([90] * 3, abs=0.01)


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.6, 1.0])
def test_hue_turns_by_degrees(draw):
    colours = np.array([middle(blob((150, 110, 70)), hue=hue) for hue in (0.5, draw)])
    a, b = colours - colours.mean(1, keepdims=True)  # around the grey axis
    cross = np.cross(a, b) @ np.ones(3) / 3**0.5
    assert math.degrees(math.atan2(cross, a @ b)) == pytest.approx(40 * (draw - 0.5), abs=0.05)


def test_blur_softens_and_keeps_the_sum():
    sharp, half, full = (opacity(letter(), neutral(1, blur=b))[0] for b in (0.25, 0.125, 0.0))
    assert torch.equal(sharp, opacity(letter(), neutral(1))[0])
    assert full.sum().item() == pytest.approx(sharp.sum().item(), rel=1e-5)
    torch.testing.assert_close(half, (sharp + full) / 2, rtol=0, atol=1e-5)
    edge = [image.diff(dim=1).abs().amax().item() for image in (sharp, half, full)]
    assert edge[0] > 1.5 * edge[1] > 1.5**2 * edge[2]
    # the mean of 3 by 3 pixels
    point = opacity(blob(box=(20, 21, 30, 31)), neutral(1, blur=0.0))[0]
    expected = torch.zeros(64, 64)
    expected[19:22, 29:32] = 1 / 9
    torch.testing.assert_close(point, expected, rtol=0, atol=1e-5)
    # beyond the border all is transparent
    assert opacity(blob(box=(0, 64, 0, 64)), neutral(1, blur=0.0))[0, 0, 0] < 0.5


def test_the_erased_rectangle_shows_the_background():
    whole = blob(box=(0, 64, 0, 64))
    draws = neutral(1, erase=0.0, erase_x=0.75, erase_y=0.25, erase_width=1.0, erase_height=0.0)
    draws[:, COLUMNS.index("blur")] = 0.0  # blurred before, so the hole's edges are sharp
    for name, value in {"background": 0.0, "red": 0.2, "green": 0.4, "blue": 0.6}.items():
        draws[:, COLUMNS.index(name)] = value
    picture = augment(whole, draws)[0]
    ground = torch.tensor([0.2, 0.4, 0.6]) * 2 - 1
    hole = (picture - ground[:, None, None]).abs().amax(0) < 1e-5
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[13:19, 37:59] = True  # .1 and .35 of 64 about row 16 and column 48
    assert torch.equal(hole, expected)
    assert not (augment(whole, neutral(1, erase=0.26)) != augment(whole, neutral(1))).any()


def test_rates():
    nothing = torch.zeros(4096, 4, 1, 1, dtype=torch.uint8)
    ground = augment(nothing, torch.rand(4096, DRAWS))[:, :, 0, 0]
    white = (ground == 1).all(1)
    assert abs(white.double().mean() - 0.5) < 4 * (0.25 / 4096) ** 0.5
    # any colour: uniform in each channel
    assert ((ground[~white].mean(0)).abs() < 4 * (1 / 3 / 2048) ** 0.5).all()
    half = augment(nothing, torch.rand(4096, DRAWS), strength=0.5)[:, :, 0, 0]
    assert abs((half == 1).all(1).double().mean() - 0.75) < 4 * (0.1875 / 4096) ** 0.5


def test_compiles_without_graph_breaks():
    rgba, draws = soft(), torch.rand(8, DRAWS)
    for strength in (0.0, 1.0):
        compiled = torch.compile(augment, fullgraph=True, backend="eager")
        expected = augment(rgba, draws, strength)
        torch.testing.assert_close(compiled(rgba, draws, strength), expected, rtol=0, atol=1e-6)
    compiled = torch.compile(compose, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rgba), compose(rgba), rtol=0, atol=1e-6)
    colours = torch.rand(8, 3)
    assert torch.equal(compiled(rgba, colours), compose(rgba, colours))


def test_autocast_changes_nothing(device):
    rgba, draws = soft().to(device), torch.rand(8, DRAWS, device=device)
    expected = augment(rgba, draws)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = augment(rgba, draws)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_runs_inside_a_cuda_graph(gpu):
    rgba, draws = soft().to(gpu), torch.rand(8, DRAWS, device=gpu)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        expected = augment(rgba, draws), compose(rgba, (0, 0.5, 1))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = augment(rgba, draws), compose(rgba, (0, 0.5, 1))
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    other = torch.rand(8, DRAWS, device=gpu)
    draws.copy_(other)
    graph.replay()
    torch.testing.assert_close(got[0], augment(rgba, other), rtol=0, atol=1e-6)


def test_a_gpu_gives_the_same_without_waiting(gpu):
    rgba, draws = soft(), torch.rand(8, DRAWS)
    there = rgba.to(gpu), draws.to(gpu)
    augment(*there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), augment(rgba, draws), rtol=0, atol=1e-3)


RGBA = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rgba": RGBA.float()}, TypeError, "rgba is torch.float32; it must be of uint8"),
        ({"rgba": RGBA[:, :3]}, ValueError, "rgba has shape (2, 3, 8, 8); it must be (B, 4"),
        ({"rgba": RGBA[0]}, ValueError, "rgba has shape (4, 8, 8)"),
        ({"background": (0, 0)}, ValueError, "background=(0, 0) must be three numbers in [-1, 1]"),
        ({"background": (0, 0, 255)}, ValueError, "background=(0, 0, 255) must be three"),
        ({"background": ("0", 0, 0)}, TypeError, "background='0' must be a number"),
        ({"background": torch.zeros(2, 3).long()}, TypeError, "background is torch.int64"),
        (
            {"background": torch.zeros(3, 3)},
            ValueError,
            "background has shape (3, 3); it must be (2, 3)",
        ),
        (
            {"background": torch.zeros(2, 3, device="meta")},
            ValueError,
            "background is on meta; it must be on cpu, as rgba",
        ),
    ],
)
def test_wrong_arguments_of_compose(options, error, message):
    with pytest.raises(error) as caught:
        compose(**({"rgba": RGBA} | options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rgba": RGBA.float()}, TypeError, "rgba is torch.float32; it must be of uint8"),
        (
            {"draws": torch.zeros(2, 3)},
            ValueError,
            f"draws has shape (2, 3); it must be (2, {DRAWS})",
        ),
        ({"draws": torch.zeros(1, DRAWS)}, ValueError, f"draws has shape (1, {DRAWS})"),
        ({"draws": torch.zeros(2, DRAWS).long()}, TypeError, "draws is torch.int64"),
        ({"strength": 2.1}, ValueError, "strength=2.1 must lie in [0, 2]"),
        ({"strength": -0.1}, ValueError, "strength=-0.1 must lie in [0, 2]"),
        ({"strength": math.nan}, ValueError, "strength=nan must lie in [0, 2]"),
        ({"strength": None}, TypeError, "strength=None must be a number"),
    ],
)
def test_wrong_arguments_of_augment(options, error, message):
    with pytest.raises(error) as caught:
        augment(**({"rgba": RGBA, "draws": torch.zeros(2, DRAWS)} | options))
    assert message in str(caught.value)
