"""The tiny world's grammar: what is written can be read, and no test specification is ever trained on."""

import numpy as np

from vlv.evaluation.intervals import figure
from vlv.tiny import scenes
from vlv.tiny.counting import terms
from vlv.tiny.pretrain_text import tokenizer


def _some(split: scenes.Split, count: int, seed: int = 0) -> list[scenes.Scene]:
    drawn = scenes.specifications(split, np.random.default_rng(seed))
    return [next(drawn) for _ in range(count)]


def test_every_form_of_caption_reads_back_also_through_the_tokenizer() -> None:
    rng = np.random.default_rng(1)
    words = tokenizer()
    forms = set()
    for scene in _some("train", 400):
        caption = scenes.write_caption(scene, rng)
        forms.add(caption.split(".")[0].split()[0])
        assert scenes.read_caption(caption) == scene
        ids = words(caption)["input_ids"]
        assert words.unk_token_id not in ids and len(ids) <= 64
        assert words.decode(ids, skip_special_tokens=True) == caption
    assert len(forms) >= 4, "captions are one template"


def test_a_wrong_or_repeated_object_counts_against_precision() -> None:
    true = scenes.read_caption("The background is pink. A dog is at the center.")
    read = scenes.read_caption(
        "The background is pink. A dog is at the center. A dog is at the top left. A unicorn flies."
    )
    figures = {name: figure(counts) for name, counts in terms([read], [true]).items()}
    assert figures["object_recall"] == 1 and figures["object_precision"] == 1 / 3 and figures["exact_match"] == 0


def test_splits_share_no_specification_and_held_out_pairs_are_only_in_test() -> None:
    train, test = set(_some("train", 5000)), set(_some("test", 1000))
    assert not train & test
    assert not any(scenes.has_held_out_pair(s) for s in train)
    assert any(scenes.has_held_out_pair(s) for s in test) and not all(scenes.has_held_out_pair(s) for s in test)


def test_a_scene_stays_in_its_split() -> None:
    """In each process and from version to version: else test scenes would be trained on."""
    split = {kind: scenes.split_of(scenes.Scene(0, ((4, kind),))) for kind in (0, 1, 6)}
    assert split == {0: "train", 1: "test", 6: "validation"}
    held_out, other = (scenes.Scene(0, ((0, 0), (4, kind))) for kind in (2, 1))
    assert scenes.has_held_out_pair(held_out) and scenes.split_of(held_out) == "test"
    assert not scenes.has_held_out_pair(other)
