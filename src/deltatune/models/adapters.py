"""Adapter folders: what was trained, in the layout that PEFT reads and writes, with what we know of it beside.

    adapter_config.json          PEFT's: the method's hyperparameters and the layers it is on
    adapter_model.safetensors    what was trained: the method's tensors and the head
    deltatune.json               ours: base and its fingerprint, labels, every setting, SHA-256 of the two others

A folder that PEFT wrote lacks the last one and loads as well.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.files import new_folder, read_json, sha256, write_json
from deltatune.methods import METHODS, Method, Mixed, OverLayers, SoftPrompt, make, options_of
from deltatune.methods.values import whole
from deltatune.models.adapted import base_parameters
from deltatune.models.attach import (
    Attachment,
    activate,
    attach,
    attachment,
    detach,
)
from deltatune.models.quantise import storages_of
from deltatune.models.targets import below, ending
from deltatune.models.tokens import IN_FILES, NEW_TOKENS, NewTokens, grow, names_in_files, new_tokens

CONFIG, TENSORS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "deltatune.json"
_SHARED = "base_model."
_PREFIX = "base_model.model."
_PROMPT = "prompt_"
_REPEATED = ".base_layer.weight"
_NEW = "new tokens"
_RECORD = {"format", "base", "method", "options", "head", "sha256"}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder that was read and checked on its own, before any base is touched."""

    folder: Path
    method: Method
    tensors: Mapping[str, Tensor] = field(repr=False)
    """By path in the base, PEFT's prefix taken off."""
    base: str
    revision: str
    about: Mapping[str, Any]
    """Our own record (deltatune.json); empty for a folder that PEFT wrote."""
    repeated: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Weights of the base that the folder holds as well, as PEFT's do of adapted embeddings, by their names there."""

    new_tokens: Mapping[int, str] = field(default_factory=dict)
    """The tokens that its base has besides: what each id stands for, empty texts where the folder does not say."""

    @property
    def storage(self) -> dict[str, str]:
        """How the base was stored that it was trained over, by target; empty where it was not quantised."""
        return dict(self.about["base"].get("storage", {})) if self.about else {}

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes; numbers where the folder names none, as many as the head has outputs.

        None where it has no head: it is for a language model.
        """
        if "labels" in self.about:
            return tuple(self.about["labels"])
        heads = [tensor for key, tensor in self.tensors.items() if key.endswith("weight") and below(key, self.head)]
        return tuple(str(index) for index in range(heads[-1].shape[0])) if heads else ()

    @property
    def head(self) -> tuple[str, ...]:
        """Paths of the modules of the head that it holds."""
        if self.about:
            return tuple(self.about["head"])
        others = (key for key in self.tensors if key not in self.delta_keys and not key.startswith(_SHARED))
        return tuple(dict.fromkeys(NEW_TOKENS if key.endswith(IN_FILES) else key.rpartition(".")[0] for key in others))

    @property
    def delta_keys(self) -> dict[str, tuple[str, str]]:
        """Each key that belongs to a delta → its module path and its suffix; a soft prompt's have no path."""
        if isinstance(self.method, SoftPrompt):
            return {key: ("", key) for key in self.tensors if key.startswith(_PROMPT)}
        if not isinstance(self.method, OverLayers):
            return {}
        return {
            key: (key.removesuffix(f".{suffix}"), suffix)
            for key in self.tensors
            for suffix in self.method.suffixes
            if key.endswith(f".{suffix}")
        }


def save_adapter(model: nn.Module, folder: Path | str, *, base: str = "", revision: str = "", **about: Any) -> None:
    """Writes what was trained on `model` to `folder`, all of it or nothing; replaces what stood there.

    `about` (labels, settings, data …) goes into deltatune.json. Raises `UserError` where a value is not finite.
    """
    done = attachment(model)
    if done is None:
        raise UserError("nothing is attached to this model, so there is nothing to save")
    tensors = {
        _key(name, done.method): tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(model).items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"the adapter was not saved: {name} has values that are not finite", "lower the learning rate"
            )
    portable = _portable(done.method)
    with new_folder(Path(folder)) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        write_json(new / CONFIG, _peft_config(model, done, base, revision))
        record = {
            "format": 1,
            "base": {"id": base, "revision": revision, "fingerprint": done.fingerprint, "storage": storages_of(model)},
            "method": portable.name,
            "options": options_of(portable),
            "head": list(done.head),
            **_new_tokens_record(model),
            **({"trained as": options_of(done.method)} if portable != done.method else {}),
            **about,
            "sha256": {name: sha256(new / name) for name in (CONFIG, TENSORS)},
        }
        write_json(new / ABOUT, record)


def _portable(method: Method) -> Method:
    """The method that a file describes."""
    if isinstance(method, Mixed):
        return Mixed(*map(_portable, method.parts))
    return method.portable() if isinstance(method, OverLayers) else method


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the active adapter holds, by path in the base: the deltas' tensors and what else trains.

    What is shared over the model has a name that starts with `base_model.`, as PEFT has it.
    """
    done = cast(Attachment, attachment(model))
    stored = {key: tensor for part in done.parts for key, tensor in part.stored().items()}
    names = names_in_files(model)
    return stored | {names.get(name, name): p for name, p in base_parameters(model).items() if below(name, done.head)}


def read_adapter(folder: Path | str) -> SavedAdapter:
    """Reads an adapter folder and checks it: nothing damaged, a method we have, keys it knows, finite values."""
    folder = Path(folder)
    folder = folder if (folder / CONFIG).is_file() else folder / "adapter"  # the folder of a run
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder.parent} holds no adapter: there is no {CONFIG}", "give the folder that `tune --out` wrote"
        )
    about = _read_record(folder)
    config = read_json(folder / CONFIG)
    method = make(about["method"], about["options"]) if about else _method(config)
    tensors = _read_tensors(folder / TENSORS, _prefix(method))
    if about:
        base = about["base"]
        return SavedAdapter(folder, method, tensors, base["id"], base["revision"], about, new_tokens=_tokens_of(about))
    repeated = {key: tensors.pop(key) for key in list(tensors) if key.endswith(_REPEATED)}
    saved = SavedAdapter(
        folder=folder,
        method=method,
        tensors=tensors,
        base=config.get("base_model_name_or_path") or "",
        revision=config.get("revision") or "",
        about={},
        repeated={key.removesuffix(_REPEATED) + ".weight": tensor for key, tensor in repeated.items()},
        new_tokens=_tokens_of(config),
    )
    if isinstance(method, SoftPrompt):
        return replace(saved, tensors=_used(tensors, method, config))
    return replace(saved, method=_on_saved_layers(saved))


def load_adapter(model: nn.Module, saved: SavedAdapter | Path | str, *, name: str = "default") -> nn.Module:
    """Attaches a saved adapter to its base, in place, under `name`, and returns the model, in evaluation mode.

    Where it has new tokens the model's vocabulary grows by them; `add_tokens` lets the tokenizer know them.

    Raises `UserError` where the base is another than the one it was trained on, or a tensor is missing, unexpected or
    of another shape; the tensors are checked before any is copied, and adapters that stood here stand as before.
    """
    saved = saved if isinstance(saved, SavedAdapter) else read_adapter(saved)
    before = attachment(model)
    if saved.new_tokens:
        grow(cast(PreTrainedModel, model), [*saved.new_tokens], list(filter(None, saved.new_tokens.values())))
    attach(model, saved.method, name=name, head=saved.head)
    wanted = adapter_tensors(model)
    try:
        _check_base(saved, model)
        _check(saved, wanted)
        _fill(model, saved, wanted)
    except UserError:
        if not cast(Attachment, attachment(model)).trains_base:
            detach(model, name)
        if before is not None:
            activate(model, before.name)
        raise
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, saved: SavedAdapter, wanted: Mapping[str, Tensor]) -> None:
    """Puts the saved tensors, whose names and shapes fit, where they belong."""
    left = dict(wanted)
    for part in cast(Attachment, attachment(model)).parts:
        keys = part.stored().keys()
        part.restore({key: saved.tensors[key] for key in keys})
        left = {key: tensor for key, tensor in left.items() if key not in keys}
    for key, tensor in left.items():  # the head
        tensor.copy_(saved.tensors[key])


def _check_base(saved: SavedAdapter, model: nn.Module) -> None:
    if saved.about and saved.about["base"]["fingerprint"] != cast(Attachment, attachment(model)).fingerprint:
        if saved.storage != (given := storages_of(model)):
            raise UserError(
                f"{saved.folder} belongs to a base stored as {_named(saved.storage)}, not as {_named(given)}",
                f"load the base with storage={saved.storage}" if saved.storage else "load the base without a storage",
            )
        raise UserError(
            f"{saved.folder} was trained on another base: the weights of this one are not those of '{saved.base}'",
            f"load it on '{saved.base}'" + (f" at revision {saved.revision}" if saved.revision else ""),
        )
    own = base_parameters(model)
    for name, tensor in saved.repeated.items():  # in bf16 it does not matter in which type either was loaded
        if name not in own or not torch.equal(own[name].bfloat16().cpu(), tensor.bfloat16()):
            raise UserError(
                f"{saved.folder} has another {name} than this base",
                "it was made for another base, or for one whose vocabulary was changed: load it on that one",
            )


def _named(storages: Mapping[str, str]) -> str:
    return ", ".join(f"{words} ({target})" for target, words in storages.items()) or "it came, unquantised"


def _check(saved: SavedAdapter, wanted: Mapping[str, Tensor]) -> None:
    for problem, names in (
        ("lacks", wanted.keys() - saved.tensors.keys()),
        ("has an unknown tensor,", saved.tensors.keys() - wanted.keys()),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{saved.folder} {problem} {min(names)}{others}", "it was made for another model, or is not complete"
            )
    for name, tensor in wanted.items():
        if tensor.shape != saved.tensors[name].shape:
            raise UserError(
                f"{saved.folder}: {name} has shape {[*saved.tensors[name].shape]}, the base needs {[*tensor.shape]}",
                "it was made for another base or another number of labels",
            )
        if tensor.is_floating_point() and not saved.tensors[name].is_floating_point():
            raise UserError(
                f"{saved.folder}: {name} holds whole numbers of type {saved.tensors[name].dtype}, not fractions",
                "it is damaged, or of a kind that is not read here",
            )


def _read_record(folder: Path) -> dict[str, Any]:
    """Our own record of an adapter, with the files beside it checked against it; empty where PEFT wrote the folder."""
    if not (folder / ABOUT).is_file():
        return {}
    about = read_json(folder / ABOUT)
    mend = "train it again, or restore a copy"
    if not (isinstance(about, dict) and about.keys() >= _RECORD):
        raise UserError(f"{folder / ABOUT} is damaged: it is no record of an adapter", mend)
    for name in (CONFIG, TENSORS):
        wanted = about["sha256"].get(name)
        if wanted and not ((folder / name).is_file() and sha256(folder / name) == wanted):
            raise UserError(f"{folder / name} is damaged: it is not the file that was saved", mend)
    return about


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing", "adapters in other formats (.bin) are not read: they can run code")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} is not usable: {name} has values that are not finite numbers")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _key(name: str, method: Method) -> str:
    """The key in a file of what `adapter_tensors` names."""
    return name if name.startswith((_SHARED, _PROMPT)) else _prefix(method) + name


def _prefix(method: Method) -> str:
    """What stands before a module path in a file. PEFT puts no module of its own around a model with a soft prompt."""
    return _SHARED if isinstance(method, SoftPrompt) else _PREFIX


def _method(config: Mapping[str, Any]) -> Method:
    for kind in METHODS.values():
        if kind.kind != "selection" and cast(type[OverLayers | SoftPrompt], kind).reads(config):
            return cast(type[OverLayers | SoftPrompt], kind).from_peft(config)
    known = ", ".join(kind.peft_type for kind in METHODS.values())
    raise UserError(f"adapters of type {config.get('peft_type')!r} are not supported", f"known: {known}")


def _used(tensors: dict[str, Tensor], method: SoftPrompt, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What PEFT uses of a soft prompt's tensors; in an encoder–decoder that is not all that its file holds.

    It trains as many virtual tokens for the decoder, and never looks at them. And a decoder's layer i of n takes the
    prefix that stands in place 2·i mod n, so that with an even n two layers share one.
    """
    prompt = tensors.get("prompt_embeddings")
    if prompt is None or config.get("num_transformer_submodules") != 2:
        return tensors
    if method.place == "input":
        return {**tensors, "prompt_embeddings": prompt[: method.virtual_tokens]}
    layers = whole("prefix tuning", config, "num_layers")
    if prompt.ndim != 2 or prompt.shape[1] % layers:
        return tensors  # of a shape that is refused
    taken = [2 * layer % layers for layer in range(layers)]
    by_layer = prompt.view(len(prompt), layers, -1)[:, taken]
    return {**tensors, "prompt_embeddings": by_layer.flatten(1)}


def _on_saved_layers(saved: SavedAdapter) -> Method:
    """The method with exactly those layers as targets that the file holds tensors for, and patterns for these alone."""
    paths = tuple(dict.fromkeys(path for path, _ in saved.delta_keys.values()))
    if not paths:
        raise UserError(f"{saved.folder} holds no tensor of a {saved.method.name} adapter")
    patterns = {
        field: {
            entry: value
            for entry, value in getattr(saved.method, field).items()
            if any(ending(entry).fullmatch(path) for path in paths)
        }
        for field in cast(OverLayers, saved.method).patterns
    }
    return replace(saved.method, targets=paths, **patterns)  # type: ignore[type-var]


def _peft_config(model: nn.Module, done: Attachment, base: str, revision: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "peft_type": done.method.peft_type,
        "task_type": _task_type(model, done),
        "auto_mapping": None,
        "base_model_name_or_path": base or None,
        "revision": revision if re.fullmatch("[0-9a-f]{40}", revision) else None,  # PEFT asks the hub for it
        "inference_mode": True,
        "modules_to_save": [path for path in done.head if path != NEW_TOKENS] or None,
    }
    if not isinstance(done.method, Mixed):  # PEFT has no words for several; they are in deltatune.json
        config |= done.parts[0].to_peft(model)
    if NEW_TOKENS in done.head:
        new = cast(NewTokens, new_tokens(model))
        config["trainable_token_indices"] = {
            key.removesuffix(IN_FILES): new.ids.tolist() for key in names_in_files(model).values()
        }
    return dict(sorted(config.items()))


def _new_tokens_record(model: nn.Module) -> dict[str, Any]:
    new = new_tokens(model)
    if new is None or NEW_TOKENS not in cast(Attachment, attachment(model)).head:
        return {}
    texts = new.texts or ("",) * len(new.ids)
    return {_NEW: dict(zip(map(str, new.ids.tolist()), texts, strict=True))}


def _tokens_of(config: Mapping[str, Any]) -> dict[int, str]:
    """The new tokens that our record names, or a file of PEFT's by id alone."""
    if _NEW in config:
        return {int(number): text for number, text in config[_NEW].items()}
    given = config.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    if any(ids != lists[0] for ids in lists):
        raise UserError(
            "this adapter trained other tokens of the output layer than of the embedding",
            "adapters with the same trainable_token_indices for both are read",
        )
    return dict.fromkeys(lists[0], "")


def _task_type(model: nn.Module, done: Attachment) -> str | None:
    """What PEFT calls the use of the model: it knows how to write with one that has such a type."""
    if isinstance(model, PreTrainedModel) and model.can_generate():
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return "SEQ_CLS" if done.head else None
