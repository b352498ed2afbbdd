"""Small tokenizers of every kind that a GGUF file can name, trained on a page of text, as models have them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, they'LL say, and we've 3456 reasons to go.",
    "def square(x):\n    return x ** 2\n\n\nprint(square(17))\t# 289",
    "Größe, naïve café: déjà vu in Łódź; 東京 と 大阪 — приве́т 😀😀  two  spaces   three",
    " leading and trailing ",
    "HelloWorld camelCase ALLCAPS mixedUP don't won't I'd",
]
"""Text to train on, and to compare tokens of."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"bos": "<s>", "eos": "</s>"}
BYTE_LEVEL = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
"""By llama.cpp's names."""


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(name: str, *, size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": lambda: _split(LLAMA3),
        "qwen2": lambda: _split(QWEN2),
        "tekken": lambda: _split(TEKKEN),
    }[name]()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 4,
        special_tokens=[] if name == "llama-bpe" else [*SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _sentencepiece(*, size: int) -> Tokenizer:
    """As the converter of Llama 2 writes it: every pair of tokens that makes a token is a merge, in its order."""
    whole = [text.replace(" ", "\u2581") for text in TEXTS]
    raw = Tokenizer(models.BPE())
    raw.train_from_iterator(whole * 3, trainers.BpeTrainer(vocab_size=size - 270, show_progress=False))
    made = json.loads(raw.to_str())["model"]
    order = list(made["vocab"])
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *order]:
        vocab.setdefault(token, len(vocab))
    merges = [
        (token[:at], token[at:])
        for token in order
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")],
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def write_tokenizer(folder: Path, *, name: str, size: int = 400, bos: bool = False) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        folder: is there.
        name: one of `BYTE_LEVEL`, or `llama`.
        size: tokens at most; fewer where the text has no more to merge.
        bos: whether `<s>` is put in front of a text.
    """
    tokenizer = _sentencepiece(size=size) if name == "llama" else _byte_level(name, size=size)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return tokenizer
