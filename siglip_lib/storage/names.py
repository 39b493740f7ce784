"""Whose names a checkpoint's tensors have, timm's or transformers', and from the ones to the others."""

from collections.abc import Iterable

from torch import Tensor, nn

from siglip_lib.base.checks import join_names

# Every tower has one of these tensors; what stands before the name is the tower's prefix.
_MARKS = {"patch_embed.proj.weight": "timm", "embeddings.patch_embedding.weight": "transformers"}

# What torch.compile (the first), DataParallel and DistributedDataParallel call what they wrap.
_WRAPPERS = ("_orig_mod", "module")

# timm's names and transformers', in the order in which they are replaced; one that starts with a
# dot stands anywhere, others at the start.
_BOTH_TOWERS = (
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".self_attn.proj.", ".self_attn.out_proj."),
)

IMAGE_TOWER = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    *_BOTH_TOWERS,
    ("norm.", "post_layernorm."),
    ("attn_pool.latent", "head.probe"),
    ("attn_pool.q.", "head.attention.in_proj_"),
    ("attn_pool.kv.", "head.attention.in_proj_"),
    ("attn_pool.proj.", "head.attention.out_proj."),
    ("attn_pool.norm.", "head.layernorm."),
    ("attn_pool.mlp.", "head.mlp."),
)

TEXT_TOWER = (
    ("token_embed.", "embeddings.token_embedding."),
    *_BOTH_TOWERS,
    ("norm.", "final_layer_norm."),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of what torch.compile, DataParallel and DistributedDataParallel made of it."""
    parts = dict(model.named_children())
    for name in _WRAPPERS:
        if parts.keys() == {name}:  # what holds more is a model of its own
            return unwrapped(parts[name])
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, the same ones whether parts of the model are compiled or not."""
    state = without_wrappers(model.state_dict(), "model")
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):  # a DTensor
        raise ValueError(
            "model is sharded over processes. Load weights before it is sharded; save what "
            "siglip_lib.train.stored.whole_model(training) gathers, or torch's get_model_state_dict with "
            "full_state_dict=True"
        )
    return state


def without_wrappers(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors by the names that they have where nothing is compiled or wrapped."""
    plain = {_plain(name): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise ValueError(
            f"{where} holds the same tensors twice, wrapped (_orig_mod, module) and not"
        )
    return plain


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def tower_of(names: Iterable[str], where: str) -> tuple[str, str]:
    """Whose names these are, and the prefix of the image tower."""
    found = marked_towers(names)
    if len(found) != 1:
        raise ValueError(
            f"{where} holds {len(found)} image towers; it must be one, with a tensor {' or '.join(_MARKS)}"
        )
    return found[0]


def marked_towers(names: Iterable[str]) -> list[tuple[str, str]]:
    """Of every image tower whose it is, and its prefix."""
    return [
        (layout, name[: name.rindex(mark.split(".")[0])])
        for name in names
        for mark, layout in _MARKS.items()
        if _plain(name).endswith(mark)
    ]


def under_transformers_names(
    state: dict[str, Tensor], names: tuple[tuple[str, str], ...]
) -> dict[str, list[Tensor]]:
    """Views of timm's tensors by transformers' names; where one there is two here, both, in the order of their rows.

    What transformers lacks keeps its name or gets one that transformers lacks too. ``names`` are those of one tower,
    ``IMAGE_TOWER`` or ``TEXT_TOWER``.
    """
    found: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        views = {name: tensor[0] if name == "pos_embed" else tensor}  # theirs is (N, D)
        if ".attn.qkv." in name:
            parts = [name.replace("qkv", f"{part}_proj") for part in "qkv"]
            views = dict(zip(parts, tensor.chunk(3), strict=True))
        for renamed, view in views.items():
            for old, new in names:
                if old.startswith("."):
                    renamed = renamed.replace(old, new)
                elif renamed.startswith(old):
                    renamed = new + renamed.removeprefix(old)
            found.setdefault(renamed, []).append(view)
    return found


def check_transformers_has(state: dict[str, Tensor], depth: int) -> None:
    """Raise ValueError for a tower, under timm's names, that is not what transformers builds."""
    pooled = "attn_pool.latent" in state
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    pool = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2") if pooled else ()
    layers = ["patch_embed.proj", "norm", *(f"attn_pool.{layer}" for layer in pool)]
    layers += [f"blocks.{i}.{layer}" for i in range(depth) for layer in block]
    theirs = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    theirs |= {"pos_embed", "attn_pool.latent"} if pooled else {"pos_embed"}
    if differs := state.keys() ^ theirs:
        raise ValueError(
            "transformers' SiglipVisionModel has no class token, no LayerScale, no qk-norm, no classifier, and a bias "
            f"everywhere; it differs in {join_names(differs)}"
        )
