"""The vision transformer: patches, positions, blocks, a norm, and a head that pools."""

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip_lib.base.checks import check_tokens, count, pair, plain_shape, positive_int, probability
from siglip_lib.tower.attention_pool import AttentionPoolLatent
from siglip_lib.tower.block import Block
from siglip_lib.tower.layers import GELU_TANH, LAYER_NORM, Mlp
from siglip_lib.tower.patches import PatchDropout, PatchEmbed, resample_abs_pos_embed
from siglip_lib.tower.trunc_normal import trunc_normal_
from siglip_lib.tower.weight_init import init_rule, named_apply, reset_parameters

POOLS = ("token", "avg", "map", "")


class VisionTransformer(nn.Module):
    """Vision transformer with the arguments and parameter names of timm's.

    Args:
        img_size: height and width of the pictures in pixels, or one number for both.
        patch_size: height and width of a patch.
        in_chans: colour channels C of a picture.
        num_classes: outputs of the linear head; 0 for none.
        global_pool: what becomes of the tokens in the head: ``token`` takes the class token, ``avg`` the mean of the
            patches, ``map`` pools them by attention, the empty text keeps all tokens.
        embed_dim: channels D of a token.
        depth: number of blocks.
        num_heads: heads of each attention; divides ``embed_dim``.
        mlp_ratio: hidden channels of an MLP over D, rounded down.
        qkv_bias: bias in the q, k, v projections of the blocks.
        qk_norm: normalise q and k in each head of the blocks.
        init_values: start of the LayerScales; None for none.
        class_token: put a learned token before the patches.
        no_embed_class: position embeddings for the patches alone, not for class and register tokens.
        reg_tokens: number of learned register tokens, after the class token.
        pre_norm: a norm before the blocks; the patch embedding then has no bias.
        fc_norm: the last norm after the pooling and not before it; None for "if the pooling is avg".
        dynamic_img_size: take pictures of other sizes, and resample the position embeddings to them.
        dynamic_img_pad: fill pictures up with zeros to whole patches.
        drop_rate, pos_drop_rate, patch_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the linear head, after
            the positions, of whole patches, of projections and MLPs, and of attention weights; each in [0, 1).
        drop_path_rate: probability of dropping a branch in the last block; it grows linearly from 0 in the first.
        weight_init: ``""`` for timm's rule, ``jax`` for what timm made of big_vision's, ``jax_nlhb`` (its head starts
            at -log(num_classes)), ``big_vision`` for big_vision's own, ``moco``, or ``skip`` for what PyTorch's layers
            start with, and zeros for positions and tokens.
        embed_layer, block_fn, mlp_layer: classes of these parts, called with the arguments of the library's own.
        norm_layer: class of the norms; LayerNorm with an epsilon of 1e-6 if None.
        act_layer: class of the activations; GELU in its tanh approximation, SigLIP's, if None. timm's default is
            ``nn.GELU``, the exact one.
        ignore_head: return the tokens, normalised and not pooled, as DeepSeek-VL2 takes them.
        deterministic: the same bits on every run, backward pass included.
        num_recomputing_layers: blocks, counted from the first, that keep only their input while training and compute
            the rest again in the backward pass.
        pool_act_layer: activation of the pooling head's MLP; ``act_layer`` if None. Weights whose blocks were trained
            with tanh and whose head with erf, as DeepSeek-VL2's code runs them, need ``nn.GELU`` here.
        backend: attention backend, see ``Attention``.

    Shapes: pictures (B, C, H, W) to (B, num_classes); to (B, D) without classes; to (B, prefix + N, D) without pooling.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), section 3.1; registers: Darcet et al., Vision
    Transformers Need Registers (2024), section 2.2.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        block_fn: Callable[..., nn.Module] = Block,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        ignore_head: bool = False,
        deterministic: bool = False,
        num_recomputing_layers: int = 0,
        *,
        pool_act_layer: Callable[[], nn.Module] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        depth, embed_dim = positive_int("depth", depth), positive_int("embed_dim", embed_dim)
        reg_tokens, num_classes = count("reg_tokens", reg_tokens), count("num_classes", num_classes)
        drop_path_rate = probability("drop_path_rate", drop_path_rate)
        num_recomputing_layers = count("num_recomputing_layers", num_recomputing_layers)
        if num_recomputing_layers > depth:
            raise ValueError(f"num_recomputing_layers={num_recomputing_layers}; depth is {depth}")
        norm_layer = norm_layer or LAYER_NORM
        act_layer = act_layer or GELU_TANH
        # timm's names
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self._reduction = max(pair("patch_size", patch_size))
        self.has_class_token = class_token
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.dynamic_img_size = dynamic_img_size
        self.ignore_head = ignore_head
        self.num_recomputing_layers = num_recomputing_layers
        self.weight_init = weight_init
        self.is_first_stage = self.is_last_stage = True
        self._check_pool(global_pool)
        self.global_pool = global_pool

        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
        )
        embedded = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, embedded, embed_dim))
        self.pos_drop = nn.Dropout(probability("pos_drop_rate", pos_drop_rate))
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens)
        self.norm_pre = norm_layer(embed_dim) if pre_norm else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                block_fn(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    init_values=init_values,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    mlp_layer=mlp_layer,
                    deterministic=deterministic,
                    backend=backend,
                )
                for i in range(depth)
            )
        )
        norm_after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.Identity() if norm_after_pool else norm_layer(embed_dim)
        self.attn_pool = None
        if global_pool == "map":
            self.attn_pool = AttentionPoolLatent(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                norm_layer=norm_layer,
                act_layer=pool_act_layer or act_layer,
                deterministic=deterministic,
                backend=backend,
            )
        self.fc_norm = norm_layer(embed_dim) if norm_after_pool else nn.Identity()
        self.head_drop = nn.Dropout(probability("drop_rate", drop_rate))
        self.num_classes = num_classes
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._apply_rule()

    def init_weights(self) -> None:
        """Draw all weights anew, as building the model does: the same for the same seed.

        Also those of a model that was built on the ``meta`` device and then got memory by ``to_empty``.

        Raises:
            TypeError: a part has weights of its own and no method ``reset_parameters`` or ``init_weights``.
        """
        reset_parameters(self)
        for own in (self.pos_embed, self.cls_token, self.reg_token):
            if own is not None:
                nn.init.zeros_(own)
        self._apply_rule()

    def _apply_rule(self) -> None:
        """Change what the layers and the zeros of this class start with by the rule that ``weight_init`` names."""
        if self.weight_init == "skip":
            return
        init = init_rule(self.weight_init, self.num_classes)
        by_big_vision = self.weight_init == "big_vision"
        if self.pos_embed is not None and by_big_vision:
            nn.init.normal_(self.pos_embed, std=self.embed_dim**-0.5)
        elif self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None and not by_big_vision:  # there it stays zero
            nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        named_apply(init, self, include_root=False)

    @property
    def feature_info(self) -> list[dict[str, object]]:
        """What ``forward_intermediates`` gives for each block, in timm's form: module, channels, pixels of a patch."""
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": self._reduction}
            for i in range(len(self.blocks))
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x) if self.is_last_stage and not self.ignore_head else x

    def forward_features(self, x: Tensor, seen: dict[str, Tensor] | None = None) -> Tensor:
        """Return the tokens (B, prefix + N, D) after the last norm; fill ``seen``, if given, with every stage."""
        x = self._through_blocks(x, len(self.blocks), seen)
        if not self.is_last_stage:
            return x
        x = self.norm(x)
        if seen is not None:
            seen["norm"] = x
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, prefix + N, D) to (B, D), then classify unless ``pre_logits`` or there are no classes."""
        _need(self.is_last_stage, "forward_head", "the last stage of a pipeline")
        check_tokens("x", x, self.embed_dim)
        if self.global_pool == "map":
            x = self.attn_pool(x[:, self.num_prefix_tokens :])
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, 0]
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def intermediates(self, x: Tensor) -> dict[str, Tensor]:
        """Run the model and return what every stage gave, in order, by name.

        Names: ``patches`` (B, N, D); ``positions``, ``blocks.0`` to the last block, ``norm``, each (B, prefix + N, D);
        ``pooled`` (B, D), what the model returns where there are no classes; ``logits`` where there are some. A stage
        of a pipeline gives those that it has.
        """
        seen: dict[str, Tensor] = {}
        x = self.forward_features(x, seen)
        if self.is_last_stage and not self.ignore_head:
            seen["pooled"] = self.forward_head(x, pre_logits=True)
            if self.num_classes:
                seen["logits"] = self.head(seen["pooled"])
        return seen

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
        self._need_whole("get_intermediate_layers")
        numbers = self._block_numbers("n", n)
        if reshape:
            self._check_grid("reshape=True")
        seen: dict[str, Tensor] = {}
        self._through_blocks(x, max(numbers) + 1, seen)
        outputs = [seen[f"blocks.{i}"] for i in numbers]
        patches, prefixes = self._split(outputs, norm, x if reshape else None)
        return (
            tuple(zip(patches, prefixes, strict=True)) if return_prefix_tokens else tuple(patches)
        )

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
        self._need_whole("forward_intermediates")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; allowed are 'NCHW', 'NLC'")
        if output_fmt == "NCHW":
            self._check_grid("output_fmt='NCHW'")
        depth = len(self.blocks)
        numbers = {*self._block_numbers("indices", depth if indices is None else indices)}
        seen: dict[str, Tensor] = {}
        last = self._through_blocks(x, max(numbers) + 1 if stop_early else depth, seen)
        outputs = [seen[f"blocks.{i}"] for i in sorted(numbers)]
        found, prefixes = self._split(outputs, norm, x if output_fmt == "NCHW" else None)
        with_prefixes = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            parts = {"image_intermediates": found}
            if with_prefixes:
                parts["image_intermediates_prefix"] = prefixes
            return parts if intermediates_only else parts | {"image_features": self.norm(last)}
        if with_prefixes:
            found = list(zip(found, prefixes, strict=True))
        return found if intermediates_only else (self.norm(last), found)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take pictures of another size from now on, and resample the position embeddings to their grid.

        Where the grid changes, ``pos_embed`` is a new parameter, which an optimizer made before does not know. Unlike
        timm's, this leaves the patches' size alone.

        Args:
            img_size: height and width of the pictures in pixels, or one number for both.

        Raises:
            ValueError: the size holds no patch, or the model is a stage of a pipeline that takes no pictures.
        """
        _need(self.is_first_stage, "set_input_size", "the first stage of a pipeline")
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        new = self.patch_embed.grid_size
        if new != old:
            positions = resample_abs_pos_embed(
                self.pos_embed.detach(), new, old, self._num_embedded_prefix
            )
            self.pos_embed = nn.Parameter(positions, self.pos_embed.requires_grad)

    def get_classifier(self) -> nn.Module:
        """Return the linear head."""
        _need(self.is_last_stage, "get_classifier", "the last stage of a pipeline")
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear head by a new one, and the pooling if ``global_pool`` is given.

        Raises:
            ValueError: ``map`` is asked for and the model was built without it, ``token`` without a class token, or the
                model is a stage of a pipeline that has no head.
        """
        _need(self.is_last_stage, "reset_classifier", "the last stage of a pipeline")
        num_classes = count("num_classes", num_classes)
        if global_pool is not None:
            self._check_pool(global_pool)
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError("global_pool='map' needs a model that was built with it")
            self.global_pool = global_pool
            if global_pool != "map":
                self.attn_pool = None
        self.num_classes = num_classes
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
    ) -> "VisionTransformer":
        """Keep one stage of a pipeline, in place: what it does not need becomes None or Identity.

        Parameters keep their names, so the stages' state dicts together are the whole model's. The first stage takes
        pictures, the others tokens; the last returns what the model does, the others tokens.

        Args:
            pp_size: number of stages.
            pp_rank: which of them this is, from 0.
            pp_splits: blocks of each stage; as even as possible if None, the first stages having one more.

        Returns:
            The model itself.

        Raises:
            ValueError: the rank is out of range, the splits do not add up to the depth, or the model is a stage
                already.
        """
        depth = len(self.blocks)
        if not self.is_first_stage or not self.is_last_stage:
            raise ValueError("the model is one stage of a pipeline already")
        if not 1 <= pp_size <= depth or not 0 <= pp_rank < pp_size:
            raise ValueError(
                f"pp_size={pp_size} must lie in 1 to {depth} and pp_rank={pp_rank} in 0 to {pp_size - 1}"
            )
        even = [depth // pp_size + (i < depth % pp_size) for i in range(pp_size)]
        splits = even if pp_splits is None else list(pp_splits)
        if len(splits) != pp_size or sum(splits) != depth or min(splits) < 0:
            raise ValueError(f"pp_splits={splits} must be {pp_size} numbers that add up to {depth}")
        start = sum(splits[:pp_rank])
        for i in range(depth):
            if not start <= i < start + splits[pp_rank]:
                self.blocks[i] = nn.Identity()
        self.is_first_stage, self.is_last_stage = pp_rank == 0, pp_rank == pp_size - 1
        if not self.is_first_stage:
            self.patch_embed = self.cls_token = self.reg_token = self.pos_embed = None
            self.norm_pre = nn.Identity()
        if not self.is_last_stage:
            self.attn_pool = None
            self.norm = self.fc_norm = self.head = nn.Identity()
        return self

    def _through_blocks(self, x: Tensor, end: int, seen: dict[str, Tensor] | None) -> Tensor:
        """Embed pictures and run the first ``end`` blocks; fill ``seen``, if given, with every stage."""

        def stage(name: str, x: Tensor) -> Tensor:
            if seen is not None:
                seen[name] = x
            return x

        if self.is_first_stage:
            patches = stage("patches", self.patch_embed(x))  # (B, N, D)
            grid = self.patch_embed.dynamic_feat_size(plain_shape(x)[2:])
            x = stage("positions", self._add_positions(patches, grid))  # (B, prefix + N, D)
            x = self.norm_pre(self.patch_drop(x))
        else:
            check_tokens("x", x, self.embed_dim)
        for i, block in enumerate(self.blocks):
            if i == end:
                break
            if isinstance(block, nn.Identity):  # another pipeline stage has it
                continue
            if i < self.num_recomputing_layers and self.training and torch.is_grad_enabled():
                x = stage(f"blocks.{i}", checkpoint(block, x, use_reentrant=False))
            else:
                x = stage(f"blocks.{i}", block(x))  # (B, prefix + N, D)
        return x

    @property
    def _num_embedded_prefix(self) -> int:
        """How many of the position embeddings belong to class and register tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add positions to patches (B, N, D) and put class and register tokens before them."""
        positions = self.pos_embed
        if self.dynamic_img_size:
            positions = resample_abs_pos_embed(
                positions, grid, self.patch_embed.grid_size, self._num_embedded_prefix
            )
        prefix = [t for t in (self.cls_token, self.reg_token) if t is not None]
        prefix = [token.expand(x.shape[0], -1, -1) for token in prefix]
        if self.no_embed_class:
            return self.pos_drop(
                torch.cat([*prefix, x + positions], dim=1) if prefix else x + positions
            )
        return self.pos_drop((torch.cat([*prefix, x], dim=1) if prefix else x) + positions)

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool={global_pool!r} is unknown; allowed are {POOLS}")
        if global_pool == "token" and not self.has_class_token:
            raise ValueError("global_pool='token' needs class_token=True")

    def _block_numbers(self, name: str, asked: int | Sequence[int]) -> list[int]:
        """Return the numbers of the last ``asked`` blocks, or of those in a sequence, all counted from 0."""
        depth = len(self.blocks)
        last = isinstance(asked, Integral)
        numbers = list(range(depth - asked, depth) if last else asked)
        if not numbers or not all((0 if last else -depth) <= i < depth for i in numbers):
            raise ValueError(
                f"{name}={asked!r} asks for blocks that are not there; there are {depth}"
            )
        return [i % depth for i in numbers]

    def _split(
        self, outputs: list[Tensor], norm: bool, pictures: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Split outputs of blocks into patch tokens, on the grid of ``pictures`` if given, and prefix tokens."""
        outputs = [self.norm(out) if norm else out for out in outputs]
        prefixes = [out[:, : self.num_prefix_tokens] for out in outputs]
        patches = [out[:, self.num_prefix_tokens :] for out in outputs]
        if pictures is not None:
            grid = self.patch_embed.dynamic_feat_size(pictures.shape[2:])
            patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
        return patches, prefixes

    def _check_grid(self, why: str) -> None:
        if self.patch_drop.training and self.patch_drop.prob:
            raise ValueError(f"{why} needs every patch; patch_drop_rate drops some")

    def _need_whole(self, method: str) -> None:
        whole = self.is_first_stage and self.is_last_stage
        _need(whole, method, "the whole model, not a stage of it")


def _need(there: bool, method: str, part: str) -> None:
    if not there:
        raise ValueError(f"{method} needs {part}")
