"""What each head and block of an image tower does: where its tokens look, and what the tower does without it.

A head that looks at its own object may follow the object or the place. Two controls tell: hybrids of ``mix_patches``
keep places and no objects, scenes with a ``shift`` keep objects and move them off their places. And a head that looks
somewhere need not matter: for that, take it away. ``mean_ablation`` and ``activation_patching`` are for a ``with``
statement and change what any function makes of the tower inside it, by hooks that end with it, also in an error.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from siglip_lib.base.checks import check_tensor, count
from siglip_lib.evaluate.explain import check_tower, evaluation_mode, layer_weights
from siglip_lib.evaluate.maps import uncompiled
from siglip_lib.evaluate.pointing_game import inside_boxes
from siglip_lib.tower.vision_transformer import VisionTransformer


def own_object_share(
    tower: VisionTransformer, pixels: Tensor, boxes: Tensor
) -> tuple[Tensor, float]:
    """Return what share of their attention an object's patches give to that object, for each head of each block.

    A patch belongs to an object if its centre lies in the object's box; all such patches count alike.

    Args:
        tower: as for ``pool_attention``.
        pixels: pictures (B, C, H, W); the weights of all blocks and pictures are held at once, see ``attention_maps``.
        boxes: (B, objects, 4), as for ``pointing``.

    Returns:
        The shares, (blocks, heads), float32 on the CPU, and the share of a head that looks evenly at all tokens.

    Raises:
        TypeError, ValueError: as for ``pool_attention``; boxes of another shape, empty, outside the picture, or all
            without a patch.
    """
    with evaluation_mode(check_tower(tower, pixels), pixels) as tower:
        *blocks, _ = layer_weights(tower, pixels)
    check_tensor("boxes", boxes, (len(pixels), "objects", 4), empty=False)
    size = tuple(pixels.shape[2:])
    grid = tower.patch_embed.dynamic_feat_size(size)
    inside = inside_boxes(boxes.flatten(0, 1), size, grid).view(*boxes.shape[:2], -1)
    if not inside.any():
        raise ValueError("boxes hold no patch's centre")
    inside = inside.to(blocks[0])  # (B, objects, N)
    own = slice(tower.num_prefix_tokens, None)  # prefix tokens belong to no object
    kept = [
        torch.einsum("boq, bhqk, bok -> h", inside, weights[:, :, own, own], inside)
        for weights in blocks
    ]
    even = inside.sum(2).square().sum() / inside.sum() / blocks[0].shape[-1]
    return (torch.stack(kept) / inside.sum()).cpu(), even.item()


@contextmanager
def mean_ablation(
    tower: VisionTransformer, pixels: Tensor, block: int, head: int | None = None
) -> Iterator[None]:
    """Replace what a head or a block gives by its mean over pictures, token by token.

    The mean and not zero: later layers count on what a head gives to every picture, as on a bias. Zero takes that away
    too and leaves the tower with activations it never had; the mean takes away what differs between pictures.

    Args:
        tower: as for ``pool_attention``; ``tower`` itself is what changes, until the ``with`` statement ends.
        pixels: the pictures (B, C, H, W) to take the mean over, of the kind that the tower will be run on.
        block: which block, from 0 on.
        head: which of its heads: the slice of the projection's input that the head wrote. None for the block: what its
            attention and its MLP add to the tokens.

    Raises:
        TypeError, ValueError: as for ``pool_attention``; a block or head that there is not. In the ``with`` statement:
            ``ValueError`` for pictures of another number of tokens.

    Example:
        >>> with mean_ablation(tower, pixels, block=2, head=1):
        ...     without = tower(pixels)

    Source: Wang et al., Interpretability in the Wild (2023), where circuits are tested by it.
    """
    given = {part: x.mean(0, keepdim=True) for part, x in _run(tower, pixels, block, head).items()}
    with _replaced(tower, pixels, block, head, given):
        yield


@contextmanager
def activation_patching(
    tower: VisionTransformer, pixels: Tensor, block: int, head: int | None = None
) -> Iterator[None]:
    """Replace what a head or a block gives by what it gives for other pictures.

    If the answer to a picture becomes the answer to the other one, the head carries what they differ in.

    Args:
        tower: as for ``mean_ablation``.
        pixels: the pictures (B, C, H, W) to take activations of. The tower is then run on as many, each getting those
            of the picture at its place, or all getting those of a single one.
        block: as for ``mean_ablation``.
        head: as for ``mean_ablation``.

    Raises:
        TypeError, ValueError: as for ``mean_ablation``; in the ``with`` statement also for another number of pictures.

    Source: Zhang and Nanda, Towards Best Practices of Activation Patching in Language Models (2024): one run, here on
    ``pixels``, is cached, and the other run is patched with it.
    """
    with _replaced(tower, pixels, block, head, _run(tower, pixels, block, head)):
        yield


def _run(
    tower: VisionTransformer, pixels: Tensor, block: int, head: int | None
) -> dict[str, Tensor]:
    """Return what the head or the block's two branches give for the pictures, by part."""
    found: dict[str, Tensor] = {}

    def keep(part: str, x: Tensor) -> Tensor:
        found[part] = x
        return x

    inner = check_tower(tower, pixels)
    with (
        evaluation_mode(inner, pixels),
        torch.no_grad(),
        _edited(inner, block, head, keep),
    ):
        inner.forward_features(pixels)
    return found


@contextmanager
def _replaced(
    tower: VisionTransformer,
    pixels: Tensor,
    block: int,
    head: int | None,
    given: dict[str, Tensor],
) -> Iterator[None]:
    """Put the given activations, (1 or B, tokens, channels) by part, in the place of what the tower computes."""

    def replace(part: str, x: Tensor) -> Tensor:
        new = given[part]
        if new.shape[1:] != x.shape[1:] or len(new) not in (1, len(x)):
            raise ValueError(
                f"the tower runs on activations {tuple(x.shape)}; those to put there are {tuple(new.shape)}"
            )
        return new.to(x).expand_as(x)

    with _edited(check_tower(tower, pixels), block, head, replace):
        yield


@contextmanager
def _edited(
    tower: VisionTransformer, block: int, head: int | None, edit: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Let ``edit`` make something else of what a head or both branches of a block give, named by part."""
    if count("block", block) >= len(tower.blocks):
        raise ValueError(f"block={block} must be below {len(tower.blocks)}, the number of blocks")
    attention, mlp = tower.blocks[block].attn, tower.blocks[block].mlp
    if head is not None and count("head", head) >= attention.num_heads:
        raise ValueError(f"head={head} must be below {attention.num_heads}, the number of heads")
    with ExitStack() as hooks, uncompiled():
        if head is None:
            # each branch, not their sum: to put back what was there changes no bit
            for part, branch in (("attn", attention), ("mlp", mlp)):
                change = lambda _, inputs, out, part=part: edit(part, out)  # noqa: E731
                hooks.enter_context(branch.register_forward_hook(change))
        else:
            own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

            def change(_: object, inputs: tuple[Tensor]) -> Tensor:
                x = inputs[0].clone()  # (B, tokens, heads * head_dim)
                x[..., own] = edit("head", x[..., own])
                return x

            hooks.enter_context(attention.proj.register_forward_pre_hook(change))
        yield
