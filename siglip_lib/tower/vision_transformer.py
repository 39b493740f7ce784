"""The vision transformer: patches, positions, blocks, a norm, and a head that pools."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip_lib.base.checks import check_tensor, count, pair, plain_shape, positive_int, probability
from siglip_lib.tower.attention_pool import AttentionPoolLatent
from siglip_lib.tower.block import Block
from siglip_lib.tower.layers import GELU_TANH, LAYER_NORM, Mlp
from siglip_lib.tower.patches import PatchDropout, PatchEmbed, resample_abs_pos_embed
from siglip_lib.tower.timm_interface import TimmInterface, check_pool, check_stage
from siglip_lib.tower.trunc_normal import trunc_normal_
from siglip_lib.tower.weight_init import init_rule, named_apply, reset_parameters


class VisionTransformer(TimmInterface):
    """Vision transformer with the arguments and parameter names of timm's.

    Args:
        img_size: height and width of the pictures in pixels, or one number for both.
        patch_size: height and width of a patch.
        in_chans: colour channels C of a picture.
        num_classes: outputs of the linear head; 0 for none.
        global_pool: what becomes of the tokens in the head: ``token`` takes the class token, ``avg`` the mean of the
            patches, ``map`` pools them by attention, the empty string keeps all tokens.
        embed_dim: channels D of a token.
        depth: number of blocks.
        num_heads: heads of each attention; divides ``embed_dim``.
        mlp_ratio: hidden channels of an MLP over D, rounded down.
        qkv_bias, qk_norm: of the blocks, see ``Attention``.
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
        deterministic, backend: see ``Attention``.
        num_recomputing_layers: blocks, counted from the first, that keep only their input while training and compute
            the rest again in the backward pass.
        pool_act_layer: activation of the pooling head's MLP; ``act_layer`` if None. Weights whose blocks were trained
            with tanh and whose head with erf, as DeepSeek-VL2's code builds them, need ``nn.GELU`` here.

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
        norm_layer, act_layer = norm_layer or LAYER_NORM, act_layer or GELU_TANH
        # timm's names
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self._reduction = max(pair("patch_size", patch_size))
        self.has_class_token = class_token
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self._prefix_with_position = 0 if no_embed_class else self.num_prefix_tokens
        self.dynamic_img_size = dynamic_img_size
        self.ignore_head = ignore_head
        self.num_recomputing_layers = num_recomputing_layers
        self.weight_init = weight_init
        self.is_first_stage = self.is_last_stage = True
        check_pool(global_pool, class_token)
        self.global_pool = global_pool

        pictures = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans)
        sizes = dict(strict_img_size=not dynamic_img_size, dynamic_img_pad=dynamic_img_pad)
        self.patch_embed = embed_layer(**pictures, **sizes, embed_dim=embed_dim, bias=not pre_norm)
        embedded = self._prefix_with_position + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, embedded, embed_dim))
        self.pos_drop = nn.Dropout(probability("pos_drop_rate", pos_drop_rate))
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens)
        self.norm_pre = norm_layer(embed_dim) if pre_norm else nn.Identity()
        # what blocks and pooling head have in common, then what is the blocks' alone
        both = dict(num_heads=num_heads, mlp_ratio=mlp_ratio, norm_layer=norm_layer)
        both |= dict(deterministic=deterministic, backend=backend)
        own = dict(qkv_bias=qkv_bias, qk_norm=qk_norm, init_values=init_values)
        own |= dict(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate)
        own |= dict(act_layer=act_layer, mlp_layer=mlp_layer)
        drop_paths = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        blocks = [block_fn(dim=embed_dim, drop_path=p, **own, **both) for p in drop_paths]
        self.blocks = nn.Sequential(*blocks)
        norm_after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = nn.Identity() if norm_after_pool else norm_layer(embed_dim)
        self.attn_pool = None
        if global_pool == "map":
            pool_act_layer = pool_act_layer or act_layer
            self.attn_pool = AttentionPoolLatent(embed_dim, act_layer=pool_act_layer, **both)
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

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x) if self.is_last_stage and not self.ignore_head else x

    def forward_features(self, x: Tensor, seen: dict[str, Tensor] | None = None) -> Tensor:
        """Return the tokens (B, prefix + N, D) after the last norm; store every stage in ``seen``, if given."""
        x = self._run_blocks(x, len(self.blocks), seen)
        return _stored(seen, "norm", self.norm(x)) if self.is_last_stage else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, prefix + N, D) to (B, D), then classify unless ``pre_logits`` or there are no classes."""
        check_stage(self.is_last_stage, "forward_head", "the last stage of a pipeline")
        check_tensor("x", x, ("B", "N", self.embed_dim))
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

    def _run_blocks(self, x: Tensor, end: int, seen: dict[str, Tensor] | None) -> Tensor:
        """Embed pictures and run the first ``end`` blocks; store every stage in ``seen``, if given."""
        if self.is_first_stage:
            patches = _stored(seen, "patches", self.patch_embed(x))  # (B, N, D)
            grid = self.patch_embed.dynamic_feat_size(plain_shape(x)[2:])
            x = _stored(seen, "positions", self._add_positions(patches, grid))
            x = self.norm_pre(self.patch_drop(x))  # (B, prefix + N, D)
        else:
            check_tensor("x", x, ("B", "N", self.embed_dim))
        for i, block in enumerate(self.blocks):
            if i == end:
                break
            if isinstance(block, nn.Identity):  # another pipeline stage has it
                continue
            if i < self.num_recomputing_layers and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            _stored(seen, f"blocks.{i}", x)  # (B, prefix + N, D)
        return x

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add positions to patches (B, N, D) and put class and register tokens before them."""
        positions = self.pos_embed
        if self.dynamic_img_size:
            old = self.patch_embed.grid_size
            positions = resample_abs_pos_embed(positions, grid, old, self._prefix_with_position)
        if self.no_embed_class:
            x = x + positions
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if prefix:
            x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        return self.pos_drop(x if self.no_embed_class else x + positions)


def _stored(seen: dict[str, Tensor] | None, stage: str, x: Tensor) -> Tensor:
    """Return ``x``, what a stage gave; store it under the stage's name if there is a dict to store it in."""
    if seen is not None:
        seen[stage] = x
    return x
