"""Stage 2's model against the stock language model; it stops at the end token."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import profile
from vlv import config
from vlv.config import Paths, trainable
from vlv.models import caption_tokens
from vlv.models.captioner import Captioner, Stage2Batch

CAPTIONS = ["A dog is at the top left.", "The background is pink. There is a cat at the center."]


@pytest.fixture(scope="module")
def captioner(paths: Paths) -> Captioner:
    return Captioner.build(_smoke(), paths)


def _smoke() -> config.Config:
    return profile("smoke")


def _batch(captioner: Captioner, captions: list[str]) -> Stage2Batch:
    tokens = caption_tokens.tokenize(captioner.tokenizer, captions, 64)
    ids, labels = caption_tokens.collate(tokens.ids, 0)
    context = torch.randn(len(captions), 8, 128, generator=torch.Generator().manual_seed(len(captions[0])))
    return Stage2Batch(context, ids, labels)


def test_loss_equals_the_stock_model_on_the_same_embeddings(captioner: Captioner) -> None:
    batch = _batch(captioner, CAPTIONS)
    prefix = captioner.prefix(batch.context)
    words = captioner.language_model.get_input_embeddings()(batch.ids)
    labels = torch.cat([torch.full((2, 8), -100), batch.labels], 1)
    stock = captioner.language_model(inputs_embeds=torch.cat([prefix, words], 1), labels=labels)
    ours = captioner(batch, torch.Generator())
    assert ours.item() == pytest.approx(stock.loss.item(), rel=1e-5)


def test_padding_does_not_change_the_loss_of_a_token(captioner: Captioner) -> None:
    both = _batch(captioner, CAPTIONS)
    alone = [
        Stage2Batch(both.context[i : i + 1], *caption_tokens.collate([both.ids[i][both.labels[i] != -100].tolist()], 0))
        for i in range(2)
    ]
    counts = [(b.labels != -100).sum() for b in alone]
    total = sum(captioner(b, torch.Generator()) * n for b, n in zip(alone, counts, strict=True)) / sum(counts)
    assert captioner(both, torch.Generator()).item() == pytest.approx(total.item(), rel=1e-5)


def test_it_learns_two_captions_and_stops_by_itself(paths: Paths) -> None:
    captioner = Captioner.build(_smoke(), paths)
    batch = _batch(captioner, CAPTIONS)
    optimizer = torch.optim.AdamW([p for p in captioner.parameters() if p.requires_grad], 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        captioner(batch, torch.Generator()).backward()
        optimizer.step()
    assert captioner.eval().write(batch.context) == CAPTIONS


def test_the_language_models_own_tokenizer_is_used(captioner: Captioner) -> None:
    """AutoTokenizer would build a Qwen2Tokenizer here, whose ids mean other words."""
    assert captioner.tokenizer.decode(captioner.tokenizer("A dog.")["input_ids"], skip_special_tokens=True) == "A dog."


def test_new_weights_are_float32_whatever_the_dtype_of_the_shipped_weights(captioner: Captioner) -> None:
    assert {p.dtype for p in captioner.parameters()} == {torch.float32}


def test_exactly_the_chosen_parts_are_trainable(captioner: Captioner) -> None:
    captioner.set_trainable(trainable.STAGE2["mlp"], trainable.STAGE1["all"])
    assert {n.split(".")[0] for n, p in captioner.named_parameters() if p.requires_grad} == {"prefix"}
    captioner.set_trainable(trainable.STAGE2["mlp+llm"], trainable.STAGE1["all"])
    assert {n.split(".")[0] for n, p in captioner.named_parameters() if p.requires_grad} == {"prefix", "language_model"}


def test_the_loss_shifts_labels_by_one(captioner: Captioner) -> None:
    """The first word is predicted from the prefix alone: changing later words must not change its loss."""
    a = Stage2Batch(torch.ones(1, 8, 128), torch.tensor([[5, 6, 7]]), torch.tensor([[5, -100, -100]]))
    b = Stage2Batch(a.context, torch.tensor([[5, 9, 11]]), a.labels)
    assert torch.equal(captioner(a, torch.Generator()), captioner(b, torch.Generator()))
    states = captioner.language_model.base_model(inputs_embeds=captioner.prefix(a.context)).last_hidden_state
    logits = captioner.language_model.get_output_embeddings()(states[:, -1])
    assert captioner(a, torch.Generator()).item() == pytest.approx(
        F.cross_entropy(logits, torch.tensor([5])).item(), rel=1e-5
    )


def test_a_standardised_prefix_scales_differences_to_one_and_is_saved(paths: Paths, tmp_path: Path) -> None:
    captioner = Captioner.build(_smoke(), paths)
    context = torch.randn(500, 8, 128) * 0.1 + 7.0
    before = captioner.prefix(context)
    captioner.prefix.standardise(context.mean(0), context.std(0))
    seen = (context - captioner.prefix.mean) / captioner.prefix.std
    assert seen.mean().abs() < 1e-3 and abs(seen.std() - 1) < 1e-2
    assert torch.allclose(captioner.prefix(context), captioner.prefix.layers(seen) + captioner.prefix.positions)
    assert captioner.prefix(context).std(0).mean() > 3 * before.std(0).mean()
    captioner.save(tmp_path / "model", _smoke(), paths, "card")
    loaded = Captioner.load(tmp_path / "model", paths)
    assert torch.equal(loaded.prefix(context), captioner.prefix(context))
