"""A Llama model in a GGUF file, as the embedded `smollm2` comes, written as a folder in Transformers' layout.

Transformers reads such files, too, but builds its index of them three times over and holds the whole model in 32 bits:
38 s and 1.2 GB for SmolLM2-135M. It also has no splitting of its own for this tokenizer, which takes digits one by one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from jaxtyping import Float
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as FromBytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

FORM = "fp16"
"""What `convert` writes; to be renamed when it writes something else, so that older caches are not taken for it.

The file has 4 bits a weight (Q4_1: a scale and an offset in fp16 for 32 of them), which fp16 keeps eight times as
closely as bf16 in the same two bytes.
"""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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
"""What GGUF calls a module → what Transformers does, within a block or outside of the blocks."""
_CONTROL = 3
"""GGUF's type of a token that is no text."""


def convert(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file with its tokenizer to `folder`, its weights in fp16.

    The file has Llama's architecture and SmolLM's tokenizer: it is one that we pin, so that need not be found out.
    """
    reader = GGUFReader(file)
    about = {name: field.contents() for name, field in reader.fields.items()}
    weights = dict(_weights(reader, about))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _config(about, tied="lm_head.weight" not in weights).save_pretrained(folder)
    special = {f"{name}_token_id": about[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    GenerationConfig(**special, pad_token_id=about["tokenizer.ggml.padding_token_id"]).save_pretrained(folder)
    _tokenizer(about).save_pretrained(folder)


def _weights(reader: GGUFReader, about: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": about["llama.attention.head_count"], "attn_k": about["llama.attention.head_count_kv"]}
    for stored in reader.tensors:
        *block, module, kind = stored.name.split(".")
        values = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), np.float32))
        if module in heads:
            values = _halves_of_heads(values, heads[module])
        inside = f"model.layers.{block[1]}." if block else ""
        yield f"{inside}{_NAMES[module]}.{kind}", values.to(torch.float16).contiguous()


def _halves_of_heads(weight: Float[Tensor, "out in"], heads: int) -> Float[Tensor, "out in"]:
    """GGUF has the two rows that a rotary position turns beside each other, Transformers half a head apart."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _config(about: dict[str, Any], tied: bool) -> LlamaConfig:
    llama = {name.removeprefix("llama."): value for name, value in about.items() if name.startswith("llama.")}
    token = {name: about[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=llama["vocab_size"],
        hidden_size=llama["embedding_length"],
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=llama["attention.head_count"],
        num_key_value_heads=llama["attention.head_count_kv"],
        max_position_embeddings=llama["context_length"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        bos_token_id=token["bos"],
        eos_token_id=token["eos"],
        pad_token_id=token["padding"],
        tie_word_embeddings=tied,
        dtype="float16",
    )


def _tokenizer(about: dict[str, Any]) -> PreTrainedTokenizerFast:
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in about.items() if "ggml" in name}
    words: list[str] = ggml["tokens"]
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    tokenizer = Tokenizer(BPE({word: place for place, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = FromBytes()
    control = [word for word, kind in zip(words, ggml["token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[ggml["bos_token_id"]],
        eos_token=words[ggml["eos_token_id"]],
        unk_token=words[ggml["unknown_token_id"]],
        pad_token=words[ggml["padding_token_id"]],
        model_max_length=about["llama.context_length"],
        chat_template=about["tokenizer.chat_template"],
    )
