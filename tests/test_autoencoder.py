"""Stage 1's model: which parameters are trained, which stay frozen, and the loss against stock modules."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import profile
from vlv import config
from vlv.config import Paths
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.saved import ModelFolderError


@pytest.fixture(scope="module")
def smoke() -> config.Config:
    return profile("smoke")


def _batch(count: int = 3) -> Stage1Batch:
    pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Stage1Batch(pixels)


@pytest.mark.parametrize("direct", [False, True])
def test_after_three_steps_all_frozen_tensors_are_bit_identical(
    smoke: config.Config, paths: Paths, direct: bool
) -> None:
    decoder = smoke.decoder.model_copy(update={"use_text_encoder": not direct})
    model = Autoencoder.build(smoke.model_copy(update={"decoder": decoder}), paths)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("decoder.", "encoder.florence.model.vision_tower")) for name in learning)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        model(_batch(), torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    assert model.encoder.queries.grad is not None and model.encoder.queries.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    without_gradient = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without_gradient, "trainable, but nothing reads them"
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= learning and "encoder.queries" in moved


def test_loss_and_gradient_equal_the_formula_composed_from_stock_modules(smoke: config.Config, paths: Paths) -> None:
    stage1 = smoke.stage1.model_copy(
        update={"noise_samples_per_image": 1, "timesteps": config.Timesteps(mode="fixed", fixed=500)}
    )
    model = Autoencoder.build(smoke.model_copy(update={"stage1": stage1}), paths)
    florence, decoder = model.encoder.florence, model.decoder
    batch = _batch()
    loss = model(batch, torch.Generator().manual_seed(4))
    (ours,) = torch.autograd.grad(loss, model.encoder.queries)

    draw = torch.Generator().manual_seed(4)
    assert batch.images is not None
    x = batch.images.float() / 127.5 - 1
    posterior = decoder.vae.encode(F.pixel_unshuffle(x, 2)).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draw)
    noise = torch.randn(latents.shape, generator=draw)
    t = torch.full((3,), 500)
    image_states = florence.model.get_image_features(x).pooler_output  # this encoder's image mean and std are 0.5
    states = florence.model.language_model.encoder(inputs_embeds=image_states).last_hidden_state
    queries = model.encoder.queries.expand(3, -1, -1)
    decoded = florence.model.language_model.decoder(inputs_embeds=queries, encoder_hidden_states=states)
    embeddings = model.encoder.projection(decoded.last_hidden_state)
    context = decoder.condition(embeddings)
    noisy = decoder.scheduler.add_noise(latents, noise, t)
    predicted = decoder.unet(torch.cat([noisy, decoder.coordinates.expand(3, -1, -1, -1)], 1), t, context).sample
    expected = F.mse_loss(predicted, decoder.scheduler.get_velocity(latents, noise, t))
    (theirs,) = torch.autograd.grad(expected, model.encoder.queries)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) >= 0.9999


def test_saving_and_loading_is_exact_and_strict(smoke: config.Config, paths: Paths, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Autoencoder.build(smoke, paths)
    with torch.no_grad():
        model.encoder.queries.add_(1.0)
    model.save(tmp_path / "model", smoke, paths, "card")
    again = Autoencoder.load(tmp_path / "model", paths)
    images = _batch().images
    assert images is not None
    assert torch.equal(model.context(images), again.context(images))

    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model" / "model.safetensors")
    queries = tensors.pop("queries")
    save_file({**tensors, "qeuries": queries}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"missing \['queries'\].*unexpected \['qeuries'\]"):
        Autoencoder.load(tmp_path / "model", paths)
    with pytest.raises(ModelFolderError, match="not a vlv-captioner-2"):
        from vlv.models.captioner import Captioner

        Captioner.load(tmp_path / "model", paths)


def test_another_pretrained_part_is_refused(smoke: config.Config, paths: Paths, tmp_path) -> None:  # type: ignore[no-untyped-def]
    import json

    Autoencoder.build(smoke, paths).save(tmp_path / "model", smoke, paths, "card")
    settings = tmp_path / "model" / "config.json"
    value = json.loads(settings.read_text())
    value["parts"]["decoder"]["sha256"] = "0" * 64
    settings.write_text(json.dumps(value))
    with pytest.raises(ModelFolderError, match="trained with another decoder"):
        Autoencoder.load(tmp_path / "model", paths)


def test_the_projection_starts_on_the_text_side(smoke: config.Config, paths: Paths) -> None:
    from vlv.models import build

    model = Autoencoder.build(smoke, paths)
    mean, std = build.text_statistics(smoke.decoder, paths, smoke.encoder.queries)
    images = _batch(8).images
    assert images is not None
    embeddings = model.encoder(model.encoder.features(images))
    assert (embeddings - mean).abs().mean() < std.mean()
