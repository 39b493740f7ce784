"""What a notebook builds as a component equals what the library ships: outputs, gradients, names."""

import copy

import pytest
import torch
from comparing import assert_close, outputs_and_gradients, randomized
from notebook_files import PATHS, definitions, exercises, read, run, setup_source
from PIL import Image
from torch import nn

import siglip_lib
from siglip_lib import vl
from siglip_lib.evaluate.heads import mean_ablation, own_object_share
from siglip_lib.siglip.loss_block import sigmoid_loss_block
from siglip_lib.train.captioning import Captioner
from siglip_lib.train.questions import cut_scenes
from siglip_lib.vl.language_model import rotate

pytest.importorskip("triton")
from siglip_lib.kernels.flash_attention import flash_attention
from siglip_lib.kernels.residual import fused_residual
from siglip_lib.kernels.sampler import trunc_normal_philox_

BY_NUMBER = {path.stem[:2]: read(path) for path in PATHS}
# notebook, the notebook's module, the library's, and arguments for both; each has 24 channels
MODULES = [
    ("03", "MyAttention", "Attention", {"dim": 24, "num_heads": 3, "qkv_bias": True}),
    ("03", "MyAttention", "Attention", {"dim": 24, "num_heads": 3, "qk_norm": True}),
    ("05", "MyLayerScale", "LayerScale", {"dim": 24, "init_values": 0.3}),
    ("05", "MyDropPath", "DropPath", {"drop_prob": 0.4}),
    ("05", "MyDropPath", "DropPath", {"drop_prob": 0.4, "scale_by_keep": False}),
    ("06", "MyMlp", "Mlp", {"in_features": 24, "hidden_features": 40}),
    ("06", "MyBlock", "Block", {"dim": 24, "num_heads": 3, "init_values": 0.3, "drop_path": 0.4}),
    ("06", "MyBlock", "Block", {"dim": 24, "num_heads": 3, "qkv_bias": True, "qk_norm": True}),
]
PICTURES = [  # for modules that take pictures
    {"img_size": 20, "patch_size": 6, "embed_dim": 8},
    {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "bias": False},
]
FUNCTIONS = {
    "01": ["my_trunc_normal_"],
    "02": ["my_named_apply", "my_init_weights"],
    "07": ["MyPatchEmbed", "my_weights", "my_resample"],
    "08": ["MyPool", "MyTower"],
    "09": [
        "my_sigmoid_loss",
        "my_block",
        "my_loss_and_gradients",
        "MySigmoidLoss",
        "my_chunked_loss",
        "my_softmax_and_gradients",
    ],
    "11": ["my_rollout", "my_occlusion", "my_gradient_tokens", "my_share", "my_ablation"],
    "12": ["my_fused_residual", "my_truncated_draws"],
    "13": ["my_attention", "my_dq", "my_dk_dv"],
    "14": ["my_ring"],
    "15": [
        "my_choice",
        "my_tiles",
        "MyAdaptor",
        "my_lay_out",
        "my_rotation",
        "my_writing",
        "MyCaptioner",
        "my_cut",
    ],
}


def notebooks_own(number: str, *names: str, change: tuple[str, str] = ("", "")) -> dict:
    """Run a notebook's imports and the definitions named, one string in them replaced; return what they define."""
    namespace: dict = {"__name__": "notebook"}
    exec(setup_source(BY_NUMBER[number]), namespace)
    found = definitions(BY_NUMBER[number])
    for name in names:
        run(found[name].replace(*change), namespace)
    return namespace


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("number", "mine", "library", "arguments"), MODULES)
def test_module_equals_the_library(number, mine, library, arguments, training):
    names = [mine, "MyMlp"] if mine == "MyBlock" else [mine]
    mine = notebooks_own(number, *names)[mine](**arguments).double().train(training)
    library = getattr(siglip_lib, library)(**arguments).double().train(training)
    mine.load_state_dict(randomized(library).state_dict(), strict=True)
    x = torch.randn(6, 5, 24, dtype=torch.float64)
    found = []
    for module in (mine, library):
        torch.manual_seed(1)  # DropPath draws
        found.append(outputs_and_gradients(module, x))
    assert_close(*found)


@pytest.mark.parametrize("arguments", PICTURES)
def test_patch_embedding_equals_the_library(arguments):
    mine = notebooks_own("07", "cut", "MyPatchEmbed")["MyPatchEmbed"](**arguments).double()
    library = siglip_lib.PatchEmbed(**arguments).double()
    mine.load_state_dict(randomized(library).state_dict(), strict=True)
    size = arguments["img_size"]
    x = torch.randn(2, arguments.get("in_chans", 3), size, size, dtype=torch.float64)
    assert_close(outputs_and_gradients(mine, x), outputs_and_gradients(library, x))
    for module in (mine, library):
        with pytest.raises(ValueError, match="built for"):
            module(x[..., 1:])


def test_tower_equals_the_library():
    own = notebooks_own("08", "norm_layer", "tanh_gelu", "MyPool", "MyTower")
    sizes = dict(img_size=30, patch_size=7, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.5)
    mine = own["MyTower"](**sizes).double()
    library = siglip_lib.VisionTransformer(
        **sizes, class_token=False, global_pool="map", num_classes=0
    ).double()
    mine.load_state_dict(randomized(library).state_dict(), strict=True)
    x = torch.randn(2, 3, 30, 30, dtype=torch.float64)
    assert_close(outputs_and_gradients(mine, x), outputs_and_gradients(library, x))


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("chunk", [None, 2, 5, 9])
def test_loss_equals_the_library(chunk, with_ids):
    own = notebooks_own("09", "signs", *FUNCTIONS["09"])
    plain = chunk is None
    mine = own["my_sigmoid_loss" if plain else "my_chunked_loss"]
    vectors = nn.functional.normalize(torch.randn(2, 7, 4, dtype=torch.float64), dim=2)
    learned = [*vectors, torch.tensor(1.3).double(), torch.tensor(-2.0).double()]
    ids = (torch.arange(7) % 4, torch.arange(7) % 3) if with_ids else ()
    found = []
    for loss, options in ((mine, {} if plain else {"chunk": chunk}), (siglip_lib.sigmoid_loss, {})):
        arguments = [x.clone().requires_grad_() for x in learned]
        value = loss(*arguments, *ids, **options)
        (-3.7 * value).backward()  # the gradient that comes in is not 1
        names = "loss", "image", "text", "logit_scale", "logit_bias"
        tensors = value.detach(), *(x.grad for x in arguments)
        found.append(dict(zip(names, tensors, strict=True)))
    assert_close(*found)


def test_block_of_the_loss_equals_the_library():
    image, text = (torch.randn(n, 3, dtype=torch.float64) for n in (4, 6))
    scale, bias = torch.tensor(2.5).double(), torch.tensor(-1.5).double()
    together = torch.rand(4, 6) < 0.3
    z = 2.0 * together - 1.0
    loss, *sums, d_bias = notebooks_own("09", "my_block")["my_block"](image, text, scale, bias, z)
    wanted = torch.zeros_like(image), torch.zeros_like(text)
    library = sigmoid_loss_block(image, text, scale, bias, together, wanted)
    torch.testing.assert_close((loss, d_bias, *sums), (*library, *wanted))


@pytest.mark.parametrize("chunk", [2, 5, 9])
def test_softmax_in_blocks_equals_the_library(chunk):
    mine = notebooks_own("09", "my_softmax_and_gradients")["my_softmax_and_gradients"]
    vectors = nn.functional.normalize(torch.randn(2, 7, 4, dtype=torch.float64), dim=2)
    scale = torch.tensor(1.3).double()
    learned = [x.clone().requires_grad_() for x in vectors]
    loss = siglip_lib.softmax_loss(*learned, scale)
    wanted = loss.detach(), *torch.autograd.grad(loss, learned)
    torch.testing.assert_close(mine(*vectors, scale, chunk), wanted)


@pytest.mark.parametrize("new", [3, 7, 11, 12, 30])
def test_resampling_equals_the_library(new):
    my_resample = notebooks_own("07", "cubic", "my_weights", "my_resample")["my_resample"]
    positions = torch.randn(1, 121, 5)
    library = siglip_lib.resample_abs_pos_embed(positions, (new, 8), num_prefix_tokens=0)
    torch.testing.assert_close(my_resample(positions, (new, 8)), library, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-0.05, 0.05), (-0.02, 0.07)])
def test_sampler_equals_the_library(dtype, bounds):
    mine = notebooks_own("01", "edge", "inside", "my_trunc_normal_")["my_trunc_normal_"]
    drawn = []
    for sampler in (mine, siglip_lib.trunc_normal_):
        torch.manual_seed(1)
        drawn.append(sampler(torch.empty(1000, dtype=dtype), std=0.05, a=bounds[0], b=bounds[1]))
    torch.testing.assert_close(*drawn)


def test_initialiser_equals_the_library():
    own = notebooks_own("02", "my_named_apply", "my_init_weights")
    mine = randomized(nn.Sequential(siglip_lib.Block(24, 3, init_values=0.5), nn.Linear(24, 5)))
    library = copy.deepcopy(mine)
    mine_seen, library_seen = [], []
    for apply, init, model, seen in (
        (own["my_named_apply"], own["my_init_weights"], mine, mine_seen),
        (siglip_lib.named_apply, siglip_lib.init_weights_vit_timm, library, library_seen),
    ):
        torch.manual_seed(1)
        apply(init, model)
        apply(lambda module, name, seen=seen: seen.append(name), model)
    assert mine_seen == library_seen
    for name, weight in library.state_dict().items():
        assert torch.equal(mine.state_dict()[name], weight), name


def explained() -> tuple[siglip_lib.VisionTransformer, torch.Tensor]:
    """A tower whose attention is far from even, and pictures of 2 by 3 patches."""
    tower = siglip_lib.VisionTransformer(
        (16, 24), 8, embed_dim=24, depth=3, num_heads=2, class_token=False, global_pool="map", num_classes=0
    )  # fmt: skip
    return randomized(tower).eval(), torch.randn(2, 3, 16, 24)


def test_rollout_equals_the_library():
    tower, pixels = explained()
    with siglip_lib.attention_maps(tower) as maps, torch.no_grad():
        tower(pixels)
    *blocks, pool = maps.values()
    mine = notebooks_own("11", "my_rollout")["my_rollout"](blocks, pool)
    torch.testing.assert_close(mine, siglip_lib.rollout(tower, pixels).flatten(1))


def test_occlusion_equals_the_library():
    tower, pixels = explained()
    text = torch.randn(2, 24)
    mine = notebooks_own("11", "my_occlusion")["my_occlusion"](tower, pixels, text, 8)
    library = siglip_lib.occlusion(tower, pixels, text, window=8, stride=8)
    torch.testing.assert_close(mine, library, rtol=0, atol=1e-5)


def test_gradient_tokens_equals_the_library():
    tower, pixels = explained()
    text = torch.randn(2, 24)
    mine = notebooks_own("11", "my_gradient_tokens")["my_gradient_tokens"](tower, pixels, text)
    torch.testing.assert_close(mine, siglip_lib.gradient_tokens(tower, pixels, text).flatten(1))


def test_shares_equal_the_library():
    boxes = torch.tensor([[0, 0, 9, 16], [7, 2, 16, 11.0]]).expand(2, 2, 4)
    own = notebooks_own("11", "covers", "my_share")
    tower = siglip_lib.VisionTransformer(
        16, 4, embed_dim=24, depth=3, num_heads=2, class_token=False, global_pool="map", num_classes=0
    )  # fmt: skip
    tower, pixels = randomized(tower).eval(), torch.randn(2, 3, 16, 16)
    own |= dict(size=16, grid=(4, 4), device=torch.device("cpu"))
    mine = own["my_share"](tower, pixels, boxes)
    torch.testing.assert_close(mine, own_object_share(tower, pixels, boxes)[0])


def test_ablation_equals_the_library():
    tower, pixels = explained()
    my_ablation = notebooks_own("11", "my_ablation")["my_ablation"]
    with torch.no_grad():
        intact = tower(pixels)
        for block, head in ((0, 1), (2, 0)):
            with mean_ablation(tower, pixels, block, head):
                library = tower(pixels)
            assert (library - intact).abs().max() > 1e-3
            torch.testing.assert_close(my_ablation(tower, pixels, block, head), library)


@pytest.mark.parametrize(
    ("shape", "programs"),
    # the last in 4 steps a program and 35 programs, of which one has 2 rows less
    [((3, 5, 100), 1024), ((1, 1, 8), 1024), ((2, 69, 4), 32)],
)
def test_fused_residual_equals_the_library(shape, programs, device):
    names = "residual_kernel", "residual_backward_kernel", "FusedResidual", "my_fused_residual"
    assert "rows // 1024" in definitions(BY_NUMBER["12"])["FusedResidual"]
    own = notebooks_own("12", *names, change=("rows // 1024", f"rows // {programs}"))
    x, branch, above = torch.randn(3, *shape, device=device)
    gamma, keep = torch.randn(shape[2], device=device), torch.ones(shape[0], device=device)
    keep[1:2] = 0
    branch[1:2] = torch.nan  # a dropped branch is not read
    found = []
    for residual in (own["my_fused_residual"], fused_residual):
        learned = [t.clone().requires_grad_() for t in (x, branch, gamma)]
        out = residual(*learned, keep, 0.7)
        found.append([out.detach(), *torch.autograd.grad(out, learned, above)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("std", "bound"), [(1.0, 2.0), (0.02, 2.0), (0.05, 0.05)])
def test_sampler_kernel_equals_the_library(std, bound, dtype, device):
    names = "words_of", "inverse_normal", "STEP", "draws_kernel", "my_truncated_draws"
    draw = notebooks_own("12", *names)["my_truncated_draws"]
    out = torch.empty(1500, dtype=dtype, device=device)
    mine = draw(out.clone(), std, bound, seed=5)
    library = trunc_normal_philox_(out, 0.0, std, -bound, bound, seed=5)
    # one rounding to float16 may fall to the other side
    torch.testing.assert_close(
        mine, library, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-7
    )


@pytest.mark.parametrize("tokens", [1, 64, 90])
def test_online_attention_and_its_gradients_equal_the_kernels(tokens, device):
    own, scale = notebooks_own("13", *FUNCTIONS["13"]), 0.2
    qkv = torch.randn(2, tokens, 3, 2, 72, device=device).requires_grad_()
    pull = torch.randn(2, tokens, 2, 72, device=device)
    half = qkv if device.type == "cpu" else qkv.half()
    kernels = flash_attention(half, scale)
    (gradient,) = torch.autograd.grad(kernels, qkv, pull.to(kernels.dtype))
    q, k, v = qkv.detach().double().permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    do = pull.double().transpose(1, 2)
    o, lse = own["my_attention"](q, k, v, scale)
    dq, delta = own["my_dq"](q, k, v, o, lse, do, scale)
    dk, dv = own["my_dk_dv"](q, k, v, lse, do, delta, scale)
    close = dict(rtol=0, atol=1e-5 if device.type == "cpu" else 5e-2, check_dtype=False)
    torch.testing.assert_close(kernels.detach(), o.transpose(1, 2), **close)
    torch.testing.assert_close(gradient, torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4), **close)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ring_equals_the_librarys_loss_of_the_whole_batch(world):
    my_ring = notebooks_own("14", "turned", "my_ring")["my_ring"]
    vectors = nn.functional.normalize(torch.randn(2, 4 * world, 6, dtype=torch.float64), dim=2)
    ids = torch.randint(5, (4 * world,))
    scalars = torch.tensor(1.3).double(), torch.tensor(-2.0).double()
    losses, *gradients = my_ring(*([*x.chunk(world)] for x in (*vectors, ids)), *scalars)
    learned = [x.clone().requires_grad_() for x in vectors]
    loss = siglip_lib.sigmoid_loss(*learned, *scalars, ids, ids)
    wanted = loss.detach(), *torch.autograd.grad(loss, learned)
    found = torch.stack(losses).mean(), *(torch.cat(x) / world for x in gradients)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (31, 200)])
def test_tiles_equal_the_librarys(size):
    own = notebooks_own("15", "my_choice", "my_tiles")
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8).numpy()
    picture, candidates = Image.fromarray(pixels), vl.candidate_resolutions(32)
    assert own["my_choice"](size, candidates) == vl.choose_resolution(size, candidates)
    mine = own["my_tiles"](picture, candidates, 32)
    torch.testing.assert_close(mine, vl.tile_picture(picture, size=32).tiles)


@pytest.mark.parametrize("grid", [(2, 4), (3, 5), (1, 1)])
def test_adaptor_equals_the_librarys(grid):
    mine = notebooks_own("15", "MyAdaptor")["MyAdaptor"](6, 5).double()
    library = vl.Adaptor(6, 5).double()
    mine.load_state_dict(randomized(library).state_dict(), strict=True)
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    found = []
    for adaptor in (mine, library):
        y = adaptor(x, grid)
        gradients = torch.autograd.grad(y.square().sum(), [*adaptor.parameters()])
        found.append({str(i): tensor for i, tensor in enumerate((y.detach(), *gradients))})
    assert_close(*found)


@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
def test_layout_equals_the_librarys(grid):
    my_lay_out = notebooks_own("15", "my_lay_out")["my_lay_out"]
    thumbnail, tiles = torch.randn(3, 4, 5), torch.randn(grid[0] * grid[1], 3, 4, 5)
    vectors = torch.randn(2, 5)
    library = vl.lay_out(thumbnail[None], tiles[None], grid, *vectors)[0]
    assert torch.equal(my_lay_out(thumbnail, tiles, grid, *vectors), library)


def test_rotation_equals_the_librarys():
    my_rotation = notebooks_own("15", "my_rotation")["my_rotation"]
    x = torch.randn(2, 300, 3, 8)
    for first in (0, 7):
        torch.testing.assert_close(my_rotation(x, first), rotate(x, first), atol=1e-4, rtol=0)


def test_captioner_equals_the_librarys():
    own = notebooks_own("15", "my_writing", "MyCaptioner", "my_cut")
    sizes = dict(vocab_size=9, width=16, depth=2, num_heads=2)
    tower = siglip_lib.VisionTransformer(
        64, 16, embed_dim=8, depth=1, num_heads=2, class_token=False, global_pool="map", num_classes=0
    )  # fmt: skip
    library = randomized(Captioner(tower, **sizes))
    mine = own["MyCaptioner"](tower, **sizes)
    mine.load_state_dict(library.state_dict(), strict=True)
    scenes, about = torch.randn(3, 3, 256, 256), torch.tensor([2, 0, 2, 1])
    thumbnail, tiles = cut_scenes(scenes, 2)
    torch.testing.assert_close(torch.stack([own["my_cut"](scene, 2) for scene in scenes]), tiles)
    answers = torch.tensor([[3, 4, 1, 1], [2, 1, 1, 1], [5, 6, 7, 1], [8, 8, 8, 8]])
    found = []
    for captioner in (mine, library):
        prompts = torch.ones(4, 5, dtype=torch.int64)
        loss = captioner(prompts, answers, thumbnail, tiles, (2, 2), about)
        learned = {n: p for n, p in captioner.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, [*learned.values()])
        found.append(dict(zip(learned, gradients, strict=True)) | {"loss": loss.detach()})
    assert_close(*found)
    before = torch.randn(20, 6, 16)
    written = library.language.write(before, 12)
    again = own["my_writing"](mine.language, before, 12)
    assert torch.equal(again[:, : written.shape[1]], written)
    assert (again[:, written.shape[1] :] == 1).all()


def test_every_component_that_a_notebook_builds_is_compared():
    compared = {("06", "MyMlp")} | {(number, mine) for number, mine, *_ in MODULES}
    compared |= {(number, name) for number, names in FUNCTIONS.items() for name in names}
    built = {
        (number, name)
        for number, notebook in BY_NUMBER.items()
        for name, source in definitions(notebook).items()
        if name.lower().startswith("my")
        and source.startswith(("def ", "class "))
        and name not in {exercise.answer for exercise in exercises(notebook)}
    }
    # compared in the notebook: torch's rule with torch's, six steps with those of ``Training``
    assert built - compared == {("02", "my_default"), ("10", "my_training")}
