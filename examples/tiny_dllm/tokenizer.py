"""The character-level tokenizer of the small models: printable ASCII, newline, and five specials.

As in LLaDA, the end-of-text token is also the end of a turn, the padding and the eos token.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
END_OF_TEXT, MASK, USER, ASSISTANT, UNKNOWN = SPECIALS = (
    "<|endoftext|>",
    "<|mask|>",
    "<|user|>",
    "<|assistant|>",
    "<|unknown|>",
)
IDS = {token: index for index, token in enumerate((*CHARACTERS, *SPECIALS))}
VOCAB_SIZE = len(IDS)
END_OF_TEXT_ID, MASK_ID = IDS[END_OF_TEXT], IDS[MASK]

# A prompt is <|user|>text<|assistant|>; an answer of an earlier turn ends in <|endoftext|>. A
# system message has no role of its own: it is put before the first user text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{{ message['content'] }}<|endoftext|>
{%- elif message['role'] == 'system' -%}
<|user|>{{ message['content'] }}{{ '\\n' }}
{%- elif loop.index0 > 0 and messages[loop.index0 - 1]['role'] == 'system' -%}
{{ message['content'] }}
{%- else -%}
<|user|>{{ message['content'] }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""

# Written by hand: transformers 4 cannot read the form that transformers 5 would save.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "mask_token": MASK,
    "unk_token": UNKNOWN,
    "additional_special_tokens": [USER, ASSISTANT],
    "padding_side": "left",
    "model_max_length": 2048,
    "clean_up_tokenization_spaces": False,
}


def encode(text: str) -> list[int]:
    """Ids of plain text, without the tokenizer's overhead."""
    return [IDS[character] for character in text]


def decode(ids: list[int]) -> str:
    """Text of ids up to the first end-of-text token; other specials are written out."""
    names = (*CHARACTERS, *SPECIALS)
    end = ids.index(END_OF_TEXT_ID) if END_OF_TEXT_ID in ids else len(ids)
    return "".join(names[i] for i in ids[:end])


def prompt_ids(prompt: str) -> list[int]:
    """The ids that the chat template gives for one user message."""
    return [IDS[USER], *encode(prompt), IDS[ASSISTANT]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    # BPE without merges is one token per character, and every engine can read it.
    tokenizer = Tokenizer(models.BPE(vocab=IDS, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return with_chat(tokenizer)


def with_chat(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with the special tokens and chat template of the small models."""
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    settings = {key: value for key, value in TOKENIZER_CONFIG.items() if key != "tokenizer_class"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.chat_template = CHAT_TEMPLATE
    return fast
