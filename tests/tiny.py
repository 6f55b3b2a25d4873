"""Small models of real architectures, with random weights: in memory, or as folders in Transformers' layout."""

import copy
import io
import pickle
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
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
"""Those that read text, as classifiers."""
_CONFIGS["vit"] = {**_SIZES, "image_size": 8, "patch_size": 4}
_CONFIGS["bart"] = {
    "d_model": 32,
    **{f"{half}_{key}": value for half in ("encoder", "decoder")
       for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))},
    "decoder_start_token_id": 2,
}  # fmt: skip
DECODERS = ("gpt2", "llama", "qwen2")
ENCODER_DECODERS = ("t5", "bart")
CHAT = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
"""A chat template that the tiny tokenizers can have: each turn ends with their end token."""


def tiny_model(
    architecture: str, *, labels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> PreTrainedModel:
    """A classifier with random weights, in evaluation mode; the head is random, too, so that outputs say something.

    `options` are fields of its configuration.
    """
    return _original(architecture, labels, seed, dtype, tuple(options.items())).copy()


class _Original(pickle.Pickler):
    """A model to take copies of: a sixth of the time of `copy.deepcopy`, which walks every module in Python."""

    def __init__(self, model: PreTrainedModel) -> None:
        content = io.BytesIO()
        super().__init__(content)
        self.tensors: dict[int, torch.Tensor] = {}
        self.dump(model)
        self.content = content.getvalue()

    def persistent_id(self, thing: object) -> int | None:
        if not isinstance(thing, torch.Tensor):
            return None
        self.tensors[id(thing)] = thing
        return id(thing)

    def copy(self) -> PreTrainedModel:
        return _Copier(io.BytesIO(self.content), self.tensors).load()


class _Copier(pickle.Unpickler):
    """Builds the model again with a copy of each tensor; tensors that are one stay one."""

    def __init__(self, content: io.BytesIO, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(content)
        self.tensors, self.copies = tensors, dict[int, torch.Tensor]()

    def persistent_load(self, key: int) -> torch.Tensor:
        if key not in self.copies:
            self.copies[key] = copy.deepcopy(self.tensors[key])
        return self.copies[key]


@cache
def _original(
    architecture: str, labels: int, seed: int, dtype: torch.dtype, options: tuple[tuple[str, object], ...]
) -> _Original:
    """The model that `tiny_model` and its kin give copies of. Without labels a language model."""
    auto = AutoModelForImageClassification if architecture == "vit" else AutoModelForSequenceClassification
    if not labels:
        auto = AutoModelForSeq2SeqLM if architecture in ENCODER_DECODERS else AutoModelForCausalLM
    number = {"num_labels": labels} if labels else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(tiny_config(architecture, **number, **dict(options)), dtype=dtype).eval()
        if dict(options).get("tie_word_embeddings") is False and architecture == "t5":
            # T5 v1.1's configurations say that it is tied, and its files hold two weights, which decides.
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        return _Original(model)


def tiny_language_model(
    architecture: str, *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> PreTrainedModel:
    """A decoder or encoder–decoder that writes, with random weights, in evaluation mode.

    `tied`: its output layer is its embedding.
    """
    options = {"tie_word_embeddings": tied, **options}
    return _original(architecture, 0, seed, dtype, tuple(options.items())).copy()


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


def save_tiny_language_model(folder: Path, architecture: str, *, chat: bool = False, **options) -> Path:
    """Writes a tiny language model with its tokenizer, with `chat` one that has a chat template; returns the folder."""
    tiny_language_model(architecture, **options).save_pretrained(folder)
    words = tokenizer(architecture)
    if chat:
        words.chat_template = CHAT
    words.save_pretrained(folder)
    return folder


def save_tiny(folder: Path, architecture: str) -> Path:
    """Writes a tiny base with its tokenizer to `folder`, as `save_pretrained` does, and returns the folder."""
    tiny_model(architecture, labels=2).save_pretrained(folder)
    tokenizer(architecture).save_pretrained(folder)
    return folder


def tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words. As is usual, decoders have an end token and no padding token.

    What reads the whole text at once has a token in front and behind; in an encoder–decoder the latter ends a text.
    (Beside a Qwen2 model Transformers reads any tokenizer file as byte pairs, and finds none of these words.)
    """
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
        **({"eos_token": "[SEP]"} if architecture in ENCODER_DECODERS else {}),
        model_max_length=64,
    )


def tiny_config(architecture: str, **options) -> PreTrainedConfig:
    """The configuration of a tiny model; `options` are fields of it."""
    if architecture == "vit":
        return AutoConfig.for_model(architecture, initializer_range=0.3, **_CONFIGS[architecture], **options)
    positions = {} if architecture == "t5" else {"max_position_embeddings": 66 if architecture == "roberta" else 64}
    spread = {"t5": {"initializer_factor": 1.5}, "bart": {"init_std": 0.3}}.get(
        architecture, {"initializer_range": 0.3}
    )
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        **positions,
        **spread,
        **special,
        **(_CONFIGS[architecture] | options),
    )
