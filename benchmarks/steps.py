"""Times training steps and their controls, in turns, in one process.

    vlv data download && python -m benchmarks.steps

In a round each way does the same work once. The result is the median over rounds of control / ours, so other load on
the machine affects both. The ratios hold for the profile and the machine they were measured on.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vlv import config
from vlv.config import Config, Paths
from vlv.data.loader import Batch, Grouping, ShardLoader
from vlv.data.shards import DataError
from vlv.io import files, tables
from vlv.io.progress import meter
from vlv.models import caption_tokens, saved
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.caption_tokens import IGNORED
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.training import distributed, optim

_WINDOW = 8  # steps whose captions are sorted by length
_WORDS = 151_936  # Qwen2.5's; the tiny language model has so few that its last layer costs nothing

Work = Callable[[], None]
Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """The same work done in two ways."""

    ours: str
    control: str
    do_ours: Work
    do_control: Work


def measure(pair: Pair, rounds: int) -> dict[str, Any]:
    """Median seconds of both, and the ratio control / ours with its quartiles, after a round that is not counted."""
    times: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        # The order alternates, so that neither always runs second.
        turns = [pair.do_ours, pair.do_control] if number % 2 else [pair.do_control, pair.do_ours]
        taken = {work: _seconds(work) for work in turns}
        times.append((taken[pair.do_ours], taken[pair.do_control]))
    ours, controls = zip(*times[1:], strict=True)
    ratios = sorted(control / one for one, control in times[1:])
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {
        "ours": pair.ours, "control": pair.control, "rounds": rounds, "seconds": round(statistics.median(ours), 4),
        "control_seconds": round(statistics.median(controls), 4), "ratio": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
    }  # fmt: skip


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _step(model: torch.nn.Module, settings: config.Training, *losses: Loss) -> Work:
    """An optimizer step for each of `losses`, at learning rate 0: every round has the same weights."""
    still = settings.optimizer.model_copy(update={"weight_decay": 0.0, "group_rates": {}})
    optimizer = optim.build(optim.trainable(model), still)
    optim.set_rate(optimizer, 0.0)

    def work() -> None:
        for loss in losses:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def _bf16(on: bool = True) -> torch.autocast:
    return torch.autocast(saved.inference_device().type, torch.bfloat16, enabled=on)


# -- Stage 1 -------------------------------------------------------------------------------------------


def stage1(settings: Config, paths: Paths) -> list[Pair]:
    """Caches, precision, and one encoding for several draws."""
    s = settings.stage1.model_copy(update={"noise_samples_per_image": 2})
    model = Autoencoder.build(settings, paths).to(saved.inference_device())
    twice = Autoencoder(model.encoder, model.decoder, s)
    once = Autoencoder(model.encoder, model.decoder, s.model_copy(update={"noise_samples_per_image": 1}))
    pictures = next(ShardLoader(paths.data, "train", s.batch_size // 2).batches()).images
    assert pictures is not None
    with torch.no_grad(), _bf16():
        features, (mean, std) = model.encoder.features(pictures), model.decoder.encode(pictures)
    cached = Stage1Batch(None, features, mean, std)
    doubled = Stage1Batch(None, *(torch.cat([one, one]) for one in (features, mean, std)))

    def loss(model: Autoencoder, batch: Stage1Batch, bf16: bool = True) -> Loss:
        def compute() -> torch.Tensor:
            with _bf16(bf16):
                value: torch.Tensor = model(batch, distributed.generator(s.seed, 0))
                return value

        return compute

    ours = _step(twice, s, loss(twice, cached))
    return [
        Pair(
            "Stage 1, latents and vision features from the cache", "computed in each step",
            ours, _step(twice, s, loss(twice, Stage1Batch(pictures))),
        ),
        Pair("Stage 1, bf16", "float32", ours, _step(twice, s, loss(twice, cached, bf16=False))),
        Pair(
            "Stage 1, an image encoded once for two draws", "for each draw",
            ours, _step(once, s, loss(once, doubled)),
        ),
    ]  # fmt: skip


# -- Stage 2 -------------------------------------------------------------------------------------------


def stage2(settings: Config, paths: Paths) -> list[Pair]:
    """Caches, batches of similar length, and logits only where there is a label."""
    s = settings.stage2.model_copy(update={"learn": "mlp+llm"})
    model = Captioner.build(settings.model_copy(update={"stage2": s}), paths).to(saved.inference_device())

    def length(caption: str | None) -> int:
        return len(caption_tokens.tokenize(model.tokenizer, [caption or ""], s.max_caption_tokens).ids[0])

    def batches(grouping: Grouping | None) -> list[Batch]:
        source = ShardLoader(paths.data, "train", s.batch_size, grouping=grouping).batches()
        return [next(source) for _ in range(_WINDOW)]

    def prepared(batch: Batch) -> Stage2Batch:
        assert batch.images is not None
        captions = [caption or "" for caption in batch.captions]
        tokens = caption_tokens.tokenize(model.tokenizer, captions, s.max_caption_tokens)
        with _bf16():
            context = model.context(batch.images)
        return Stage2Batch(
            context, *caption_tokens.collate(tokens.ids, model.tokenizer.pad_token_id or 0), batch.images
        )

    def loss(batch: Stage2Batch, *, cached: bool = True) -> Loss:
        def compute() -> torch.Tensor:
            assert batch.images is not None
            with _bf16():
                context = batch.context if cached else model.context(batch.images)
                given = Stage2Batch(context, batch.ids, batch.labels)
                value: torch.Tensor = model(given, distributed.generator(s.seed, 0))
                return value

        return compute

    shuffled = [prepared(batch) for batch in batches(None)]
    alike = [prepared(batch) for batch in batches(Grouping(length, s.batch_size, _WINDOW))]
    return [
        Pair(
            "Stage 2, context from the cache", "computed in each step",
            _step(model, s, loss(shuffled[0])), _step(model, s, loss(shuffled[0], cached=False)),
        ),
        Pair(
            "Stage 2, batches of like length", "as they come",
            _step(model, s, *map(loss, alike)), _step(model, s, *map(loss, shuffled)),
        ),
        _logits(settings, paths, shuffled[0]),
    ]  # fmt: skip


def _logits(settings: Config, paths: Paths, batch: Stage2Batch) -> Pair:
    """With as many words as Qwen2.5 has; the control is the stock model's own loss on the same embeddings."""
    s = settings.stage2.model_copy(update={"learn": "mlp+llm"})
    model = Captioner.build(settings.model_copy(update={"stage2": s}), paths)
    wide = type(model.language_model.config).from_dict({**model.language_model.config.to_dict(), "vocab_size": _WORDS})
    model.language_model = AutoModelForCausalLM.from_config(wide, trust_remote_code=False).float()
    model = model.to(saved.inference_device())
    assert batch.context is not None
    context, ids, labels = (one.to(model.prefix.device) for one in (batch.context, batch.ids, batch.labels))

    def ours() -> torch.Tensor:
        with _bf16():
            loss: torch.Tensor = model(batch, distributed.generator(s.seed, 0))
            return loss

    def stock() -> torch.Tensor:
        with _bf16():
            prefix = model.prefix(context.float())
            words = model.language_model.get_input_embeddings()(ids)
            ignored = torch.full(prefix.shape[:2], IGNORED, device=labels.device)
            embeddings, all_labels = torch.cat([prefix.to(words.dtype), words], 1), torch.cat([ignored, labels], 1)
            loss: torch.Tensor = model.language_model(inputs_embeds=embeddings, labels=all_labels, use_cache=False).loss
            return loss

    # Only the last layer differs; an optimizer step for so many words would hide that.
    return Pair(
        f"Stage 2, logits where there is a label ({_WORDS:,} words)", "at all positions, the stock model's loss",
        lambda: ours().backward(), lambda: stock().backward(),
    )  # fmt: skip


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        (
            one["ours"], one["control"], f"{one['seconds']:.3f}", f"{one['control_seconds']:.3f}",
            f"**{one['ratio']:.2f}**", "{:.2f} - {:.2f}".format(*one["quartiles"]),
        )
        for one in measured
    ]  # fmt: skip
    return tables.markdown(["", "compared with", "seconds", "control", "ratio", "quartiles"], rows)


def main() -> None:
    """Measure all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of each pair (default 15)")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    paths = Paths.find()
    settings = config.load(paths)
    try:
        pairs = stage1(settings, paths) + stage2(settings, paths)
    except DataError as error:
        parser.error(str(error))
    measured = []
    with meter("Measuring", len(pairs)) as progress:
        for pair in pairs:
            measured.append(measure(pair, arguments.rounds))
            progress.advance(note=pair.ours)
    print(table(measured))
    if arguments.output:
        files.write_json(arguments.output, {"profile": settings.profile, "pairs": measured})


if __name__ == "__main__":
    main()
