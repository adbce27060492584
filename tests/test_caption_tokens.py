"""Labels cover the caption and its end token, but no padding and no prefix."""

from vlv.models import caption_tokens
from vlv.tiny.pretrain_text import tokenizer


def test_labels_end_with_eos_and_ignore_padding() -> None:
    words = tokenizer()
    tokens = caption_tokens.tokenize(words, ["A dog is at the top left.", "A cat."], 64)
    assert all(ids[0] == words.bos_token_id and ids[-1] == words.eos_token_id for ids in tokens.ids)
    before = [list(ids) for ids in tokens.ids]
    ids, labels = caption_tokens.collate(tokens.ids, words.pad_token_id)
    assert tokens.ids == before, "ids were changed"
    for row, sequence in enumerate(before):
        assert labels[row, : len(sequence)].tolist() == sequence
        assert (labels[row, len(sequence) :] == caption_tokens.IGNORED).all()
        assert (ids[row, len(sequence) :] == words.pad_token_id).all()


def test_the_end_is_learned_even_if_the_padding_token_is_the_end_token() -> None:
    """Many models pad with <eos>; masking labels by value would then also mask the end."""
    ids, labels = caption_tokens.collate([[5, 6, 2], [7, 2]], pad=2)
    assert labels.tolist() == [[5, 6, 2], [7, 2, caption_tokens.IGNORED]]
    assert ids.tolist() == [[5, 6, 2], [7, 2, 2]]


def test_a_cut_caption_has_no_end_token_and_is_counted() -> None:
    words = tokenizer()
    tokens = caption_tokens.tokenize(words, ["A dog is at the top left. A cat is at the center."], 5)
    assert tokens.cut == 1 and len(tokens.ids[0]) == 5 and words.eos_token_id not in tokens.ids[0]
