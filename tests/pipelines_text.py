"""Text encoders, tiny and random, and tokenizers made here, all of the classes that published ones have.

The vocabularies come from the words below: a prompt is about as many tokens as it has words, so that the pipelines
which cut a template off the front by a fixed count of tokens leave about what they should.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product
from typing import Any

from torch import nn

PROMPT = "a red fox runs over fresh snow"
OTHER = "two boats under a dark sky"
NEGATIVE = "blurry image, low quality"

_TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of"
    " the objects and background:\nuser\nassistant\n"
)
_CORPUS = [PROMPT, OTHER, NEGATIVE, *(_TEMPLATE.splitlines(keepends=True) * 2)]

CLIP_LENGTH = 11
"""Tokens to which CLIP's tokenizer fills up."""


# --------------------------------------------------------------------------------------------------
# Tokenizers


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts of a word, each occurrence of the pair made one."""
    done: list[str] = []
    for part in parts:
        if done and (done[-1], part) == pair:
            done[-1] += part
        else:
            done.append(part)
    return done


def _pairs(before: Any, special: list[str], suffix: str = "") -> dict[str, Any]:
    """A vocabulary and the merges of pairs, frequent ones first, up to the words into which ``before`` divides texts.

    Done here, as the library's own training has another outcome each time.
    """
    letters = [chr(c) for c in range(33, 127)]
    words = [w for text in _CORPUS for w, _ in before.pre_tokenize_str(text)]
    divided = [[*w[:-1], w[-1] + suffix] for w in words]
    vocabulary = [*letters, *(c + suffix for c in letters if suffix), *(c for word in divided for c in word)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in divided for pair in pairwise(word)):
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        divided = [_joined(word, merges[-1]) for word in divided]
    vocabulary += ["".join(pair) for pair in merges]
    ordered = [*vocabulary, *special] if suffix else [*special, *vocabulary]
    return {"vocab": {word: i for i, word in enumerate(dict.fromkeys(ordered))}, "merges": merges}


def t5_tokenizer() -> Any:
    """Words of the corpus, and letters for others."""
    from transformers import T5TokenizerFast

    words = sorted({word for text in _CORPUS for word in text.split()})
    letters = [chr(c) for c in range(33, 127)]
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -8.0}
    pieces |= {f"▁{word}": -4.0 for word in words} | dict.fromkeys(letters, -9.0)
    return T5TokenizerFast(vocab=list(pieces.items()), extra_ids=0)


def clip_tokenizer() -> Any:
    """Fills up with the end token. The two special ones have the highest numbers, as published."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    parts = _pairs(pre_tokenizers.BertPreTokenizer(), ["<|startoftext|>", "<|endoftext|>"], suffix="</w>")
    return CLIPTokenizer(**parts, model_max_length=CLIP_LENGTH)


def bert_tokenizer(length: int) -> Any:
    """Words of the corpus, and letters for others."""
    from tokenizers import pre_tokenizers
    from transformers import BertTokenizer

    divided = pre_tokenizers.BertPreTokenizer()
    words = {word.lower() for text in _CORPUS for word, _ in divided.pre_tokenize_str(text)}
    letters = [f"{mark}{chr(c)}" for mark, c in product(("", "##"), range(97, 123))]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*words, *letters})]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=length)


def gemma_tokenizer() -> Any:
    """Fills up on the right, as the pipelines want it."""
    from tokenizers import pre_tokenizers
    from transformers import GemmaTokenizer

    parts = _pairs(pre_tokenizers.Metaspace(), ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return GemmaTokenizer(**parts, padding_side="right")


def llama_tokenizer() -> Any:
    """With a token of its own for filling up, which the published one was given too."""
    from tokenizers import pre_tokenizers
    from transformers import LlamaTokenizerFast

    parts = _pairs(pre_tokenizers.Metaspace(), ["<unk>", "<s>", "</s>", "<pad>"])
    return LlamaTokenizerFast(**parts, pad_token="<pad>", padding_side="right")


def qwen_tokenizer() -> Any:
    """With a template for chats."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    parts = _pairs(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = Qwen2Tokenizer(**parts, padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return tokenizer


def byte_tokenizer() -> Any:
    """Bytes are the tokens."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


# --------------------------------------------------------------------------------------------------
# Encoders


def t5(width: int = 20, *, multilingual: bool = False) -> nn.Module:
    """Multilingual: each layer has relative positions of its own, as in UMT5. Also for the bytes of ByT5."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config, encoder = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return encoder(
        config(
            vocab_size=400, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=16,
        )
    )  # fmt: skip


def clip(width: int, projected: int | None = None) -> nn.Module:
    """With a projection of the pooled token where its width is given. HunyuanVideo fills its text up to 77."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    end = len(clip_tokenizer()) - 1
    config = CLIPTextConfig(
        vocab_size=end + 1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        projection_dim=projected or width,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def bert(width: int, length: int) -> nn.Module:
    """For ``length`` tokens at most."""
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=400, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=length,
        )
    )  # fmt: skip


_DECODER = {
    "vocab_size": 600, "hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
}  # fmt: skip


def gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_DECODER, query_pre_attn_scalar=8, sliding_window=64))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**_DECODER, pad_token_id=3))


def qwen(*, pictures: bool) -> nn.Module:
    """Pictures: with the tower for images, which text leaves aside, and the head for words."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    text = _DECODER | {
        "hidden_size": 24, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    del text["head_dim"]
    if not pictures:
        return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text))
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=tower))
