"""The frozen decoder against diffusers' and transformers' own components."""

import pytest
import torch
import torch.nn.functional as F

from tests import small_models
from vlv.config import Timesteps
from vlv.models.decoders.base import draw_timesteps

UNIFORM = Timesteps(mode="uniform")


def test_condition_is_bit_identical_to_the_stock_text_encoder() -> None:
    decoder = small_models.decoder()
    stock = decoder.conditioner.text_encoder
    ids = decoder.conditioner.tokenize(["A dog is at the top left.", ""])
    with torch.no_grad():
        expected = stock(input_ids=ids).last_hidden_state
        assert torch.equal(decoder.embed_text(["A dog is at the top left.", ""]), expected)
        assert torch.equal(decoder.condition(stock.embeddings.token_embedding(ids)), expected)
        shorter = decoder.condition(stock.embeddings.token_embedding(ids[:, :7]))
        assert torch.allclose(shorter, expected[:, :7], atol=1e-6), "the mask is not causal"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_equals_diffusers_components_composed_by_hand(prediction: str) -> None:
    decoder = small_models.decoder(prediction)
    latents, context = torch.randn(4, 4, 16, 16), torch.randn(4, 9, 24)
    loss = decoder.loss(latents, context, torch.Generator().manual_seed(5), UNIFORM)

    draw = torch.Generator().manual_seed(5)
    t = torch.randint(1000, (4,), generator=draw)
    noise = torch.randn(latents.shape, generator=draw)
    noisy = decoder.scheduler.add_noise(latents, noise, t)
    predicted = decoder.unet(noisy, t, encoder_hidden_states=context).sample
    target = noise if prediction == "epsilon" else decoder.scheduler.get_velocity(latents, noise, t)
    expected = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
    assert torch.equal(loss, expected)


def test_same_noise_and_l1_and_a_batch_of_n_equals_n_batches_of_one() -> None:
    decoder = small_models.decoder("epsilon")
    latents, context = torch.randn(3, 4, 16, 16), torch.randn(3, 9, 24)
    fixed = Timesteps(mode="fixed", fixed=400)

    def loss(rows: slice) -> torch.Tensor:
        return decoder.loss(
            latents[rows], context[rows], torch.Generator().manual_seed(5), fixed, kind="l1", same_noise=True
        )

    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(5)).expand(3, -1, -1, -1)
    t = torch.full((3,), 400)
    predicted = decoder.unet(decoder.scheduler.add_noise(latents, noise, t), t, context).sample
    together = loss(slice(None))
    assert torch.equal(together, F.l1_loss(predicted, noise, reduction="none").mean((1, 2, 3)))
    alone = torch.cat([loss(slice(i, i + 1)) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5)


def test_latents_are_scaled_as_the_vae_config_says() -> None:
    decoder = small_models.decoder()
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        mean, std = decoder.encode(batch)
        posterior = decoder.vae.encode(batch.float() / 127.5 - 1).latent_dist
        assert torch.allclose(mean, posterior.mean * 0.18215) and torch.allclose(std, posterior.std * 0.18215)
        assert decoder.decode(mean).shape == (2, 3, 32, 32) and decoder.decode(mean).dtype == torch.uint8


def test_a_sample_depends_on_its_seed_and_not_on_its_batch() -> None:
    decoder = small_models.decoder()
    context = torch.randn(3, 20, 24)
    together = decoder.sample(context, [7, 8, 9], steps=3, guidance=2.0)
    alone = decoder.sample(context[1:2], [8], steps=3, guidance=2.0)
    difference = (together[1].int() - alone[0].int()).abs().max()
    assert difference <= 1, "except for rounding, the rest of the batch must not matter"
    assert (together[0].int() - together[1].int()).abs().max() > 5


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        (Timesteps(mode="fixed", fixed=321), 321, 322),
        (Timesteps(mode="uniform", high_noise_share=1.0, high_noise_from=600), 600, 1000),
        (Timesteps(mode="stratified"), 0, 1000),
        (Timesteps(mode="logit_normal"), 0, 1000),
    ],
)
def test_timesteps_stay_in_their_range(settings: Timesteps, low: int, high: int) -> None:
    drawn = draw_timesteps(settings, 500, 1000, torch.Generator().manual_seed(0))
    assert low <= int(drawn.min()) and int(drawn.max()) < high
    if settings.mode == "stratified":
        assert len(set((drawn // 2).tolist())) == 500, "every slice of the schedule is drawn once"
    if settings.mode == "logit_normal":
        middle = ((drawn >= 269) & (drawn < 731)).float().mean()
        assert middle == pytest.approx(0.683, abs=0.06), (
            "one standard deviation of the normal: sigmoid(-1) to sigmoid(1)"
        )
