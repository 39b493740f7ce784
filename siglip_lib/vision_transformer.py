"""The vision transformer: patches, positions, blocks, a norm, and a head that pools."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip_lib.attention_pool import AttentionPoolLatent
from siglip_lib.block import Block
from siglip_lib.checks import count, positive_int, probability
from siglip_lib.layers import GELU_TANH, Mlp
from siglip_lib.patches import PatchDropout, PatchEmbed, resample_abs_pos_embed
from siglip_lib.trunc_normal import trunc_normal_
from siglip_lib.weight_init import init_rule, named_apply

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # SigLIP's, and big_vision's
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
        weight_init: ``""`` for timm's rule, ``jax``, ``jax_nlhb`` (its head starts at -log(num_classes)) or ``moco``,
            or ``skip`` for what PyTorch's layers start with.
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
        positive_int("depth", depth)
        count("reg_tokens", reg_tokens)
        count("num_classes", num_classes)
        probability("drop_path_rate", drop_path_rate)
        if count("num_recomputing_layers", num_recomputing_layers) > depth:
            raise ValueError(f"num_recomputing_layers={num_recomputing_layers}; depth is {depth}")
        norm_layer = norm_layer or LAYER_NORM
        act_layer = act_layer or GELU_TANH
        self.embed_dim = self.num_features = positive_int("embed_dim", embed_dim)
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
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew, by the rule that ``weight_init`` names."""
        if self.weight_init == "skip":
            return
        init = init_rule(self.weight_init, self.num_classes)
        trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        named_apply(init, self, include_root=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x) if self.is_last_stage and not self.ignore_head else x

    def forward_features(self, x: Tensor, seen: dict[str, Tensor] | None = None) -> Tensor:
        """Return the tokens (B, prefix + N, D) after the last norm; fill ``seen``, if given, with every stage."""

        def stage(name: str, x: Tensor) -> Tensor:
            if seen is not None:
                seen[name] = x
            return x

        if self.is_first_stage:
            grid = self.patch_embed.dynamic_feat_size(x.shape[2:])
            x = stage("patches", self.patch_embed(x))  # (B, N, D)
            x = stage("positions", self._add_positions(x, grid))  # (B, prefix + N, D)
            x = self.norm_pre(self.patch_drop(x))
        for i, block in enumerate(self.blocks):
            if isinstance(block, nn.Identity):  # another pipeline stage has it
                continue
            if i < self.num_recomputing_layers and self.training and torch.is_grad_enabled():
                x = stage(f"blocks.{i}", checkpoint(block, x, use_reentrant=False))
            else:
                x = stage(f"blocks.{i}", block(x))  # (B, prefix + N, D)
        return stage("norm", self.norm(x)) if self.is_last_stage else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, prefix + N, D) to (B, D), then classify unless ``pre_logits`` or there are no classes."""
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
        ``pooled`` (B, D), what the model returns where there are no classes; ``logits`` where there are some.
        """
        seen: dict[str, Tensor] = {}
        tokens = self.forward_features(x, seen)
        if self.is_last_stage and not self.ignore_head:
            seen["pooled"] = self.forward_head(tokens, pre_logits=True)
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
        """Return the patch tokens after some of the blocks.

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
        if not (self.is_first_stage and self.is_last_stage):
            raise ValueError("get_intermediate_layers needs the whole model, not a stage of it")
        depth = len(self.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else list(n)
        for i in [*wanted] or [depth]:
            if not -depth <= i < depth or (isinstance(n, int) and i < 0):
                raise ValueError(f"n={n!r} asks for blocks that are not there; there are {depth}")
        if reshape and self.training and self.patch_drop.prob:
            raise ValueError("reshape=True needs every patch; patch_drop_rate drops some")
        seen: dict[str, Tensor] = {}
        self.forward_features(x, seen)
        outputs = [seen[f"blocks.{i % depth}"] for i in wanted]
        outputs = [self.norm(out) if norm else out for out in outputs]
        prefixes = [out[:, : self.num_prefix_tokens] for out in outputs]
        patches = [out[:, self.num_prefix_tokens :] for out in outputs]
        if reshape:
            grid = self.patch_embed.dynamic_feat_size(x.shape[2:])
            patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
        return (
            tuple(zip(patches, prefixes, strict=True)) if return_prefix_tokens else tuple(patches)
        )

    def get_classifier(self) -> nn.Module:
        """Return the linear head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear head by a new one, and the pooling if ``global_pool`` is given.

        Raises:
            ValueError: ``map`` is asked for and the model was built without it, ``token`` without a class token, or the
                model is a stage of a pipeline that has no head.
        """
        if not self.is_last_stage:
            raise ValueError("only the last stage of a pipeline has a classifier")
        count("num_classes", num_classes)
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

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add positions to patches (B, N, D) and put class and register tokens before them."""
        positions = self.pos_embed
        if self.dynamic_img_size:
            embedded_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            positions = resample_abs_pos_embed(
                positions, grid, self.patch_embed.grid_size, embedded_prefix
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
