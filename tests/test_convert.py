"""Converters: the tests write checkpoints in the published layouts, from small models of the native classes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Florence2ForConditionalGeneration

from tests.conftest import profile
from vlv import config
from vlv.config import Paths
from vlv.convert import checkpoints, florence, release
from vlv.convert.checkpoints import ConversionError
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner

Tensors = dict[str, torch.Tensor]


def microsoft(native: Tensors) -> Tensors:
    """A native Florence-2's tensors under the names of microsoft/Florence-2-large, with all embedding aliases."""
    result: Tensors = {}
    for name, tensor in native.items():
        new = name.removeprefix("model.")
        if new.startswith("vision_tower.convs."):
            new = new.replace(".conv.", ".proj.")
        elif new.startswith("vision_tower.blocks."):
            attention = "window_attn" if ".spatial_block." in new else "channel_attn"
            for ours, theirs in {
                ".conv1.": ".conv1.fn.dw.", ".conv2.": ".conv2.fn.dw.", ".norm1.": f".{attention}.norm.",
                ".norm2.": ".ffn.norm.", ".qkv.": ".fn.qkv.", ".proj.": ".fn.proj.", ".fc1.": ".fn.net.fc1.",
                ".fc2.": ".fn.net.fc2.",
            }.items():  # fmt: skip
                new = new.replace(ours, theirs)
        elif new == "multi_modal_projector.image_projection.weight":
            new, tensor = "image_projection", tensor.T.contiguous()
        elif new.startswith("multi_modal_projector."):
            new = new.removeprefix("multi_modal_projector.").replace("image_position_embed", "image_pos_embed")
        elif new.startswith("language_model."):
            new = new.replace("language_model.", "language_model.model.", 1)
        else:
            assert new == "lm_head.weight", new
            new = "language_model.lm_head.weight"
        result[new] = tensor.clone()
    words = result["language_model.model.shared.weight"]
    return result | {"language_model.final_logits_bias": torch.zeros(1, len(words))}


def released(native: Tensors) -> Tensors:
    """Our auto-encoder's tensors under the names of the release's SDModel."""
    parts: dict[str, Tensors] = {"encoder.florence.": {}}
    result: Tensors = {}
    for name, tensor in native.items():
        if name.startswith("encoder.florence."):
            parts["encoder.florence."][name.removeprefix("encoder.florence.")] = tensor
        else:
            new = name.removeprefix("encoder.").removeprefix("decoder.")
            new = new.replace("conditioner.text_encoder.", "text_encoder.text_model.")
            new = {"queries": "query_embed"}.get(new, new).replace("projection.layers.", "language_proj.")
            result[new] = tensor.clone()
    return result | {f"model.{name}": tensor for name, tensor in microsoft(parts["encoder.florence."]).items()}


def microsoft_config(settings: Any) -> dict[str, Any]:
    """config.json of the remote-code class, as on the hub."""
    v = settings.vision_config
    return {
        "model_type": "florence2",
        "auto_map": {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"},
        "vision_config": {
            "model_type": "davit", "dim_embed": v.embed_dim, "depths": v.depths, "patch_size": v.patch_size,
            "patch_stride": v.patch_stride, "patch_padding": v.patch_padding, "patch_prenorm": v.patch_prenorm,
            "num_heads": v.num_heads, "num_groups": v.num_groups, "window_size": v.window_size,
            "drop_path_rate": v.drop_path_rate, "projection_dim": v.projection_dim, "enable_checkpoint": False,
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": v.max_position_embeddings},
            "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": v.max_temporal_embeddings},
        },
        "text_config": {**settings.text_config.to_dict(), "model_type": "florence2_language"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def smoke() -> config.Config:
    """The smoke profile without the features that the release lacks."""
    value = profile("smoke")
    return value.model_copy(
        update={
            "encoder": value.encoder.model_copy(update={"start_on_text_side": False}),
            "language_model": value.language_model.model_copy(
                update={"prefix_positions": False, "standardise_context": False}
            ),
        }
    )


@pytest.fixture(scope="module")
def trained(smoke: config.Config, paths: Paths) -> Autoencoder:
    """An auto-encoder whose trained tensors differ from their initial values."""
    model = Autoencoder.build(smoke, paths)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return model.eval()


def _pictures() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _folder(tmp_path: Path, tensors: Tensors, settings: Any) -> Path:
    folder = tmp_path / "Florence-2"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(microsoft_config(settings)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"x": "y.z"}, "model_max_length": 1024}))
    (folder / "modeling_florence2.py").write_text("raise SystemExit('this code must not run')\n")
    return folder


def test_florence_from_microsoft_s_layout_is_the_same_model(trained: Autoencoder, tmp_path: Path) -> None:
    native = trained.encoder.florence
    folder = _folder(tmp_path, microsoft(native.state_dict()), native.config)
    # Names from the published checkpoint, so that the layout above is not just the inverse of our converter.
    names = set(torch.load(folder / "pytorch_model.bin", weights_only=True))
    assert {
        "vision_tower.convs.0.proj.weight", "vision_tower.blocks.0.0.spatial_block.conv1.fn.dw.weight",
        "vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv.bias",
        "vision_tower.blocks.0.0.channel_block.channel_attn.fn.proj.weight",
        "vision_tower.blocks.1.0.channel_block.ffn.fn.net.fc2.bias", "image_projection",
        "image_pos_embed.row_embeddings.weight", "visual_temporal_embed.pos_idx_to_embed",
        "language_model.model.shared.weight", "language_model.model.encoder.embed_tokens.weight",
        "language_model.model.decoder.layers.0.encoder_attn.k_proj.weight", "language_model.lm_head.weight",
    } <= names  # fmt: skip

    found = florence.convert(folder, tmp_path / "native")
    assert found.dropped == {"language_model.final_logits_bias": "a constant zero added to the word logits"}
    assert not list((tmp_path / "native").glob("*.py")) and not list((tmp_path / "native").glob("*.bin"))
    assert json.loads((tmp_path / "native" / "tokenizer_config.json").read_text()) == {"model_max_length": 1024}
    again = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "native", attn_implementation="eager").eval()
    ids = torch.tensor([[1, 5, 6, 2]])
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(
            native.model.get_image_features(x).pooler_output, again.model.get_image_features(x).pooler_output
        )
        states = native(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(states, again(input_ids=ids, decoder_input_ids=ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("vision_tower.convs.1.norm.bias"), r"Missing: model\.vision_tower\.convs\.1\.norm\.bias"),
        (lambda t: t.update({"vision_tower.head.weight": torch.ones(1)}), r"unknown names: vision_tower\.head\.weight"),
        (lambda t: t["language_model.final_logits_bias"].add_(1), "is not zero"),
        (lambda t: t["language_model.model.decoder.embed_tokens.weight"].add_(1), "should be one tensor"),
        (lambda t: t.update({"image_projection": torch.ones(3, 5)}), "shapes differ"),
    ],
)
def test_wrong_florence_tensors_are_refused_by_name(
    trained: Autoencoder, tmp_path: Path, change: Any, message: str
) -> None:
    native = trained.encoder.florence
    tensors = microsoft(native.state_dict())
    change(tensors)
    folder = _folder(tmp_path, tensors, native.config)
    with pytest.raises(ConversionError, match=message):
        florence.convert(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_florence_with_another_pooling_is_refused(trained: Autoencoder, tmp_path: Path) -> None:
    native = trained.encoder.florence
    folder = _folder(tmp_path, microsoft(native.state_dict()), native.config)
    value = json.loads((folder / "config.json").read_text())
    value["vision_config"]["image_feature_source"] = ["last_frame"]
    (folder / "config.json").write_text(json.dumps(value))
    with pytest.raises(ConversionError, match="image_feature_source"):
        florence.convert(folder, tmp_path / "native")


def _stage1_file(kind: str, tensors: Tensors, folder: Path) -> Path:
    folder.mkdir()
    if kind == "deepspeed":  # the output of zero_to_fp32
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "deepspeed folder":  # newer versions write a folder of that name, with several files
        inner = folder / "pytorch_model.bin"
        inner.mkdir()
        half = dict(list(tensors.items())[:9])
        rest = {k: v for k, v in tensors.items() if k not in half}
        torch.save(half, inner / "pytorch_model-00001-of-00002.bin")
        torch.save(rest, inner / "pytorch_model-00002-of-00002.bin")
        where = dict.fromkeys(half, "pytorch_model-00001-of-00002.bin")
        where |= dict.fromkeys(rest, "pytorch_model-00002-of-00002.bin")
        (inner / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:  # as train_VLV_stage1.py writes it under DDP
        state = {f"module.{k}": v for k, v in tensors.items()} if kind == "nested, wrapped" else tensors
        value = {"step": 20, "model_state_dict": state, "optimizer_state_dict": {}, "scheduler_state_dict": None}
        torch.save({**value, "step": 3, "model_state_dict": {}}, folder / "checkpoint_3.pt")
        torch.save(value, folder / "checkpoint_20.pt")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('this code must not run')\n")
    return folder


@pytest.mark.parametrize("kind", ["deepspeed", "deepspeed folder", "nested", "nested, wrapped"])
def test_a_released_stage_1_draws_the_same_images(
    kind: str, trained: Autoencoder, smoke: config.Config, paths: Paths, tmp_path: Path
) -> None:
    source = _stage1_file(kind, released(trained.state_dict()), tmp_path / "step_20")
    done = release.stage1(source, tmp_path / "model", smoke, paths)
    again = Autoencoder.load(tmp_path / "model", paths)
    assert torch.equal(trained.context(_pictures()), again.context(_pictures()))
    learned = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert set(done.taken) == learned
    assert any(name.startswith("unet.") for name in done.verified)
    assert done.dropped["model.language_model.lm_head.weight"].startswith("Florence-2's word head")
    assert ("optimizer_state_dict" in done.dropped) == kind.startswith("nested")
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["dropped"] == done.dropped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("query_embed"), r"1 tensors are missing, by our names: encoder\.queries"),
        (lambda t: t.update({"lora.weight": torch.ones(1)}), r"unknown names: lora\.weight"),
        (lambda t: t.update({"unet.conv_in.surprise": torch.ones(1)}), r"no place .*unet\.conv_in\.surprise"),
        (lambda t: t.update({"query_embed": torch.ones(1, 3, 128)}), r"another shape: query_embed \(1, 3, 128\)"),
        (lambda t: t["vae.encoder.conv_in.weight"].add_(0.1), r"differ from .*vae\.encoder\.conv_in\.weight"),
    ],
)
def test_wrong_stage_1_tensors_are_refused_by_name(
    trained: Autoencoder, smoke: config.Config, paths: Paths, tmp_path: Path, change: Any, message: str
) -> None:
    tensors = released(trained.state_dict())
    change(tensors)
    source = _stage1_file("deepspeed", tensors, tmp_path / "stage1")
    with pytest.raises(ConversionError, match=message):
        release.stage1(source, tmp_path / "model", smoke, paths)
    assert not (tmp_path / "model").exists()


def test_trained_word_embeddings_need_their_prompt(
    trained: Autoencoder, smoke: config.Config, paths: Paths, tmp_path: Path
) -> None:
    tensors = released(trained.state_dict())
    for alias in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        tensors[f"model.language_model.model.{alias}.weight"].add_(0.1)
    source = _stage1_file("deepspeed", tensors, tmp_path / "stage1")
    with pytest.raises(ConversionError, match=r"differ from .*shared\.weight"):
        release.stage1(source, tmp_path / "model", smoke, paths)
    encoder = smoke.encoder.model_copy(update={"prompt": "a dog"})
    prompted = smoke.model_copy(update={"encoder": encoder})
    done = release.stage1(source, tmp_path / "model", prompted, paths)
    assert "encoder.florence.model.language_model.shared.weight" in done.taken


def test_a_released_stage_2_writes_the_same_captions(
    trained: Autoencoder, smoke: config.Config, paths: Paths, tmp_path: Path
) -> None:
    captioner = Captioner.build(smoke, paths).eval()
    captioner.encoder.load_state_dict(trained.encoder.state_dict())
    with torch.no_grad():
        for p in (*captioner.prefix.parameters(), *captioner.language_model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    inner = {n: t for n, t in captioner.state_dict().items() if n.startswith(("encoder.", "conditioner."))}
    tensors = {f"VLV_model.{name}": tensor for name, tensor in released(inner).items()}
    tensors |= {f"mlp.{name}": tensor.detach() for name, tensor in captioner.prefix.named_parameters()}
    tensors |= {f"qwen2_model.{name}": tensor for name, tensor in captioner.language_model.state_dict().items()}
    assert {
        "mlp.layers.0.weight", "qwen2_model.model.layers.0.self_attn.q_proj.weight", "qwen2_model.lm_head.weight",
        "VLV_model.language_proj.2.bias", "VLV_model.text_encoder.text_model.final_layer_norm.weight",
    } <= set(tensors)  # fmt: skip
    torch.save(tensors, tmp_path / "model.pt")

    release.stage2(tmp_path / "model.pt", tmp_path / "model", smoke, paths)
    again = Captioner.load(tmp_path / "model", paths)
    context = captioner.context(_pictures())
    assert torch.equal(context, again.context(_pictures()))
    # tests/test_generation.py tests the release's generation; a few words are enough here.
    captioner.generation = again.generation = again.generation.model_copy(update={"max_tokens": 12})
    assert captioner.write(context) == again.write(context)
    assert torch.equal(captioner.prefix(context), again.prefix(context))

    del tensors["mlp.layers.2.bias"]
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"missing, by our names: prefix\.layers\.2\.bias"):
        release.stage2(tmp_path / "model.pt", tmp_path / "other", smoke, paths)


def test_a_configuration_that_the_release_cannot_have_is_refused_first(paths: Paths, tmp_path: Path) -> None:
    value = profile("smoke")
    with pytest.raises(ConversionError, match="start_on_text_side"):
        release.stage1(tmp_path / "nothing", tmp_path / "model", value, paths)
    plain = value.model_copy(update={"encoder": value.encoder.model_copy(update={"start_on_text_side": False})})
    with pytest.raises(ConversionError, match="prefix_positions"):
        release.stage2(tmp_path / "nothing", tmp_path / "model", plain, paths)


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"query_embed": torch.ones(1), "code": _Code()}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"model\.pt is damaged, or holds more than tensors"):
        checkpoints.read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not exist"):
        checkpoints.read(tmp_path / "nothing")
    with pytest.raises(ConversionError, match="holds none of"):
        checkpoints.read(tmp_path)
    (tmp_path / "step_9").mkdir()
    torch.save({}, tmp_path / "step_9" / "mp_rank_00_model_states.pt")
    (tmp_path / "zero_to_fp32.py").write_text("raise SystemExit\n")
    with pytest.raises(ConversionError, match="DeepSpeed's own tool"):
        checkpoints.read(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ConversionError, match="cannot be read"):
        checkpoints.read(tmp_path / "cut.safetensors")
    torch.save({"model_state_dict": {}, "surprise": 1}, tmp_path / "nested.pt")
    with pytest.raises(ConversionError, match="surprise"):
        checkpoints.read(tmp_path / "nested.pt")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "step_9" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="not a file beside it"):
        checkpoints.read(tmp_path / "step_9")
