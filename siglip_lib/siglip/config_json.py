"""A SigLIP's config.json, which transformers reads and writes too, to ``SigLIPConfig`` and back."""

import json
from pathlib import Path

from siglip_lib.siglip.model import SigLIPConfig

# Where transformers' config.json keeps each of our sizes, and what it means by leaving one out.
SIZES = {
    "image_size": ("vision_config", "image_size", 224),
    "patch_size": ("vision_config", "patch_size", 16),
    "width": ("vision_config", "hidden_size", 768),
    "layers": ("vision_config", "num_hidden_layers", 12),
    "heads": ("vision_config", "num_attention_heads", 12),
    "mlp_hidden": ("vision_config", "intermediate_size", 3072),
    "text_width": ("text_config", "hidden_size", 768),
    "text_layers": ("text_config", "num_hidden_layers", 12),
    "text_heads": ("text_config", "num_attention_heads", 12),
    "text_mlp_hidden": ("text_config", "intermediate_size", 3072),
    "vocab_size": ("text_config", "vocab_size", 32_000),
    "context_length": ("text_config", "max_position_embeddings", 64),
}

# What is settled here and a choice there.
_IN_BOTH = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
_SETTLED = {
    "vision_config": {"num_channels": 3, **_IN_BOTH, "vision_use_head": True},
    "text_config": _IN_BOTH,
}

# What changes no output of the towers: how weights are drawn and loaded, the tokenizer's numbers, what a call returns,
# and settings of other tasks, which transformers 4.x writes into every file.
HARMLESS = frozenset(
    """
    architectures attn_implementation auto_map chunk_size_feed_forward dtype initializer_factor initializer_range
    model_type name_or_path text_config torch_dtype transformers_version vision_config
    bos_token_id eos_token_id pad_token_id tokenizer_class
    output_attentions output_hidden_states return_dict use_cache
    id2label label2id num_labels problem_type tie_word_embeddings
    length_penalty max_length num_beam_groups num_beams num_return_sequences repetition_penalty temperature top_k top_p
    typical_p
    """.split()  # noqa: SIM905
)


def config_json(config: SigLIPConfig) -> str:
    """Return the content of the config.json of a model of these sizes."""
    sections = {section: dict(settled) for section, settled in _SETTLED.items()}
    for field, (section, name, _) in SIZES.items():
        sections[section][name] = getattr(config, field)
    sections["vision_config"]["model_type"] = "siglip_vision_model"
    sections["text_config"] |= {
        "model_type": "siglip_text_model",
        "projection_size": config.width,
        "pad_token_id": 1,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    # the dtype in which to load, whatever is stored
    whole = {"architectures": ["SiglipModel"], "model_type": "siglip", "dtype": "float32"}
    return json.dumps(whole | sections, indent=2) + "\n"


def read_config(path: Path) -> SigLIPConfig:
    """Return the sizes in a config.json.

    Raises:
        ValueError: the file is malformed, or asks for what this code does not have; the message lists that.
        OSError: the file cannot be read.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        sections = {section: whole.get(section) or {} for section in _SETTLED}
        kind = whole.get("model_type")
        values = {
            field: sections[section].get(name, default)
            for field, (section, name, default) in SIZES.items()
        }
        differences = _differences(whole, sections)
        # what the text tower gives, by default its own width
        projection = sections["text_config"].get("projection_size") or values["text_width"]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no configuration of a model: {error!r}") from error
    if kind != "siglip":
        differences = [f"model_type is {kind!r}, not 'siglip'"]
        if kind == "siglip2":
            differences[0] += (
                " (SigLIP 2's NaFlex, for pictures of any aspect ratio; its others say 'siglip')"
            )
    elif projection != (width := values["width"]):
        differences.append(
            f"text_config.projection_size is {projection!r}, not the image tower's {width!r}"
        )
    if differences:
        raise ValueError(f"{path.name} asks for what is not here: {'; '.join(differences)}")
    try:
        return SigLIPConfig(**values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _differences(whole: dict, sections: dict[str, dict]) -> list[str]:
    """What a configuration asks for that is settled otherwise here, or unknown."""
    settled_otherwise = [
        f"{section}.{name} is {found!r}, not {settled!r}"
        for section, names in _SETTLED.items()
        for name, settled in names.items()
        if (found := sections[section].get(name, settled)) != settled
    ]
    unknown = [
        f"{section}.{name} is {value!r}, which is unknown".removeprefix(".")
        for section, names in {"": whole, **sections}.items()
        for name, value in names.items()
        if value and name not in known_settings(section) and not name.startswith("_")
    ]
    return settled_otherwise + unknown


def known_settings(section: str) -> set[str]:
    """The settings of a section that are used, settled, or harmless; "" stands for the file's top level."""
    sizes = {name for part, name, _ in SIZES.values() if part == section}
    return HARMLESS | sizes | _SETTLED.get(section, {}).keys() | {"projection_size"}
