from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools import smollm
from data_tools.gguf import TENSOR_TYPES, Gguf, StoredTensor, read_gguf
from shearing.errors import ShearingError
from shearing.mixture import tokenizer_fingerprint

KINDS = {"u32": 4, "f32": 6, "bool": 7, "str": 8, "array": 9}


def packed_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def packed_value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return KINDS["bool"], struct.pack("<?", value)
    if isinstance(value, int):
        return KINDS["u32"], struct.pack("<I", value)
    if isinstance(value, float):
        return KINDS["f32"], struct.pack("<f", value)
    if isinstance(value, str):
        return KINDS["str"], packed_string(value)
    items = [packed_value(item) for item in value]
    return KINDS["array"], struct.pack("<IQ", items[0][0], len(items)) + b"".join(item for _, item in items)


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, tuple[int, list[int], bytes]]) -> bytes:
    """A GGUF file; a tensor is (type, shape with the slowest dimension first, bytes)."""
    content = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, packed = packed_value(value)
        content += packed_string(key) + struct.pack("<I", kind) + packed
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        content += packed_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return content + bytes(-len(content) % 32) + data


def test_gguf_header_and_tensor_types() -> None:
    generator = np.random.default_rng(0)
    plain = generator.normal(size=(3, 5)).astype(np.float32)
    scales, minima = np.float16([0.5, 0.25]), np.float16([-1.0, 2.0])
    nibbles = generator.integers(0, 16, size=(2, 32), dtype=np.uint8)
    quants = generator.integers(-128, 128, size=(2, 32)).astype(np.int8)
    q4 = b"".join(
        scales[i].tobytes() + minima[i].tobytes() + (nibbles[i, :16] | nibbles[i, 16:] << 4).tobytes() for i in range(2)
    )
    q8 = b"".join(scales[i].tobytes() + quants[i].tobytes() for i in range(2))
    metadata = {"a": 7, "b": "text", "c": ["x", "yé"], "d": [1, 2], "e": True, "f": 0.5}
    tensors = {"plain": (0, [3, 5], plain.tobytes()), "q4": (3, [2, 32], q4), "q8": (8, [1, 64], q8)}
    gguf = read_gguf(gguf_bytes(metadata, tensors))
    assert gguf.metadata == metadata
    found = {name: tensor.dequantize() for name, tensor in gguf.tensors.items()}
    assert np.array_equal(found["plain"], plain)
    assert np.array_equal(found["q4"], scales[:, None].astype(np.float32) * nibbles + minima[:, None])
    assert np.array_equal(found["q8"], (scales[:, None].astype(np.float32) * quants).reshape(1, 64))


def test_gguf_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="not a GGUF"):
        read_gguf(struct.pack("<4sIQQ", b"GGML", 3, 0, 0))
    with pytest.raises(ValueError, match="type 12"):
        read_gguf(gguf_bytes({}, {"t": (12, [32], bytes(32))}))


def tiny_gguf() -> Gguf:
    """A model of SmolLM2's kind with 2 layers, 4 heads on 2 KV heads of 4 dimensions, and 100 tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    tokens = [*special, *letters, "Ġ", "12", "ab"]
    metadata = {
        "llama.vocab_size": len(tokens),
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 4,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100_000.0,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["1 2", "a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (16,),
                "attn_q": (16, 16),
                "attn_k": (8, 16),
                "attn_v": (8, 16),
                "attn_output": (16, 16),
                "ffn_norm": (16,),
                "ffn_gate": (24, 16),
                "ffn_up": (24, 16),
                "ffn_down": (16, 24),
            }.items()
        }
    generator = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype("<f4")
        tensors[f"{name}.weight"] = StoredTensor(TENSOR_TYPES[0], values.view(np.uint8).reshape(-1, 4), shape)
    return Gguf(metadata, tensors)


def test_model_is_saved_as_an_ordinary_folder(tmp_path: Path) -> None:
    gguf = tiny_gguf()
    (tmp_path / ".partial-model").mkdir()  # what a kill leaves
    smollm.save_model(gguf, folder=tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.tie_word_embeddings
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    assert model.dtype == torch.float32
    logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.shape == (1, 3, 100)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(smollm.build_tokenizer(gguf.metadata))
    assert tokenizer.tokenize("12ab") == ["1", "2", "ab"]
    assert tokenizer.decode(tokenizer("ab 12 AB").input_ids) == "ab 12 AB"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_rotary_rows_are_put_in_hugging_face_order() -> None:
    heads, dimensions = 2, 6
    # llama.cpp keeps each rotated pair together: rows (0, 3), (1, 4), (2, 5) of a head become neighbours.
    original = np.arange(heads * dimensions * 3, dtype=np.float32).reshape(heads * dimensions, 3)
    stored = original.reshape(heads, 2, dimensions // 2, 3).swapaxes(1, 2).reshape(heads * dimensions, 3)
    assert np.array_equal(smollm._interleaved_to_halves(stored, num_heads=heads), original)


def test_a_wheel_with_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "model.whl"
    content = gguf_bytes({"a": 1}, {})
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(smollm.MEMBER, content)
    with pytest.raises(ShearingError, match=r"delete .*model\.whl"):
        smollm.read_model_wheel(wheel)
    monkeypatch.setattr(smollm, "SHA256", hashlib.sha256(content).hexdigest())
    assert smollm.read_model_wheel(wheel).metadata == {"a": 1}
