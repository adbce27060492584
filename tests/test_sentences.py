"""Sentence similarity on a small BERT made on the spot."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from vlv.evaluation.similarity import SentenceModel, cosines

WORDS = ["[PAD]", "[UNK]", "a", "red", "cat", "dog", "beside", "the", "tree"]


@pytest.fixture
def model(tmp_path: Path) -> SentenceModel:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **sizes)).save_pretrained(tmp_path)
    return SentenceModel(tmp_path)


def test_a_sentence_does_not_depend_on_its_batch(model: SentenceModel) -> None:
    short, long = "a cat", "a red dog beside the tree"
    together = model.embed([short, long])
    assert torch.allclose(together[0], model.embed([short])[0], atol=1e-6)  # padding is not averaged in
    assert torch.allclose(together.norm(dim=-1), torch.ones(2))
    assert together.shape == (2, 16) and not torch.allclose(together[0], together[1], atol=0.1)


def test_true_captions_score_one_and_swapped_ones_less(model: SentenceModel) -> None:
    true = ["a cat", "a red dog", "the tree"]
    own, another = cosines(model, true, true)
    assert own == pytest.approx([1.0] * 3, abs=1e-6)
    assert another.shape == (3,) and another.mean() < 0.95
