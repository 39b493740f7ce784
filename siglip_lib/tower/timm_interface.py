"""What timm's vision transformers offer besides running: features of blocks, other heads and sizes, pipelines."""

from collections.abc import Sequence
from numbers import Integral
from typing import Self

from torch import Tensor, nn

from siglip_lib.base.checks import count, one_of
from siglip_lib.tower.patches import resample_abs_pos_embed


class TimmInterface(nn.Module):
    """Methods of ``VisionTransformer`` with timm's names, arguments and results. They change or read what it builds."""

    @property
    def feature_info(self) -> list[dict[str, object]]:
        """What ``forward_intermediates`` gives for each block, in timm's form: module, channels, pixels of a patch."""
        each = {"num_chs": self.embed_dim, "reduction": self._reduction}
        return [{"module": f"blocks.{i}", **each} for i in range(len(self.blocks))]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Return the patch tokens after some of the blocks, in the order asked for.

        timm gives them in the order of the blocks, as ``forward_intermediates`` does.

        Args:
            x: pictures (B, C, H, W).
            n: the last n blocks, or a sequence of their numbers, negative ones from the last.
            reshape: give (B, D, rows, columns), the grid being that of this input, and not (B, N, D).
            return_prefix_tokens: give pairs (patch tokens, class and register tokens (B, prefix, D)).
            norm: apply the last norm.

        Raises:
            ValueError: a block that is not there, a grid while patches are being dropped, or the model is one stage of
                a pipeline.
        """
        self._check_features("get_intermediate_layers", "reshape=True" if reshape else None)
        numbers = self._block_numbers("n", n)
        pairs, _ = self._after_blocks(x, numbers, max(numbers) + 1, norm, reshape)
        return tuple(pairs if return_prefix_tokens else (patches for patches, _ in pairs))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> object:
        """Return the tokens after the last norm, and the patch tokens after some of the blocks, as timm does.

        Args:
            x: pictures (B, C, H, W).
            indices: the last so many blocks, or a sequence of their numbers; all if None. The order is the blocks'.
            return_prefix_tokens: give pairs (patch tokens, class and register tokens), if the model has such tokens.
            norm: apply the last norm to the patch tokens too.
            stop_early: end with the last block asked for; the first result is then what that one gave, normalised.
            output_fmt: ``NCHW`` for patch tokens (B, D, rows, columns), ``NLC`` for (B, N, D).
            intermediates_only: return only the list.
            output_dict: return a dict of ``image_features``, ``image_intermediates`` and, if asked for and there,
                ``image_intermediates_prefix``.

        Returns:
            (tokens (B, prefix + N, D), list of patch tokens), the list alone, or the dict.

        Raises:
            ValueError: as for ``get_intermediate_layers``, or another ``output_fmt``.

        Source: timm, models/vision_transformer.py (names and results).
        """
        as_grid = one_of("output_fmt", output_fmt, ("NCHW", "NLC")) == "NCHW"
        self._check_features("forward_intermediates", "output_fmt='NCHW'" if as_grid else None)
        depth = len(self.blocks)
        numbers = sorted({*self._block_numbers("indices", depth if indices is None else indices)})
        end = numbers[-1] + 1 if stop_early else depth
        pairs, last = self._after_blocks(x, numbers, end, norm, as_grid)
        patches = [patches for patches, _ in pairs]
        with_prefixes = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            parts = {"image_intermediates": patches}
            if with_prefixes:
                parts["image_intermediates_prefix"] = [prefix for _, prefix in pairs]
            return parts if intermediates_only else parts | {"image_features": self.norm(last)}
        found = pairs if with_prefixes else patches
        return found if intermediates_only else (self.norm(last), found)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take pictures of another size from now on, and resample the position embeddings to their grid.

        ``img_size`` is height and width in pixels, or one number for both. Where the grid changes, ``pos_embed`` is a
        new parameter, which an optimizer made before does not know. Unlike timm's, this leaves the patches' size alone.

        Raises:
            ValueError: the size holds no patch, or the model is a stage of a pipeline that takes no pictures.
        """
        check_stage(self.is_first_stage, "set_input_size", "the first stage of a pipeline")
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        new = self.patch_embed.grid_size
        if new != old:
            positions = self.pos_embed.detach()
            positions = resample_abs_pos_embed(positions, new, old, self._prefix_with_position)
            self.pos_embed = nn.Parameter(positions, self.pos_embed.requires_grad)

    def get_classifier(self) -> nn.Module:
        """Return the linear head."""
        check_stage(self.is_last_stage, "get_classifier", "the last stage of a pipeline")
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear head by a new one, and the pooling if ``global_pool`` is given.

        Raises:
            ValueError: ``map`` is asked for and the model was built without it, ``token`` without a class token, or the
                model is a stage of a pipeline that has no head.
        """
        check_stage(self.is_last_stage, "reset_classifier", "the last stage of a pipeline")
        num_classes = count("num_classes", num_classes)
        global_pool = self.global_pool if global_pool is None else global_pool
        check_pool(global_pool, self.has_class_token)
        if global_pool == "map" and self.attn_pool is None:
            raise ValueError("global_pool='map' needs a model that was built with it")
        if global_pool != "map":
            self.attn_pool = None
        self.global_pool, self.num_classes = global_pool, num_classes
        some = next(self.parameters())
        like = dict(device=some.device, dtype=some.dtype)
        self.head = nn.Linear(self.embed_dim, num_classes, **like) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that an optimizer should not shrink."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return patterns that sort parameters by depth, in timm's form, for learning rates that differ by layer."""
        blocks = r"^blocks\.(\d+)"
        return {
            "stem": r"^cls_token|^reg_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": blocks if coarse else [(blocks, None), (r"^norm\.", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass, or none; ``num_recomputing_layers`` sets a part of them."""
        self.num_recomputing_layers = len(self.blocks) if enable else 0

    def to_pipeline(
        self, pp_size: int, pp_rank: int, pp_splits: Sequence[int] | None = None
    ) -> Self:
        """Keep one stage of a pipeline, in place, and return the model: what it does not need becomes None or Identity.

        Parameters keep their names, so the stages' state dicts together are the whole model's. The first stage takes
        pictures, the others tokens; the last returns what the model does, the others tokens.

        Args:
            pp_size: number of stages.
            pp_rank: which of them this is, from 0.
            pp_splits: blocks of each stage; as even as possible if None, the first stages having one more.

        Raises:
            ValueError: the rank is out of range, the splits do not add up to the depth, or the model is a stage
                already.
        """
        depth = len(self.blocks)
        if not self.is_first_stage or not self.is_last_stage:
            raise ValueError("the model is one stage of a pipeline already")
        if not 1 <= pp_size <= depth or not 0 <= pp_rank < pp_size:
            allowed = f"1 to {depth} and pp_rank={pp_rank} in 0 to {pp_size - 1}"
            raise ValueError(f"pp_size={pp_size} must lie in {allowed}")
        even = [depth // pp_size + (i < depth % pp_size) for i in range(pp_size)]
        splits = even if pp_splits is None else list(pp_splits)
        if len(splits) != pp_size or sum(splits) != depth or min(splits) < 0:
            raise ValueError(f"pp_splits={splits} must be {pp_size} numbers that add up to {depth}")
        start = sum(splits[:pp_rank])
        for i in {*range(depth)} - {*range(start, start + splits[pp_rank])}:
            self.blocks[i] = nn.Identity()
        self.is_first_stage, self.is_last_stage = pp_rank == 0, pp_rank == pp_size - 1
        if not self.is_first_stage:
            self.patch_embed = self.cls_token = self.reg_token = self.pos_embed = None
            self.norm_pre = nn.Identity()
        if not self.is_last_stage:
            self.attn_pool = None
            self.norm = self.fc_norm = self.head = nn.Identity()
        return self

    def _check_features(self, method: str, asks_for_grid: str | None) -> None:
        """Raise a ValueError on a stage of a pipeline, and where a grid is asked for while patches are dropped."""
        whole = self.is_first_stage and self.is_last_stage
        check_stage(whole, method, "the whole model, not a stage of it")
        if asks_for_grid and self.patch_drop.training and self.patch_drop.prob:
            raise ValueError(f"{asks_for_grid} needs every patch; patch_drop_rate drops some")

    def _block_numbers(self, name: str, asked: int | Sequence[int]) -> list[int]:
        """Return the numbers of the last ``asked`` blocks, or of those in a sequence, all counted from 0."""
        depth = len(self.blocks)
        numbers = list(range(-asked, 0) if isinstance(asked, Integral) else asked)
        if not numbers or not all(-depth <= i < depth for i in numbers):
            asked = f"{name}={asked!r} asks for blocks that are not there"
            raise ValueError(f"{asked}; there are {depth}")
        return [i % depth for i in numbers]

    def _after_blocks(
        self, x: Tensor, numbers: list[int], end: int, norm: bool, as_grid: bool
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Run ``end`` blocks; return patch and prefix tokens after those of these numbers, and the last tokens."""
        seen: dict[str, Tensor] = {}
        last = self._run_blocks(x, end, seen)
        grid, num_prefix = self.patch_embed.dynamic_feat_size(x.shape[2:]), self.num_prefix_tokens

        def parts(tokens: Tensor) -> tuple[Tensor, Tensor]:
            tokens = self.norm(tokens) if norm else tokens
            prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
            if as_grid:
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            return patches, prefix

        return [parts(seen[f"blocks.{i}"]) for i in numbers], last


def check_stage(has: bool, method: str, part: str) -> None:
    """Raise a ValueError if a stage of a pipeline lacks the part of the model that a method needs."""
    if not has:
        raise ValueError(f"{method} needs {part}")


def check_pool(global_pool: str, has_class_token: bool) -> None:
    """Raise a ValueError if a pooling is unknown or needs a class token that is not there."""
    pools = ("token", "avg", "map", "")
    if one_of("global_pool", global_pool, pools) == "token" and not has_class_token:
        raise ValueError("global_pool='token' needs class_token=True")
