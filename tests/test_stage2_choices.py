"""The choices of Stage 2, each compared with the plain way: what is trained, and how batches are made."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from tests.conftest import profile
from vlv import config
from vlv.config import ConfigError, Paths, trainable
from vlv.data.loader import Grouping, ShardLoader
from vlv.models import caption_tokens
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.models.saved import ModelFolderError
from vlv.training import blocks

GENERATOR = torch.Generator()


def _smoke(learn: str) -> config.Config:
    smoke = profile("smoke")
    return smoke.model_copy(update={"stage2": smoke.stage2.model_copy(update={"learn": learn})})


def _batch(captioner: Captioner, captions: list[str], pictures: bool = False) -> Stage2Batch:
    ids, labels = caption_tokens.collate(caption_tokens.tokenize(captioner.tokenizer, captions, 64).ids, 0)
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (len(captions), 3, 64, 64), dtype=torch.uint8, generator=draw)
    context = None if pictures else torch.randn(len(captions), 8, 128, generator=draw)
    return Stage2Batch(context, ids, labels, images if pictures else None)


CAPTIONS = ["A dog is at the top left.", "The background is pink. There is a cat at the center."]


def _learns_and_comes_back(learn: str, paths: Paths, folder: Path, pictures: bool) -> tuple[Captioner, set[str]]:
    """Train three steps, save, load; returns the trained model and the names of what moved."""
    settings = _smoke(learn)
    captioner = Captioner.build(settings, paths)
    before = {name: tensor.clone() for name, tensor in captioner.state_dict().items()}
    batch = _batch(captioner, CAPTIONS, pictures)
    optimizer = torch.optim.AdamW([p for p in captioner.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = captioner(batch, GENERATOR)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in captioner.parameters() if not p.requires_grad)
    moved = {name for name, tensor in captioner.state_dict().items() if not torch.equal(tensor, before[name])}
    captioner.save(folder, settings, paths, "card")
    again = Captioner.load(folder, paths)
    assert again(batch, GENERATOR).item() == captioner(batch, GENERATOR).item()
    return captioner, moved


def test_adapters_are_trained_saved_alone_and_loaded_strictly(paths: Paths, tmp_path: Path) -> None:
    captioner, moved = _learns_and_comes_back("mlp+lora", paths, tmp_path / "model", pictures=False)
    assert any("lora_" in name for name in moved)
    assert all("lora_" in name or name.startswith("prefix.") for name in moved), "the language model itself moved"
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    # Stage 1's tensors, the prefix and the adapters; of the language model nothing else.
    assert {name for name in tensors if name.startswith("language_model.")} == {
        name for name, _ in captioner.named_parameters() if "lora_" in name
    }
    lost = next(name for name in tensors if "lora_A" in name)
    safetensors.torch.save_file({name: t for name, t in tensors.items() if name != lost}, weights)
    with pytest.raises(ModelFolderError, match=r"1 tensors are missing.*lora_A"):
        Captioner.load(tmp_path / "model", paths)


def test_a_new_adapter_changes_nothing_and_an_unknown_target_is_refused(paths: Paths) -> None:
    plain, adapted = (Captioner.build(_smoke(learn), paths) for learn in ("mlp", "mlp+lora"))
    batch = _batch(plain, CAPTIONS)
    assert adapted(batch, GENERATOR).item() == pytest.approx(plain(batch, GENERATOR).item(), rel=1e-6)
    settings = _smoke("mlp+lora")
    wrong = settings.stage2.model_copy(update={"lora": config.Lora(targets=["q_prj"])})
    with pytest.raises(ConfigError, match=r"\['q_prj'\].*q_proj"):
        Captioner.build(settings.model_copy(update={"stage2": wrong}), paths)


def test_the_encoder_is_trained_through_the_frozen_text_encoder_and_saved(paths: Paths, tmp_path: Path) -> None:
    captioner, moved = _learns_and_comes_back("mlp+llm+encoder", paths, tmp_path / "model", pictures=True)
    assert {"encoder.queries", "prefix.positions"} <= moved
    assert any(name.startswith("encoder.florence.model.language_model.encoder") for name in moved)
    assert any(name.startswith("language_model.") for name in moved)
    assert not any(name.startswith(("conditioner.", "encoder.florence.model.vision_tower")) for name in moved)
    saved = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(saved["encoder.queries"], captioner.encoder.queries)


@pytest.mark.parametrize("learn", ["mlp+llm", "mlp+llm+encoder"])
def test_recomputed_activations_change_no_gradient(paths: Paths, learn: str) -> None:
    plain, thrifty = (Captioner.build(_smoke(learn), paths) for _ in range(2))
    assert blocks.recompute(thrifty) >= 4
    batch = _batch(plain, CAPTIONS, pictures=True)
    for captioner in (plain, thrifty):
        captioner(batch, GENERATOR).backward()
    ours, theirs = ({n: p.grad for n, p in c.named_parameters() if p.grad is not None} for c in (thrifty, plain))
    assert ours and ours.keys() == theirs.keys()
    assert [name for name, gradient in ours.items() if not torch.equal(gradient, theirs[name])] == []


def test_frozen_matrices_in_bf16_compute_what_autocast_would(paths: Paths) -> None:
    plain, half = (Captioner.build(_smoke("mlp"), paths) for _ in range(2))
    blocks.store_frozen_in_bf16(half)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    size, whole = (sum(p.nbytes for p in model.language_model.parameters()) for model in (half, plain))
    assert size < 0.6 * whole
    batch = _batch(plain, CAPTIONS, pictures=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model(batch, GENERATOR).item() for model in (half, plain))
    assert ours == theirs


# -- batches of similar length --------------------------------------------------------------------------


def _loader(data: Path, words: int | None, **options: int) -> ShardLoader:
    def length(caption: str | None) -> int:
        return len((caption or "").split())

    grouping = None if words is None else Grouping(length, step_size=10, window=words)
    return ShardLoader(data, "train", options.pop("batch", 10), seed=3, grouping=grouping, **options)


def test_grouped_batches_hold_the_same_samples_and_less_padding(scene_data: Path) -> None:
    def padding(loader: ShardLoader) -> tuple[int, list[set[str]]]:
        source, wasted, windows = loader.batches(), 0, []
        for _ in range(2):  # windows of 5 steps of 10
            batches = [next(source) for _ in range(5)]
            lengths = [[len((c or "").split()) for c in batch.captions] for batch in batches]
            wasted += sum(max(row) * len(row) - sum(row) for row in lengths)
            windows.append({key for batch in batches for key in batch.keys})
        return wasted, windows

    grouped, shuffled = padding(_loader(scene_data, 5)), padding(_loader(scene_data, None))
    assert grouped[1] == shuffled[1], "a window's samples are the same"
    assert grouped[0] < 0.5 * shuffled[0]


def test_grouped_order_is_a_function_of_the_step_whatever_the_division(scene_data: Path) -> None:
    whole = _loader(scene_data, 3).batches()
    steps = [next(whole).keys for _ in range(8)]
    later = _loader(scene_data, 3).batches(5)
    assert [next(later).keys for _ in range(3)] == steps[5:]
    ranks = [_loader(scene_data, 3, rank=rank, world_size=2).batches() for rank in range(2)]
    assert [next(ranks[0]).keys + next(ranks[1]).keys for _ in range(8)] == steps
    halves = _loader(scene_data, 3, batch=5).batches()  # two micro-batches in a step
    assert [next(halves).keys + next(halves).keys for _ in range(8)] == steps


def test_no_token_s_loss_depends_on_its_batch(paths: Paths, scene_data: Path) -> None:
    """Bucketed, shuffled (padded), and one by one: the same sum over the same samples."""
    captioner = Captioner.build(_smoke("mlp"), paths)
    contexts: dict[str, torch.Tensor] = {}
    draw = torch.Generator().manual_seed(0)

    def total(loader: ShardLoader, size: int) -> tuple[float, int]:
        source, loss, tokens = loader.batches(), 0.0, 0
        for _ in range(5):
            batch = next(source)
            pairs = list(zip(batch.keys, [c or "" for c in batch.captions], strict=True))
            for i in range(0, len(pairs), size):
                for key, _ in pairs[i : i + size]:
                    contexts.setdefault(key, torch.randn(8, 128, generator=draw))
                context = torch.stack([contexts[key] for key, _ in pairs[i : i + size]])
                ids, labels = caption_tokens.collate(
                    caption_tokens.tokenize(captioner.tokenizer, [c for _, c in pairs[i : i + size]], 64).ids, 0
                )
                part = Stage2Batch(context, ids, labels)
                with torch.no_grad():
                    loss += captioner(part, GENERATOR).item() * captioner.loss_weight(part)
                tokens += captioner.loss_weight(part)
        return loss / tokens, tokens

    bucketed, count = total(_loader(scene_data, 5), 10)
    padded, again = total(_loader(scene_data, None), 10)
    single, _ = total(_loader(scene_data, 5), 1)
    assert count == again
    assert bucketed == pytest.approx(padded, abs=1e-5)
    assert bucketed == pytest.approx(single, abs=1e-5)


def test_logits_equal_the_stock_model_on_the_same_embeddings(paths: Paths) -> None:
    captioner = Captioner.build(_smoke("mlp+lora"), paths)
    batch = _batch(captioner, CAPTIONS)
    assert batch.context is not None
    words = captioner.language_model.get_input_embeddings()(batch.ids)
    stock = captioner.language_model(inputs_embeds=torch.cat([captioner.prefix(batch.context), words], 1)).logits
    predicted = stock[:, 7:-1].flatten(0, 1)
    expected = F.cross_entropy(predicted, batch.labels.flatten())
    assert captioner(batch, GENERATOR).item() == pytest.approx(expected.item(), rel=1e-6)


def test_features_are_cached_only_for_a_frozen_tower_and_a_trained_encoder() -> None:
    smoke = profile("smoke").model_dump(by_alias=True)
    smoke["stage2"] |= {"cache_features": True}
    with pytest.raises(ValueError, match="a frozen encoder's context is cached anyway"):
        config.Config.model_validate(smoke)
    smoke["stage2"] |= {"learn": "mlp+llm+encoder"}
    assert config.Config.model_validate(smoke).stage2.cache_features


@pytest.mark.parametrize(("stage", "table"), [("stage1", trainable.STAGE1), ("stage2", trainable.STAGE2)])
def test_every_row_of_the_table_is_a_choice_and_nothing_else_is(stage: str, table: dict[str, trainable.Parts]) -> None:
    smoke = profile("smoke").model_dump(by_alias=True)
    smoke["stage1"]["cache_features"] = False
    for learn in table:
        smoke[stage]["learn"] = learn
        assert getattr(config.Config.model_validate(smoke), stage).trained_parts == table[learn]
    smoke[stage]["learn"] = "everything"
    with pytest.raises(ValueError, match=f"'everything' is not one of: {', '.join(table)}".replace("+", r"\+")):
        config.Config.model_validate(smoke)


def test_a_new_choice_is_one_row(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder and the prefix, with a frozen language model, is a choice that the table does not have."""
    rows = {**trainable.STAGE2, "mlp+encoder": trainable.Parts({trainable.ENCODER})}
    monkeypatch.setattr(trainable, "STAGE2", rows)
    captioner = Captioner.build(_smoke("mlp+encoder"), paths)
    assert {name.split(".")[0] for name, p in captioner.named_parameters() if p.requires_grad} == {"encoder", "prefix"}
