"""Train the captioner that ships, behind the tower that ships, on a GPU. Prints a table, and stores seed 0's weights.

python tools/train_captioner.py            # three seeds
python tools/train_captioner.py --stand-in # a few steps on a CPU: to try the notebook before there are weights

Twemoji's drawings and the 86 concepts of ``split`` are held out. Nothing is chosen by them.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from siglip_lib.data.emoji64 import Emoji64, load_emoji64, split
from siglip_lib.evaluate.retrieval import Share
from siglip_lib.siglip.folder import EMOJI64_CAPTIONER, EMOJI64_WEIGHTS, load_siglip
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.storage.writing import write_tensors
from siglip_lib.train.captioning import EMOJI64_LANGUAGE, Captioner, share_right, train_stage
from siglip_lib.train.questions import QUESTION, Questions, every_drawing
from siglip_lib.vl.language_model import caption_loss

# steps of: the language model alone, the adaptor, both, both with tiles too
STEPS, STAND_IN = (300, 600, 3_000, 4_000), (20, 20, 100, 0)
BATCH, TILED_BATCH = 256, 256
THUMBNAIL = 20  # tokens: 4 rows of 4, each with its newline
TILED = ("prompts", "answers", "thumbnail", "about", "tiles")  # what a batch with tiles holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--out", type=Path, default=EMOJI64_CAPTIONER)
    arguments = parser.parse_args()
    emoji = load_emoji64()
    rows = {}
    for seed in [0] if arguments.stand_in else range(3):
        captioner = trained(emoji, seed, arguments.stand_in)
        rows[f"seed {seed}"] = shares(emoji, captioner, arguments.stand_in)
        if seed == 0:
            state = {name: tensor.half() for name, tensor in captioner.trained_state().items()}
            write_tensors(state, arguments.out)
    headers = ("exact names, in %", *next(iter(rows.values())))
    print(tabulate([(name, *row.values()) for name, row in rows.items()], headers, "github"))


def new_tokenizer() -> Tokenizer:
    return Tokenizer(EMOJI64_WEIGHTS / "spiece.model", QUESTION)


def trained(emoji: Emoji64, seed: int, stand_in: bool) -> Captioner:
    device = torch.device("cpu" if stand_in else "cuda")
    tokenizer, places = new_tokenizer(), split(emoji).train
    tower = load_siglip(EMOJI64_WEIGHTS)[0].image.to(device)
    torch.manual_seed(seed)
    captioner = Captioner(tower, **EMOJI64_LANGUAGE).to(device)
    language, adaptor = captioner.language, captioner.prefix.projector
    vectors = [captioner.prefix.image_newline, captioner.prefix.view_seperator]
    draw = partial(Questions, emoji, places, tokenizer, seed=seed, device=device)
    batch, tiled_batch = (32, 16) if stand_in else (BATCH, TILED_BATCH)
    plain = draw(grids=(1, 2), batch=batch, strength=1.0)
    tiled = draw(grids=(4,), batch=tiled_batch, tiles=4, strength=1.0)

    def blind(prompts: Tensor, answers: Tensor, thumbnail: Tensor, about: Tensor) -> Tensor:
        nothing = language.token_embed.weight.new_zeros(
            len(prompts), THUMBNAIL, language.norm.normalized_shape[0]
        )
        before = torch.cat((nothing, language.token_embed(prompts)), dim=1)
        return caption_loss(language.caption_logits(before, answers), answers)

    def both(**batches: Tensor) -> Tensor:
        other = {name: batches.pop(f"tiled_{name}") for name in TILED}
        return captioner(**batches) + captioner(**other, grid=(4, 4))

    def both_kinds(step: int) -> dict[str, Tensor]:
        return plain(step) | {f"tiled_{name}": tensor for name, tensor in tiled(step).items()}

    everything = [*adaptor.parameters(), *vectors, *language.parameters()]
    stages = (
        (blind, language.parameters(), plain, 1e-3),
        (captioner, [*adaptor.parameters(), *vectors], plain, 1e-3),
        (captioner, everything, plain, 2e-3),
        (both, everything, both_kinds, 2e-3),
    )
    for steps, (loss, parameters, batches, lr) in zip(
        STAND_IN if stand_in else STEPS, stages, strict=True
    ):
        if steps:
            train_stage(loss, parameters, batches, steps, lr)
    return captioner.eval()


def shares(emoji: Emoji64, captioner: Captioner, stand_in: bool) -> dict[str, Share]:
    """Exact names of Twemoji's drawings: alone, in scenes of four, and in scenes of 16 read by tiles."""
    parts, tokenizer = split(emoji), new_tokenizer()
    device = captioner.prefix.image_newline.device
    found = {}
    for name, places in (("alone", parts.seen), ("never named", parts.unseen)):
        some = places[:40] if stand_in else places
        found[name] = share_right(captioner, every_drawing(emoji, some, tokenizer, device))
    for name, grid, tiles in (("one of four", 2, 1), ("one of 16, tiles", 4, 4)):
        draw = Questions(
            emoji, parts.seen, tokenizer, grids=(grid,), batch=48, tiles=tiles, device=device
        )
        batches = map(draw, range(1 if stand_in else 50))
        found[name] = share_right(captioner, batches, (tiles, tiles))
    return found


if __name__ == "__main__":
    main()
