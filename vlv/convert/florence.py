"""Florence-2 in Microsoft's layout (the hub's microsoft/Florence-2-*, which need custom code) -> transformers' class.

The table below maps the names of the published checkpoints to the native class's. It follows transformers' own
conversion script (models/florence2/convert_florence2_original_pytorch_to_hf.py).
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

from vlv.convert.checkpoints import ConversionError, Renamed, Rule, read, rename, some
from vlv.io import files

_BLOCK = r"vision_tower\.blocks\.(\d+)\.(\d+)\.(spatial|channel)_block\."
_NEW_BLOCK = r"model.vision_tower.blocks.\1.\2.\3_block."
_ENDS = r"\.(weight|bias)"
WORDS = "model.language_model.shared.weight"

RULES = [
    Rule(r"vision_tower\.convs\.(\d+)\.proj" + _ENDS, r"model.vision_tower.convs.\1.conv.\2"),
    Rule(r"vision_tower\.convs\.(\d+)\.norm" + _ENDS, r"model.vision_tower.convs.\1.norm.\2"),
    Rule(_BLOCK + r"conv([12])\.fn\.dw" + _ENDS, _NEW_BLOCK + r"conv\4.\5"),
    Rule(_BLOCK + r"(window|channel)_attn\.norm" + _ENDS, _NEW_BLOCK + r"norm1.\5"),
    Rule(_BLOCK + r"(window|channel)_attn\.fn\.(qkv|proj)" + _ENDS, _NEW_BLOCK + r"\4_attn.\5.\6"),
    Rule(_BLOCK + r"ffn\.norm" + _ENDS, _NEW_BLOCK + r"norm2.\4"),
    Rule(_BLOCK + r"ffn\.fn\.net\.(fc[12])" + _ENDS, _NEW_BLOCK + r"ffn.\4.\5"),
    # A bare matrix there, multiplied from the right; a linear layer here.
    Rule(r"image_projection", "model.multi_modal_projector.image_projection.weight", transposed=True),
    Rule(r"image_proj_norm" + _ENDS, r"model.multi_modal_projector.image_proj_norm.\1"),
    Rule(
        r"image_pos_embed\.(row|column)_embeddings\.weight",
        r"model.multi_modal_projector.image_position_embed.\1_embeddings.weight",
    ),
    Rule(
        r"visual_temporal_embed\.pos_idx_to_embed",
        "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed",
    ),
    Rule(r"language_model\.model\.(?:encoder|decoder)\.embed_tokens\.weight", WORDS),  # three names of one table
    Rule(r"language_model\.model\.(.+)", r"model.language_model.\1"),
    Rule(r"language_model\.lm_head\.weight", "lm_head.weight"),
    Rule(r"language_model\.final_logits_bias", None, "a constant zero added to the word logits", zero=True),
]

_VISION = {
    "dim_embed": "embed_dim", "depths": "depths", "patch_size": "patch_size", "patch_stride": "patch_stride",
    "patch_padding": "patch_padding", "patch_prenorm": "patch_prenorm", "num_heads": "num_heads",
    "num_groups": "num_groups", "window_size": "window_size", "drop_path_rate": "drop_path_rate",
    "projection_dim": "projection_dim", "mlp_ratio": "mlp_ratio", "in_chans": "in_channels", "qkv_bias": "qkv_bias",
}  # fmt: skip
# These keys change no tensor and nothing that is computed from one.
_VISION_DROPPED = {"model_type", "enable_checkpoint", "_attn_implementation_autoset", "num_classes"}
_FIXED = {  # the native class has these values built in; another value means another model
    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    "visual_temporal_embedding.type": "COSINE",
    "image_pos_embed.type": "learned_abs_2d",
}
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "preprocessor_config.json", "generation_config.json",
)  # fmt: skip
_FETCH = "Fetch the hub's repository again."
_CODE = {"auto_map", "processor_class", "custom_pipelines"}  # keys that point to code in the folder


def convert(folder: Path, output: Path) -> Renamed:
    """Write the Florence-2 of `folder` to `output` in transformers' form, with its tokenizer's files.

    The vocabulary stays as it is (51,289 words): the `<image>` word that transformers' own conversion adds is not
    needed where image features are passed as embeddings, as here.

    Raises:
        ConversionError: unknown, missing or misshapen tensors, or a configuration of another model.
    """
    if output.exists():
        raise ConversionError(f"{output} exists already; give another place, or remove it.")
    settings = configuration(folder / "config.json")
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(settings)
    found = rename(read(folder).tensors, RULES, str(folder))
    model.load_state_dict(complete(model, found.tensors, str(folder)), assign=True)
    model.tie_weights()
    with files.atomic_folder(output) as temporary:
        model.save_pretrained(temporary)
        for name in _TOKENIZER:
            _copy(folder / name, temporary / name)
    return found


def configuration(path: Path) -> Florence2Config:
    """Microsoft's config.json as transformers' configuration.

    Raises:
        ConversionError: a key that is missing or not known, or a value that the native class does not have.
    """
    if not path.exists():
        raise ConversionError(f"{path} does not exist: give the folder that the hub's repository was fetched to.")
    value = files.read_json_object(path, _FETCH)
    described = value.get("vision_config")
    if value.get("model_type") != "florence2" or not isinstance(described, dict) or "dim_embed" not in described:
        raise ConversionError(f"{path} is not the configuration of a Florence-2 in Microsoft's layout.")
    try:
        return _native(path, dict(described), value["text_config"])
    except KeyError as error:
        raise ConversionError(f"{path} lacks the key {error}. {_FETCH}") from error
    except (TypeError, AttributeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(f"{path} has a value of the wrong type ({error}). {_FETCH}") from error


def _native(path: Path, vision: dict[str, Any], text_config: dict[str, Any]) -> Florence2Config:
    temporal, positions = vision.pop("visual_temporal_embedding"), vision.pop("image_pos_embed")
    given = {
        "image_feature_source": vision.pop("image_feature_source"),
        "visual_temporal_embedding.type": temporal["type"],
        "image_pos_embed.type": positions["type"],
    }
    for key, wanted in _FIXED.items():
        if given[key] != wanted:
            raise ConversionError(f"{path}: vision_config.{key} is {given[key]!r}; transformers has {wanted!r} only.")
    if unknown := sorted(vision.keys() - _VISION.keys() - _VISION_DROPPED):
        raise ConversionError(f"{path}: unknown keys in vision_config: {some(unknown)}")
    native = {new: vision[old] for old, new in _VISION.items() if old in vision}
    native |= {
        "max_temporal_embeddings": temporal["max_temporal_embeddings"],
        "max_position_embeddings": positions["max_pos_embeddings"],
    }
    known = BartConfig().to_dict().keys() - {"model_type"}
    text = {key: setting for key, setting in text_config.items() if key in known}
    return Florence2Config(
        vision_config=native, text_config={**text, "model_type": "bart"}, image_token_id=text["vocab_size"]
    )


def complete(model: torch.nn.Module, tensors: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """`tensors` for all names of the model's state dict. Where several names share one tensor, one of them is enough.

    Raises:
        ConversionError: a name is missing, or the model does not have it; shapes differ; tied names hold different
            tensors.
    """
    together: dict[int, list[str]] = {}
    for name, own in model.state_dict(keep_vars=True).items():
        together.setdefault(id(own), []).append(name)
    result: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    for names in together.values():
        given = [name for name in names if name in tensors]
        if not given:
            missing.append(names[0])
            continue
        if any(not torch.equal(tensors[given[0]], tensors[name]) for name in given[1:]):
            raise ConversionError(f"{what}: {' and '.join(given)} should be one tensor, but they differ.")
        result |= dict.fromkeys(names, tensors[given[0]].contiguous())
    surplus = [name for name in tensors if name not in result]
    if missing or surplus:
        raise ConversionError(
            f"{what} does not fit its configuration. Missing: {some(missing) or 'nothing'}. "
            f"Not in the model: {some(surplus) or 'nothing'}."
        )
    own = model.state_dict()
    if wrong := [n for n, t in result.items() if t.shape != own[n].shape]:
        raise ConversionError(f"{what}: shapes differ from the configuration's: {some(wrong)}")
    return result


def _copy(source: Path, target: Path) -> None:
    """Copy a tokenizer's file; keys that name code in the folder are left out."""
    if not source.exists():
        return
    if source.suffix != ".json" or source.name in ("tokenizer.json", "vocab.json"):
        files.write_bytes(target, source.read_bytes())
        return
    value = files.read_json_object(source, _FETCH)
    files.write_json(target, {key: setting for key, setting in value.items() if key not in _CODE})
