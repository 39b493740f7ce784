"""Checks of notebook 08, the vision transformer."""

import operator

import torch
import torch.nn.functional as F

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    first_match,
    is_pair,
    is_tensor,
    near,
    number,
    was_changed,
)
from siglip_lib.siglip import EMOJI64_WEIGHTS, embed_texts, load_siglip
from siglip_lib.tower.vision_transformer import VisionTransformer

_SO400M = (1152, 27, 4304, 14, 729)
_LARGE = (1024, 24, 4096, 16, 576)


def _parameters(width: int, layers: int, hidden: int, patch: int, tokens: int) -> int:
    mlp = 2 * width * hidden + hidden + width
    block = 4 * width * width + 4 * width + mlp + 4 * width
    head = 4 * width * width + 4 * width + mlp + 3 * width
    return 3 * patch * patch * width + width + tokens * width + layers * block + 2 * width + head


@exercise("08.1")
def parameters(answer) -> str | None:
    width, layers, _, patch, tokens = _SO400M
    returned, right = answered(answer(*_SO400M)), _parameters(*_SO400M)
    if (found := number(returned)) is None:
        return f"your function returns {returned!r}; it must return a number"
    two = 2 * width
    by_difference = {
        "the pooling head is missing": 15_238_352,
        "the head has one norm, not two": -two,
        "that counts the head as a block; it has one norm less, and the latent": -width,
        "one vector of the width is missing: the latent, a bias, or one half of a norm": width,
        "a norm is missing, or its bias and another one: the last norm, or the head's own": two,
        "the position embeddings are missing": tokens * width,
        "a patch has three colours": 2 * patch * patch * width,
        "there are several blocks, not one": (layers - 1) * 15_239_504,
    }
    if reason := first_match(right - found, by_difference, operator.eq):
        return reason
    if found != right:
        word = "many" if found > right else "few"
        return f"for SO400M you count {found:,}, which is {abs(found - right):,} too {word}"
    if answer(*_LARGE) != _parameters(*_LARGE):
        return "right for SO400M, but not for SigLIP's large tower: is one of its sizes fixed in your code?"
    return None


@exercise("08.2")
def join(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    state = {
        f"encoder.layers.{i}.self_attn.{part}_proj.{kind}": torch.randn(shape, generator=generator)
        for i in range(3)
        for part in ("k", "v", "q", "out")
        for kind, shape in (("weight", (6, 6)), ("bias", (6,)))
    }

    def parts(i: int, kind: str, order: str) -> list[torch.Tensor]:
        return [state[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] for part in order]

    found = answered(answer(dict(state), 1))
    if not is_pair(found):
        return "the result must be a pair, (weight, bias)"
    if not all(isinstance(tensor, torch.Tensor) for tensor in found):
        return "both parts of the pair must be tensors"
    weight, bias = found
    if weight.shape == (6, 18):
        return "the weight has shape (D, 3D); an output is a row, so it must be (3D, D)"
    if weight.shape != (18, 6) or bias.shape != (18,):
        return f"the shapes are {tuple(weight.shape)} and {tuple(bias.shape)}; D is 6 here: (18, 6) and (18,)"
    if torch.equal(weight, torch.cat(parts(0, "weight", "qkv"))):
        return "those are the weights of layer 0, whatever i is"
    if torch.equal(weight, torch.stack(parts(1, "weight", "qkv"), 1).flatten(0, 1)):
        return "the rows of q, k and v alternate; first come all rows of q, then all of k, then all of v"
    for order in ("kvq", "qvk", "kqv", "vqk", "vkq"):
        if torch.equal(weight, torch.cat(parts(1, "weight", order))):
            return f"the order is {', '.join(order)}; it must be q, k, v"
    if torch.equal(weight, torch.cat([w.T for w in parts(1, "weight", "qkv")])):
        return "each matrix is transposed; both libraries keep (outputs, inputs)"
    if not torch.equal(weight, torch.cat(parts(1, "weight", "qkv"))):
        return "the weight is not that of q, k and v of layer i, one below the other"
    if not torch.equal(bias, torch.cat(parts(1, "bias", "qkv"))):
        return "the weight is right; the bias is not that of q, k and v of layer i in this order"
    return None


@exercise("08.3")
def second_to_last(answer) -> str | None:
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        tower = VisionTransformer(
            28,
            14,
            embed_dim=24,
            depth=4,
            num_heads=2,
            class_token=False,
            global_pool="map",
            num_classes=0,
        ).double()
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, 0.1, 0.3)
        x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
        before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
        found = answered(answer(tower.eval(), x))
        if was_changed(tower.state_dict(), before):
            return "your function changed the tower; somebody else still needs it whole"
        stages = tower.intermediates(x)
        right, one_less = tower.norm(stages["blocks.2"]), tower.norm(stages["blocks.1"])
        mistakes = {
            "the last norm is missing: the shorter tower ends in it too": stages["blocks.2"],
            "those are the tokens of the whole tower": stages["norm"],
            "that is one block too few: the second to last has index depth - 2": one_less,
            "those are the tokens after the last block, before the norm": stages["blocks.3"],
        }
    if not is_tensor(found, *right.shape):
        return f"the result must be a tensor of shape {tuple(right.shape)}: all tokens, not pooled"
    if torch.allclose(found, right):
        return None
    return (
        first_match(found, mistakes)
        or "the result is not the last norm of what the second to last block returned"
    )


_NAMES = (
    *(
        "cat",
        "dog",
        "red apple",
        "rocket",
        "umbrella",
        "pizza",
        "house",
        "sunflower",
        "key",
        "moon",
        "train",
    ),
    "elephant",
)


@exercise("08.4")
def share_right(answer) -> str | None:
    model, tokenizer = load_siglip(EMOJI64_WEIGHTS)
    model.eval()
    names, wanted = list(_NAMES), torch.arange(20) * 5 % len(_NAMES)
    texts = {
        prompt: embed_texts(model, tokenizer, [prompt.format(name) for name in names])
        for prompt in ("{}", "a photo of {}", "an emoji of {}")
    }
    noise = torch.randn(20, model.config.width, generator=torch.Generator().manual_seed(0))
    for prompt in ("a photo of {}", "an emoji of {}"):
        # vectors that fit the text with this prompt, some of them too noisy to be found; with less noise sigmoids come
        # so near 1 that float32 can't tell which is the largest
        vectors = F.normalize(texts[prompt][wanted] + 0.2 * noise, dim=1)
        hits = {key: (vectors @ value.T).argmax(1) == wanted for key, value in texts.items()}
        returned = answered(answer(model, tokenizer, vectors, names, wanted, prompt))
        share = hits[prompt].double().mean().item()
        if (found := number(returned)) is None:
            return f"your function returns {returned!r}; it must return a number"
        mistakes = {
            "that is how many are right; divide by the number of pictures": 20 * share,
            "a share lies between 0 and 1; that is in per cent": 100 * share,
            "that is the share of wrong ones": 1 - share,
            "the names must stand in the prompt": hits["{}"].double().mean().item(),
        }
        if near(1e-6)(found, share):
            continue
        reason = first_match(found, mistakes, near(1e-6)) or f"{share:.2f} is right"
        return f"with the prompt {prompt!r} your share is {found:.2f}: {reason}"
    return None
