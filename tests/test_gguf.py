"""GGUF -> Hugging Face form, on a small file written on the spot with GGUF's own writer."""

import json
import os
import struct
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vlv.convert.checkpoints import ConversionError
from vlv.convert.gguf import convert

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "Ġ", "ab", "Ġc"]
MERGES = ["a b", "Ġ c"]


def _write(model: LlamaForCausalLM, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied to the word embeddings
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleave(tensor, config.num_attention_heads, config.hidden_size)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """GGUF keeps the two halves of a rotary head interleaved."""
    size = width // heads
    return weight.view(-1, 2, size // 2, width).transpose(1, 2).reshape(weight.shape).contiguous()


def test_the_converted_model_is_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(TOKENS), num_key_value_heads=2, max_position_embeddings=64,
                    tie_word_embeddings=True, initializer_range=0.2, **sizes)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(parameter.bfloat16())  # what the converted file can hold
    _write(source, tmp_path / "small.gguf")
    convert(tmp_path / "small.gguf", tmp_path / "converted")
    assert not list((tmp_path / "converted").glob("*.bin"))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    ids = torch.tensor([[1, 3, 7, 8, 5]])
    with torch.no_grad():
        assert torch.equal(converted.eval()(ids).logits, source.eval()(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer("ab c")["input_ids"] == [7, 8]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(ConversionError, match=r"model\.gguf cannot be read"):
        convert(tmp_path / "model.gguf", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def _header(pairs: dict[str, int | str], tensors: int = 0, count: int | None = None) -> bytes:
    """A GGUF header with text and uint32 values that claims so many tensors but holds none."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    data = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs) if count is None else count)
    for key, value in pairs.items():
        packed = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        data += text(key) + packed
    return data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_header({"general.architecture": "llama"}).ljust(200, b"\0"), "no tensor token_embd.weight"),
        (_header({"general.architecture": "llama"}, tensors=1 << 60), "ends inside its header"),
        (_header({"general.architecture": "llama"}, count=1 << 60), "ends inside its header"),
        (_header({"a": 1}) + b"", "names no general.architecture"),
    ],
    ids=["no sizes", "2**60 tensors", "2**60 pairs", "no architecture"],
)
def test_a_header_is_checked_before_anything_is_built(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConversionError, match=reason):
        convert(tmp_path / "model.gguf", tmp_path / "converted")


def _small() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.block_count", 1 << 30, "block_count is 1073741824, but its tensors have 2"),
        ("llama.embedding_length", 1 << 20, "embedding_length is 1048576, but its tensors have 64"),
        ("llama.feed_forward_length", 1 << 24, "feed_forward_length is 16777216, but its tensors have 96"),
        ("llama.attention.head_count_kv", 1 << 16, "describes a model of"),
    ],
)
def test_sizes_must_match_the_tensors(tmp_path: Path, key: str, value: int, reason: str) -> None:
    """Changed in a complete file, so that only the size is wrong."""
    _write(_small(), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    at = content.index(key.encode() + struct.pack("<I", 4)) + len(key) + 4
    (tmp_path / "model.gguf").write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
    with pytest.raises(ConversionError, match=reason):
        convert(tmp_path / "model.gguf", tmp_path / "converted")


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    _write(_small(), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    for length in (0, 3, 20, 300, len(content) // 2, len(content) - 1):
        (tmp_path / "model.gguf").write_bytes(content[:length])
        with pytest.raises(ConversionError, match=r"model\.gguf cannot be read as GGUF"):
            convert(tmp_path / "model.gguf", tmp_path / "converted")


def test_nothing_beside_the_file_is_read(tmp_path: Path) -> None:
    """A named pipe would block, and code would be run or asked about."""
    _write(_small(), tmp_path / "model.gguf")
    os.mkfifo(tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / "tokenizer_config.json")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    convert(tmp_path / "model.gguf", tmp_path / "converted")
    assert not (tmp_path / "ran").exists()
