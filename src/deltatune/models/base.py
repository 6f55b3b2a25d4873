"""Loading a base that `places.find_base` found.

With labels it is a classifier, with a new head; without any a language model, whose head is its own.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as ENCODER_DECODERS
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS
from transformers.utils import logging as transformers_logging

from deltatune.errors import UserError
from deltatune.models.observe import Originals
from deltatune.models.places import UNQUANTISED, Place, find_base, first_line
from deltatune.models.quantise import METHOD, Storages, place_storages, read_storages, storages_of
from deltatune.models.streaming import StorageConfig, put_empty

log = logging.getLogger("deltatune")

Task = Literal["classification", "generation"]
"""What a base is loaded for: to give one of several labels to a text, or to go on writing."""


@dataclass(frozen=True)
class Base:
    """A loaded base with what is needed to use it and to name it later."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str

    @property
    def task(self) -> Task:
        """What it was loaded for."""
        return "generation" if self.model.can_generate() else "classification"

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a classifier, in the order of its outputs; a language model has none."""
        return tuple(self.model.config.id2label.values()) if self.task == "classification" else ()


def load(
    name: str,
    *,
    labels: Sequence[str] = (),
    revision: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    storage: Storages = "",
) -> Base:
    """Loads a base with its tokenizer: as a classifier with one output for each of `labels`, or as a language model.

    Without labels it is a language model, causal or, where its configuration is an encoder–decoder's, one of
    sequences to sequences. `revision` is one that was recorded: the hub's is loaded, an embedded one's checked. `seed`
    decides the initial values of a classifier's head, and of anything else that the base may lack. With `storage`
    (`nf4`, or a mapping of targets to storages) the linear layers are stored so one by one as they are read, from the
    numbers in the file, whatever `dtype` the rest has. Raises `UserError` for a name that is none, a base without
    safetensors or tokenizer, an architecture that cannot do what is asked, a storage that does not exist, a base that
    is quantised in another way, and weights that are missing or not finite.
    """
    place = find_base(name, revision)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(place, labels, dtype, read_storages(storage))
        tokenizer = read_tokenizer(place, model)
    return Base(model, tokenizer, place.id, place.revision)


def originals(base: Base) -> Originals:
    """What reads the weights of a quantised base once more, as its files have them; for `attach`.

    They come one by one, as when the base was loaded, and are forgotten. A base whose files hold codes has none.
    """

    def read(see: Callable[[str, Tensor], None]) -> None:
        place = find_base(base.id, base.revision)
        with quiet(), torch.random.fork_rng():
            _model(place, base.labels, torch.float32, storages_of(base.model), see)

    return read


def outline(place: Place, *, labels: Sequence[str] = (), storage: Storages = "") -> PreTrainedModel:
    """The base as `load` gives it but on the meta device: its layers, shapes and storages, without any weight.

    Raises `UserError` for a configuration that is none or cannot do what is asked, and for a storage or target that
    does not exist.
    """
    try:
        with quiet(), torch.device("meta"):
            config = _config(place, labels)
            model: PreTrainedModel = _class(config, labels).from_config(config)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"'{place.id}' cannot be built: {first_line(error)}", "is its config.json the right one?"
        ) from error
    for path, stored in place_storages(model, read_storages(storage)).items():
        put_empty(model, path, stored)
    return model


def tasks(place: Place) -> tuple[Task, ...]:
    """What a base can be loaded for, generation first; empty for one that does not read text."""
    with quiet():
        return _tasks(_read_config(place))


def _config(place: Place, labels: Sequence[str]) -> PreTrainedConfig:
    config = _read_config(place)
    _refuse_other_task(place, config, "classification" if labels else "generation")
    _refuse_foreign_storage(place, config)
    if labels:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    return config


def _read_config(place: Place) -> PreTrainedConfig:
    if place.config is not None:
        return AutoConfig.for_model(**place.config)
    try:
        return AutoConfig.from_pretrained(place.source, revision=place.commit, trust_remote_code=False)
    except (ValueError, OSError, AttributeError, TypeError) as error:  # the last two where a field is of another type
        raise UserError(f"could not read the configuration of '{place.id}': {first_line(error)}") from error


def _tasks(config: PreTrainedConfig) -> tuple[Task, ...]:
    kind = config.model_type
    if config.is_encoder_decoder:
        generation = kind in ENCODER_DECODERS
    else:  # BERT and its kin can be decoders; as they are published they read both ways, and fill in masked words
        generation = kind in DECODERS and (getattr(config, "is_decoder", False) or kind not in MASKED)
    found = {"generation": generation, "classification": kind in CLASSIFIERS}
    return tuple(cast(Task, task) for task, can in found.items() if can)


def _refuse_other_task(place: Place, config: PreTrainedConfig, task: Task) -> None:
    can, kind = _tasks(config), config.model_type
    if task in can:
        return
    if not can:
        raise UserError(
            f"'{place.id}' is neither a language model nor a text classifier: it is a model of type {kind}",
            "use an encoder, decoder or encoder–decoder of text such as BERT, Llama or T5",
        )
    if task == "generation":
        raise UserError(
            f"'{place.id}' cannot write text: {kind} models are encoders",
            "to write, use a decoder or encoder–decoder such as smollm2 or T5; given labels, it can be a classifier",
        )
    raise UserError(
        f"'{place.id}' is no text classifier: {kind} models have no sequence classification head",
        "use an encoder or decoder such as BERT, RoBERTa, GPT-2 or Llama, or give no labels to load a language model",
    )


def _class(config: PreTrainedConfig, labels: Sequence[str]) -> Any:
    """The class of Transformers that makes such a model."""
    if labels:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _refuse_foreign_storage(place: Place, config: PreTrainedConfig) -> None:
    noted = getattr(config, "quantization_config", None)
    if noted is None:
        return
    if noted.get("quant_method") != METHOD:
        raise UserError(
            f"'{place.id}' is quantised already, by {noted.get('quant_method') or 'another library'}", UNQUANTISED
        )
    if not all(isinstance(noted.get(name), dict) for name in ("storages", "layers")):
        raise UserError(f"'{place.id}' does not say how it is quantised", "is its config.json the right one?")


def _quantiser(
    place: Place, config: PreTrainedConfig, storages: Mapping[str, str], see: Callable[[str, Tensor], None] | None
) -> StorageConfig | None:
    """What Transformers is told about quantising; None where nothing is to do, or the base says it itself."""
    noted = getattr(config, "quantization_config", None)
    if noted is None:
        return StorageConfig(storages, see=see) if storages else None
    if storages and storages != noted["storages"]:
        raise UserError(
            f"'{place.id}' is stored as {noted['storages']}, and cannot be stored as {dict(storages)}",
            "leave the storage out, or give its unquantised form",
        )
    return None


def _model(
    place: Place,
    labels: Sequence[str],
    dtype: torch.dtype,
    storages: Mapping[str, str],
    see: Callable[[str, Tensor], None] | None = None,
) -> PreTrainedModel:
    config = _config(place, labels)
    quantiser = _quantiser(place, config, storages, see)
    try:
        model, report = _class(config, labels).from_pretrained(
            place.source,
            revision=place.commit,
            config=config,
            dtype=torch.float32 if quantiser else dtype,
            quantization_config=quantiser,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head of another task has another number of labels
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"could not load '{place.id}': {first_line(error)}", "is the download complete?") from error
    fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    _refuse_lacking(place, model, fresh)
    model.newly_initialised = tuple(sorted({key.rpartition(".")[0] for key in fresh}))
    for name, tensor in model.state_dict().items():  # scales of a quantised weight are no parameters
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"'{place.id}' is damaged: {name} has values that are not finite")
    return model.to(dtype)


def _refuse_lacking(place: Place, model: PreTrainedModel, fresh: set[str]) -> None:
    """Refuses a model with weights that the files do not have: Transformers would go on with random ones.

    A classifier's head may be new, and BERT's pooler, which trains with it; a language model's head is its own.
    """
    lacking = sorted(fresh)
    if not model.can_generate():
        inside = model.base_model_prefix + "."
        lacking = [key for key in lacking if key.startswith(inside) and "pooler" not in key]
    if lacking:
        raise UserError(
            f"'{place.id}' lacks {lacking[0]}" + (f" and {len(lacking) - 1} more weights" if lacking[1:] else ""),
            f"is it a whole {model.config.model_type} model, and its config.json the right one?",
        )


def read_tokenizer(place: Place, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token that `model` has an embedding of; an outline will do.

    Raises UserError where there is none, and where it has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.source, revision=place.commit, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{place.id}' has no tokenizer: {first_line(error)}", "put tokenizer.json beside config.json"
        ) from error
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        # Decoders are often trained without padding. Their classifiers look for the last token that is not padding, on
        # the right, so the end-of-text token can serve. In a language model's batches the masks say what is padding.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of '{place.id}' has no padding, end or unknown token to pad with")
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' own bars and warnings off: what matters of them is said as errors or attached to the model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
