"""Small models of the real classes with random weights, made on the spot."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from vlv.models.conditioner import TextConditioner
from vlv.models.decoder import StableDiffusionDecoder
from vlv.pretraining.text import tokenizer


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
