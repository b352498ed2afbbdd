"""Small tokenizers of the two kinds that chat models have, and templates as such models bring them."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\n' %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set first = '' %}{%- set rest = messages %}{%- endif %}"
    "{%- for message in rest %}{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must take turns') }}{%- endif %}"
    "{%- if message.role == 'user' %}{{- bos_token + '[INST] ' + (first if loop.first else '') }}"
    "{{- message.content | trim + ' [/INST]' }}"
    "{%- else %}{{- ' ' + message.content.strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'assistant' %}{%- set reason = '' %}{%- if m.reasoning_content is string %}"
    "{%- set reason = m.reasoning_content %}{%- elif '</think>' in content %}"
    "{%- set reason = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' + reason.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- content.lstrip('\n') }}{%- if m.tool_calls %}{%- for call in m.tool_calls %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
WORDS = ["ass", "assistant", "\n\n", "th", "the", "im", "end", "<|", "|>", "st", "art"]


def byte_level(template: str | None = CHATML) -> Any:
    """Like those of Qwen and SmolLM: bytes, pre-tokenised by words; its end of text ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [word.replace("\n", "Ċ") for word in WORDS]
    merges = [pair for word in pieces for pair in _merges(word)]
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)])
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>"])
    return _fast(backend, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def sentence_piece(template: str | None = INST) -> Any:
    """Like that of Llama 2: a space in front of a text, spaces as ▁, bytes where there is no letter."""
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(each, normalized=False) for each in ("<unk>", "<s>", "</s>")])
    return _fast(backend, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _merges(word: str) -> list[tuple[str, str]]:
    return [(word[:i], word[i]) for i in range(1, len(word))]


def _fast(backend: Tokenizer, template: str | None, **names: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
