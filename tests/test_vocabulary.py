"""Words that the tokenizer does not hold are counted and named, and they stop the run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import ROOT, tiny
from tests.test_expectations import failed, poison
from vlv.data import gate as expectations
from vlv.data.shards import DataError
from vlv.data.vocabulary import Vocabulary, coverage
from vlv.data.writer import Record
from vlv.models.build import tokenizer

GATE = tiny().data.gate
ORDINARY = [
    "A man in a red jacket is riding a bicycle along the river.",
    "Two children are playing with a dog on the beach at sunset.",
    "A plate of spaghetti with tomato sauce and basil leaves.",
]


def shipped() -> PreTrainedTokenizerBase:
    """The tiny profile's 66 words."""
    return tokenizer(ROOT / "pretrained" / "tiny" / "language_model")


def byte_level() -> PreTrainedTokenizerBase:
    """As GPT-2's, Qwen's and SmolLM2's: what is not in its merges is written in bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ORDINARY, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(["<end>"])
    # As GPT-2's: the token for the unknown is the end, which no word becomes.
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<end>")


def silent() -> PreTrainedTokenizerBase:
    """Letters a to m alone, and no token for the unknown: other letters vanish."""
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghijklm")}, []))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core)


def uncased() -> PreTrainedTokenizerBase:
    """Lower case without accents, in pieces of words, as BERT's."""
    words = ["[PAD]", "[UNK]", "cafe", "play", "##ing", "."]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    core.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def test_the_tiny_tokenizer_loses_ordinary_words_and_they_are_named() -> None:
    found = coverage(shipped(), [*ORDINARY, "A dog is at the top left. The background is pink."])
    assert found.captions == 4 and found.captions_held == 1
    assert found.words == sum(len(text.split()) for text in ORDINARY) + 11
    assert found.words_held < 0.7 * found.words and not found.holds(0.95)
    assert len(found.unknown) == 10 and list(found.unknown.items())[:2] == [("with", 2), ("man", 1)]
    assert "1 of 4 captions (25.0%); not held: " in str(found)


def test_a_tokenizer_that_falls_back_on_bytes_holds_every_word() -> None:
    found = coverage(byte_level(), [*ORDINARY, "Ein Känguru, 袋鼠 — кенгуру 🦘 x\u0301!"])
    assert (found.words_held, found.captions_held) == (found.words, found.captions)
    assert found.holds(1.0) and found.unknown == {}


def test_letters_that_vanish_are_a_lost_word() -> None:
    assert Vocabulary(silent()).unknown("bad cab xyz calm backs 9 faded") == ["xyz", "backs", "9"]


def test_case_accents_and_pieces_are_not_a_loss() -> None:
    assert Vocabulary(uncased()).unknown("Café playing. plays") == ["plays"]


def test_no_captions_are_not_a_loss() -> None:
    assert coverage(shipped(), []).holds(1.0)


def write(captions: list[str]) -> Callable[[list[Record]], None]:
    def edit(records: list[Record]) -> None:
        records[:] = [replace(r, caption=captions[i % len(captions)]) for i, r in enumerate(records)]

    return edit


def test_scenes_pass_the_gate_with_their_own_language_model(scene_data: Path) -> None:
    verdict = expectations.validate(scene_data, GATE, tokenizer=shipped())
    assert verdict.success, verdict.failures()
    assert set(verdict.vocabulary) == {"train", "validation", "test"}
    assert verdict.vocabulary["train"].captions_held == verdict.vocabulary["train"].captions == 50
    assert expectations.Verdict.model_validate(verdict.model_dump(mode="json")) == verdict


def test_the_gate_stops_captions_that_the_language_model_cannot_hold(scene_data: Path) -> None:
    poison(scene_data, "train", write(ORDINARY))
    assert expectations.validate(scene_data, GATE, ["train"]).success  # nothing else is wrong with them
    verdict = expectations.validate(scene_data, GATE, ["train"], shipped())
    assert failed(verdict) == {("train", "words_held"), ("train", "captions_held")}
    held = verdict.vocabulary["train"]
    assert (held.captions, held.captions_held) == (50, 0) and held.share_of_words < 0.6
    with pytest.raises(DataError) as caught:
        verdict.check()
    assert "0 of 50 captions (0.0%); not held: " in str(caught.value) and "'in' 17 times" in str(caught.value)
    assert "train/00000.tar sample 000000000 (man" in str(caught.value)
    loose = GATE.model_copy(update={"min_share_held": 0.0})
    assert expectations.validate(scene_data, loose, ["train"], shipped()).success


def test_a_few_captions_that_are_not_held_pass(scene_data: Path) -> None:
    def edit(records: list[Record]) -> None:
        for i in (3, 9):  # 2 of 50: 4 %
            records[i] = replace(records[i], caption=ORDINARY[0])

    poison(scene_data, "train", edit)
    assert expectations.validate(scene_data, GATE, ["train"], shipped()).success
    strict = GATE.model_copy(update={"min_share_held": 0.97})
    assert ("train", "captions_held") in failed(expectations.validate(scene_data, strict, ["train"], shipped()))
