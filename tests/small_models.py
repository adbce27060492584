"""Small models of the real classes with random weights, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from vlv.models.decoders.clip import ClipReader
from vlv.models.decoders.sd3 import SD3Conditioner, SD3Decoder, T5Reader
from vlv.models.decoders.sdxl import SDXLConditioner, SDXLDecoder
from vlv.models.decoders.stable_diffusion import StableDiffusionDecoder, TextConditioner
from vlv.tiny import scenes
from vlv.tiny.pretrain_text import tokenizer

_TOKENS = 20  # length of the small text encoders


def decoder(prediction: str = "v_prediction", use_text_encoder: bool = True, seed: int = 0) -> StableDiffusionDecoder:
    """A Stable Diffusion as the hub has them (3-channel VAE, no extra input channels), 32 pixels."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=32, scaling_factor=0.18215,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=66, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=20, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    schedule = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction
    )
    conditioner = TextConditioner(text_encoder.eval(), tokenizer(), use_text_encoder=use_text_encoder)
    return StableDiffusionDecoder(vae.eval(), unet.eval(), conditioner, schedule, image_size=32).requires_grad_(False)


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, with CLIP's order of ids: the end mark is the highest, and fills up short texts."""
    words = [*scenes.vocabulary(), "<bos>", "<eos>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    ends = [("<bos>", len(words) - 2), ("<eos>", len(words) - 1)]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<eos>", pad_token="<eos>",
        model_max_length=_TOKENS,
    )  # fmt: skip


def _clip(cls: Any, width: int, activation: str, projection: int) -> ClipReader:
    # eos_token_id 2 is what the published configurations carry: the end mark is then found as the highest id.
    words = clip_tokenizer()
    settings = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=_TOKENS, hidden_act=activation, projection_dim=projection,
        bos_token_id=0, eos_token_id=2, pad_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    return ClipReader(cls(settings).eval(), words)


def _vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=32, **settings,
    ).eval()  # fmt: skip


def sdxl(use_text_encoder: bool = True, context: int = 40, prediction: str = "epsilon", size: int = 32) -> SDXLDecoder:
    """A Stable Diffusion XL; `context` is the width that its UNet takes, `size` in pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=context,
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(1, 2),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )  # fmt: skip
    # The hub's folder holds the configuration of a sampler; the decoder reads its noise schedule.
    sampler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1,
        prediction_type=prediction,
    )  # fmt: skip
    first, second = (
        _clip(CLIPTextModel, 16, "quick_gelu", 16),
        _clip(CLIPTextModelWithProjection, 24, "gelu", 20),
    )
    conditioner = SDXLConditioner(first, second, use_text_encoder=use_text_encoder)
    schedule = DDPMScheduler.from_config(sampler.config)
    built = SDXLDecoder(_vae(scaling_factor=0.13025), unet.eval(), conditioner, schedule, image_size=size)
    return built.requires_grad_(False)


def sd3(use_text_encoder: bool = True, t5: bool = False, size: int = 32) -> SD3Decoder:
    """A Stable Diffusion 3.5 (dual attention in the first block), `size` in pixels."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=16 + 20,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    first = _clip(CLIPTextModelWithProjection, 16, "quick_gelu", 16)
    second = _clip(CLIPTextModelWithProjection, 24, "gelu", 20)
    third = None
    if t5:
        words = tokenizer()
        settings = T5Config(
            vocab_size=len(words), d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        )  # fmt: skip
        third = T5Reader(T5EncoderModel(settings).eval(), words)
    conditioner = SD3Conditioner(first, second, third, use_text_encoder=use_text_encoder)
    vae = _vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SD3Decoder(vae, transformer.eval(), conditioner, schedule, image_size=size).requires_grad_(False)


def save(model: SDXLDecoder | SD3Decoder, folder: Path) -> Path:
    """Write a decoder as a diffusers folder."""
    denoiser = ("unet", model.unet) if isinstance(model, SDXLDecoder) else ("transformer", model.transformer)
    for name, part in (("vae", model.vae), denoiser, ("scheduler", model.scheduler)):
        part.save_pretrained(folder / name)
    text_side: Any = model.conditioner
    readers = [("", text_side.first), ("_2", text_side.second), ("_3", getattr(text_side, "t5", None))]
    for number, reader in readers:
        if reader is not None:
            reader.model.save_pretrained(folder / f"text_encoder{number}")
            reader.tokenizer.save_pretrained(folder / f"tokenizer{number}")
    return folder
