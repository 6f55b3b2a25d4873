"""Small models of real architectures, with random weights: in memory, or as folders in Transformers' layout."""

import copy
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
WORDS = (
    *("a", "the", "film", "story", "is", "was", "and", "not", "very", "it", "this", "with", "of", "in", "plot", "cast"),
    *("good", "great", "warm", "moving", "clever", "bright", "bad", "dull", "cold", "boring", "weak", "grey"),
    *("영화", "좋다", "나쁘다", "정말", "재미있다", "지루하다"),
)
VOCABULARY = len(SPECIAL) + len(WORDS)

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_CONFIGS = {
    "bert": _SIZES,
    "roberta": _SIZES,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {**_SIZES, "num_key_value_heads": 2},
    "qwen2": {**_SIZES, "num_key_value_heads": 2},
    "t5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "decoder_start_token_id": 0},
}
ARCHITECTURES = tuple(_CONFIGS)
"""Those that read text."""
_CONFIGS["vit"] = {**_SIZES, "image_size": 8, "patch_size": 4}
DECODERS = ("gpt2", "llama", "qwen2")


def tiny_model(
    architecture: str, *, labels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> PreTrainedModel:
    """A classifier with random weights, in evaluation mode; the head is random, too, so that outputs say something.

    `options` are fields of its configuration.
    """
    return copy.deepcopy(_model(architecture, labels, seed, dtype, tuple(options.items())))


@cache
def _model(
    architecture: str, labels: int, seed: int, dtype: torch.dtype, options: tuple[tuple[str, object], ...]
) -> PreTrainedModel:
    """The model that `tiny_model` gives copies of: copying takes a fraction of the time."""
    auto = AutoModelForImageClassification if architecture == "vit" else AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(tiny_config(architecture, num_labels=labels, **dict(options)), dtype=dtype).eval()


def tiny_images(seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of three images for the tiny model that reads such."""
    return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def tiny_inputs(seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of three examples of 7, 5 and 2 tokens, each with an end token, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (3, 7), generator=generator)
    lengths = torch.tensor([7, 5, 2])[:, None]
    mask = torch.arange(7) < lengths
    ids[torch.arange(7) == lengths - 1] = 2
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def save_tiny(folder: Path, architecture: str) -> Path:
    """Writes a tiny base with its tokenizer to `folder`, as `save_pretrained` does, and returns the folder."""
    tiny_model(architecture, labels=2).save_pretrained(folder)
    tokenizer(architecture).save_pretrained(folder)
    return folder


def tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words. As is usual, decoders have an end token and no padding token."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if architecture in DECODERS:
        return PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]", model_max_length=64
        )
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def tiny_config(architecture: str, **options) -> PreTrainedConfig:
    """The configuration of a tiny model; `options` are fields of it."""
    if architecture == "vit":
        return AutoConfig.for_model(architecture, initializer_range=0.3, **_CONFIGS[architecture], **options)
    positions = {} if architecture == "t5" else {"max_position_embeddings": 66 if architecture == "roberta" else 64}
    spread = {"initializer_factor": 1.5} if architecture == "t5" else {"initializer_range": 0.3}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(
        architecture, vocab_size=VOCABULARY, **positions, **spread, **special, **(_CONFIGS[architecture] | options)
    )
