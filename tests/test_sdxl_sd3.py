"""Stable Diffusion XL and 3.5 as decoders, against diffusers' own components and pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline

from tests import small_models
from tests.conftest import profile
from vlv import config
from vlv.config import ConfigError, Paths, Timesteps, trainable
from vlv.io.images import Preprocessing
from vlv.models import build
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner
from vlv.models.decoders.base import Context
from vlv.models.decoders.sd3 import SD3Decoder
from vlv.models.decoders.sdxl import SDXLDecoder
from vlv.models.decoders.stable_diffusion import StableDiffusionDecoder

PROMPTS = ["A dog is at the top left.", "The background is pink. There is a cat at the center."]
UNIFORM = Timesteps(mode="uniform")
KINDS = ["sdxl", "sd3"]


def _small(kind: str, **options: Any) -> SDXLDecoder | SD3Decoder:
    return small_models.sdxl(**options) if kind == "sdxl" else small_models.sd3(**options)


def _pipeline(model: SDXLDecoder | SD3Decoder) -> Any:
    """The stock pipeline of the same parts, with the decoder's sampler."""
    text_side = model.conditioner
    parts = {
        "vae": model.vae, "scheduler": model.sampler(),
        "text_encoder": text_side.first.model, "tokenizer": text_side.first.tokenizer,
        "text_encoder_2": text_side.second.model, "tokenizer_2": text_side.second.tokenizer,
    }  # fmt: skip
    if isinstance(model, SDXLDecoder):
        pipeline = StableDiffusionXLPipeline(**parts, unet=model.unet, add_watermarker=False)
    else:
        t5 = text_side.t5
        third = {"text_encoder_3": t5.model if t5 else None, "tokenizer_3": t5.tokenizer if t5 else None}
        pipeline = StableDiffusion3Pipeline(**parts, **third, transformer=model.transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _words(model: Any, prompt: str) -> torch.Tensor:
    """A prompt's word embeddings of both CLIP encoders, side by side (1, T, W), up to its end mark."""
    readers = (model.conditioner.first, model.conditioner.second)
    ids = torch.tensor([readers[0].tokenizer(prompt)["input_ids"]])
    return torch.cat([reader.model.get_input_embeddings()(ids) for reader in readers], -1)


# -- the text side ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_words_give_the_stock_pipeline_s_context_and_pooled_vector(kind: str) -> None:
    model = _small(kind)
    options = {"prompt_2": None, "prompt_3": None} if kind == "sd3" else {}
    for prompt in PROMPTS:
        with torch.no_grad():
            states, _, pooled, _ = _pipeline(model).encode_prompt(prompt, device="cpu", **options)
            words = _words(model, prompt)
            ours = model.condition(words)
            length = words.shape[1]
            width = ours.states.shape[-1]
            # Not to the bit: the stock encoder read the padding too, so its products have other shapes.
            assert torch.allclose(ours.states, states[:, :length, :width], atol=1e-6)
            assert torch.allclose(ours.pooled, pooled, atol=1e-6)
            assert torch.equal(model.conditioner.states(words), ours.states), "what Stage 2 reads"
            if isinstance(model, SD3Decoder):
                stock = model.embed_text([prompt])
                assert torch.equal(model._joint(stock), states), "zeros beside CLIP's states and in T5's place"


def test_t5_takes_part_on_request() -> None:
    model = small_models.sd3(t5=True)
    with torch.no_grad():
        states, _, _, _ = _pipeline(model).encode_prompt(PROMPTS[0], None, None, device="cpu")
        assert torch.equal(model._joint(model.embed_text(PROMPTS[:1])), states)
        t5 = model.conditioner.t5
        assert t5 is not None
        ids = torch.tensor([t5.tokenizer(PROMPTS[0])["input_ids"]])
        words = torch.cat([torch.randn(1, ids.shape[1], 40), t5.model.get_input_embeddings()(ids)], -1)
        context = model.condition(words)
        assert context.t5 is not None and torch.equal(context.t5, t5.model(input_ids=ids).last_hidden_state)
        assert model.conditioner.states(words).shape == words.shape == (1, ids.shape[1], model.conditioner.width)
        assert model.sample(context, [3], steps=2, guidance=2.0).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_text_encoders_embeddings_are_the_states_and_the_summary_follows_them(kind: str) -> None:
    through, direct = _small(kind), _small(kind, use_text_encoder=False)
    embeddings = torch.randn(2, 9, 40, requires_grad=True)
    given = direct.condition(embeddings)
    assert torch.equal(given.states, embeddings)
    states = through.condition(embeddings).states
    assert torch.equal(direct.condition(states).pooled, through.condition(embeddings).pooled)
    (gradient,) = torch.autograd.grad(given.pooled.sum(), embeddings)
    assert gradient[:, 0].abs().max() > 0, "the first query reaches the summary, through the last layer's attention"


# -- the loss --------------------------------------------------------------------------------------------


def test_sdxl_loss_equals_diffusers_components_composed_by_hand() -> None:
    model = small_models.sdxl()
    latents, context = torch.randn(4, 4, 16, 16), Context(torch.randn(4, 9, 40), torch.randn(4, 20))
    loss = model.loss(latents, context, torch.Generator().manual_seed(5), UNIFORM)

    draw = torch.Generator().manual_seed(5)
    t = torch.randint(1000, (4,), generator=draw)
    noise = torch.randn(latents.shape, generator=draw)
    pipeline = _pipeline(model)
    time_ids = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 20).repeat(4, 1)
    added = {"text_embeds": context.pooled, "time_ids": time_ids}
    noisy = model.scheduler.add_noise(latents, noise, t)
    predicted = model.unet(noisy, t, encoder_hidden_states=context.states, added_cond_kwargs=added).sample
    assert torch.equal(loss, F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)))


def test_sd3_loss_equals_diffusers_components_composed_by_hand() -> None:
    model = small_models.sd3()
    latents, context = torch.randn(4, 4, 16, 16), Context(torch.randn(4, 9, 40), torch.randn(4, 36))
    loss = model.loss(latents, context, torch.Generator().manual_seed(5), Timesteps(mode="logit_normal"))

    draw = torch.Generator().manual_seed(5)
    share = torch.normal(0.0, 1.0, (4,), generator=draw).sigmoid()
    timesteps = model.scheduler.timesteps[999 - (share * 1000).long()]  # listed from the noisiest on
    noise = torch.randn(latents.shape, generator=draw)
    noisy = model.scheduler.scale_noise(latents, timesteps, noise)
    joint = torch.cat([F.pad(context.states, (0, 8)), torch.zeros(4, 256, 48)], 1)
    predicted = model.transformer(
        hidden_states=noisy, timestep=timesteps, encoder_hidden_states=joint, pooled_projections=context.pooled
    ).sample
    assert torch.equal(loss, F.mse_loss(predicted, noise - latents, reduction="none").mean((1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_carry_shift_and_scale_of_the_vae_config(kind: str) -> None:
    model = _small(kind)
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        mean, std = model.encode(batch)
        posterior = model.vae.encode(batch.float() / 127.5 - 1).latent_dist
        shift, scale = (0.0, 0.13025) if kind == "sdxl" else (0.0609, 1.5305)
        assert torch.allclose(mean, (posterior.mean - shift) * scale)
        assert torch.allclose(std, posterior.std * scale)


# -- drawing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_from_prompts_are_the_stock_pipeline_s(kind: str, guidance: float) -> None:
    model = _small(kind)
    seeds = [7, 8]
    ours = model.sample(model.embed_text(PROMPTS), seeds, steps=4, guidance=guidance)
    assert ours.shape == (2, 3, 32, 32) and ours.dtype == torch.uint8
    latents = torch.stack([torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    stock = _pipeline(model)(
        PROMPTS, latents=latents, num_inference_steps=4, guidance_scale=guidance, output_type="pt"
    ).images
    assert (ours.int() - (stock * 255).round().int()).abs().max() <= 1, "rounding apart"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(kind: str) -> None:
    model = _small(kind)
    embeddings = torch.randn(3, 9, 40)
    together = model.sample(model.condition(embeddings), [7, 8, 9], steps=3, guidance=2.0)
    again = model.sample(model.condition(embeddings), [7, 8, 9], steps=3, guidance=2.0)
    alone = model.sample(model.condition(embeddings[1:2]), [8], steps=3, guidance=2.0)
    assert torch.equal(together, again)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1, "rounding apart, neighbours must not matter"
    assert (together[0].int() - together[1].int()).abs().max() > 5


# -- training --------------------------------------------------------------------------------------------


def _pictures() -> torch.Tensor:
    """Four pictures (4, 3, 16, 16) uint8 of one colour each, darker towards the bottom."""
    colours = torch.tensor([[250, 40, 40], [40, 220, 60], [50, 70, 250], [240, 230, 60]])
    shade = torch.linspace(1.0, 0.4, 16).view(1, 1, 16, 1)
    return (colours.view(4, 3, 1, 1) * shade).expand(4, 3, 16, 16).to(torch.uint8)


# Where the picture can hardly be seen in its noise, the context decides.
HIGH_NOISE = Timesteps(mode="uniform", high_noise_share=1.0, high_noise_from=850)


def _train(module: torch.nn.Module, loss: Callable[[torch.Generator], torch.Tensor], steps: int) -> None:
    """Of all that has a gradient."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 3e-3, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        loss(torch.Generator().manual_seed(step)).backward()
        optimizer.step()


@torch.no_grad()
def _mean(loss: Callable[[torch.Generator], torch.Tensor]) -> float:
    """Over the same 16 draws whenever it is asked."""
    return sum(loss(torch.Generator().manual_seed(1000 + i)).item() for i in range(16)) / 16


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_on_four_pictures_lower_the_loss_and_move_nothing_frozen(kind: str, paths: Paths) -> None:
    model = _small(kind, size=16, **({"prediction": "v_prediction"} if kind == "sdxl" else {}))
    pictures = _pictures()
    with torch.no_grad():
        scale = model.vae.config.scaling_factor / model.encode(pictures)[0].std().item()
        model.vae.register_to_config(scaling_factor=scale)  # an untrained VAE's latents, brought to std 1
        latents = model.encode(pictures)[0]
        context = model.embed_text([f"A {name} is at the center." for name in ("dog", "cat", "rose", "pizza")])

    def from_text(draw: torch.Generator) -> torch.Tensor:
        return model.loss(latents, context, draw, HIGH_NOISE).mean()

    # A random denoiser could teach nothing: this one first learns which text belongs to which picture.
    (model.unet if isinstance(model, SDXLDecoder) else model.transformer).requires_grad_(True)
    _train(model, from_text, 120)

    smoke = profile("smoke")
    torch.manual_seed(0)
    section = smoke.encoder.model_copy(update={"weights": "pretrained"})
    encoder = build.encoder(section, Preprocessing(16, "bicubic", 64), model.conditioner.width, paths, None)
    encoder.set_trainable(trainable.STAGE1["queries_only"])
    settings = smoke.stage1.model_copy(update={"timesteps": HIGH_NOISE, "noise_samples_per_image": 1})
    autoencoder = Autoencoder(encoder, model, settings)
    with torch.no_grad():
        batch = Stage1Batch(None, encoder.features(pictures), latents, torch.zeros_like(latents))

    def from_pictures(draw: torch.Generator) -> torch.Tensor:
        loss: torch.Tensor = autoencoder(batch, draw)
        return loss

    before, start = {n: t.clone() for n, t in autoencoder.state_dict().items()}, _mean(from_pictures)
    _train(autoencoder, from_pictures, 200)
    assert _mean(from_pictures) < 0.65 * start
    moved = {n for n, t in autoencoder.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n, p in autoencoder.named_parameters() if p.requires_grad}
    assert not any(n.startswith("decoder.") for n in moved)


# -- from a folder ---------------------------------------------------------------------------------------


def _section(kind: str, folder: Path, **options: Any) -> config.Decoder:
    given = {"kind": kind, "pretrained": str(folder), "weights": "pretrained", "image_size": 32, **options}
    return config.Decoder.model_validate({"use_text_encoder": True, **given})


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_diffusers_form_is_loaded_and_serves_both_stages(kind: str, paths: Paths, tmp_path: Path) -> None:
    model = _small(kind)
    folder = small_models.save(model, tmp_path / "decoder")
    section = _section(kind, folder)
    again = build.decoder(section, paths)
    embeddings = torch.randn(2, 9, 40)
    latents = torch.randn(2, 4, 16, 16)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    with torch.no_grad():
        expected = model.loss(latents, model.condition(embeddings), draws[0], UNIFORM)
        assert torch.equal(again.loss(latents, again.condition(embeddings), draws[1], UNIFORM), expected)

    smoke = profile("smoke")
    encoder = smoke.encoder.model_copy(update={"start_on_text_side": False})
    data = smoke.data.model_copy(update={"image_size": 32})
    settings = smoke.model_copy(update={"data": data, "decoder": section, "encoder": encoder})
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    autoencoder = Autoencoder.build(settings, paths)
    autoencoder.save(tmp_path / "stage1", settings, paths, "card")
    loaded = Autoencoder.load(tmp_path / "stage1", paths)
    assert torch.equal(loaded.context(pixels).pooled, autoencoder.context(pixels).pooled)
    context = Captioner.build(settings, paths).context(pixels)
    assert context.shape == (2, smoke.encoder.queries, 40)


def test_parts_that_do_not_fit_together_are_refused_before_work_starts(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes a context of width 32, but the text side gives 40"):
        small_models.sdxl(context=32)
    sd = small_models.decoder()
    other = small_models.decoder()
    other.unet.register_to_config(cross_attention_dim=32)
    with pytest.raises(ValueError, match="width 32, but the text side gives 24"):
        StableDiffusionDecoder(other.vae, other.unet, sd.conditioner, sd.scheduler, image_size=32)
    folder = small_models.save(small_models.sd3(), tmp_path / "decoder")
    with pytest.raises(build.PretrainedError, match="image_size 30 must be a multiple of 4"):
        build.decoder(_section("sd3", folder, image_size=30), paths)
    with pytest.raises(build.PretrainedError, match="text_encoder_3"):
        build.decoder(_section("sd3", folder, options={"use_t5": True}), paths)
    with pytest.raises(ConfigError, match=r"decoder\.options\.use_t5: .* The options of kind sdxl: none"):
        build.conditioner(_section("sdxl", folder, options={"use_t5": True}), paths)
    with pytest.raises(ConfigError, match=r"decoder\.use_t5 is now decoder\.options\.use_t5"):
        config.validate({"decoder": {"use_t5": True}}, "params.yaml")
