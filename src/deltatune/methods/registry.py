"""The methods there are, by name, and how one is made from its name and options."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deltatune.errors import UserError, unknown
from deltatune.methods.adalora import AdaLoRA
from deltatune.methods.adapterfusion import AdapterFusion
from deltatune.methods.bitfit import BitFit
from deltatune.methods.compacter import Compacter
from deltatune.methods.contract import Method
from deltatune.methods.dora import DoRA
from deltatune.methods.fourierft import FourierFT
from deltatune.methods.full import Full
from deltatune.methods.head import Head
from deltatune.methods.hira import HiRA
from deltatune.methods.houlsby import Houlsby
from deltatune.methods.ia3 import IA3
from deltatune.methods.last_k import LastK
from deltatune.methods.loha import LoHa
from deltatune.methods.lokr import LoKr
from deltatune.methods.lora import LoRA
from deltatune.methods.miss import MiSS
from deltatune.methods.mixed import Mixed
from deltatune.methods.none import NoTraining
from deltatune.methods.norms import Norms
from deltatune.methods.oft import OFT
from deltatune.methods.parallel import Parallel
from deltatune.methods.pfeiffer import Pfeiffer
from deltatune.methods.prefix import Prefix
from deltatune.methods.prompt import Prompt
from deltatune.methods.ptuning import PTuning
from deltatune.methods.select import Select
from deltatune.methods.shira import SHiRA
from deltatune.methods.vblora import VBLoRA
from deltatune.methods.vera import VeRA
from deltatune.methods.waveft import WaveFT
from deltatune.words import parse as parse_one

_EVERY: tuple[type[Method], ...] = (
    Full,
    Head,
    NoTraining,
    LoRA,
    DoRA,
    AdaLoRA,
    VBLoRA,
    VeRA,
    HiRA,
    LoHa,
    LoKr,
    MiSS,
    OFT,
    IA3,
    WaveFT,
    FourierFT,
    SHiRA,
    Houlsby,
    Pfeiffer,
    Parallel,
    Compacter,
    AdapterFusion,
    Prompt,
    PTuning,
    Prefix,
    BitFit,
    Norms,
    LastK,
    Select,
)
METHODS: Mapping[str, type[Method]] = {method.name: method for method in _EVERY}
"""Every registered method, by its name."""


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of that name with those hyperparameters; what is unknown or ill-typed is an error that names it.

    A mix, `lora+norms`, takes its parts' by the names of these: {"lora": {"rank": 8}}, or {"lora.rank": 8}.
    """
    if "+" in name:
        return _mix(name, options or {})
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    options, kind = options or {}, METHODS[name]
    if not options:
        return kind()  # what reads options reads their descriptions too, from the source
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # every method is a dataclass
    for option in options:
        if option not in known:
            raise unknown(f"{name} option", option, known)
    try:
        return _reader(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("tuple[", "str")))
        schema = _reader(kind).json_schema()["properties"].get(place.partition(".")[0], {})
        hint = (
            f"{place}: {schema['description']}" if "description" in schema else f"`deltatune methods {name}` lists them"
        )
        raise UserError(f"{name}: {place} = {first['input']!r}: {first['msg'].lower()}", hint) from error


def _mix(name: str, options: Mapping[str, Any]) -> Mixed:
    names = [part.strip() for part in name.split("+")]
    given: dict[str, dict[str, Any]] = {part: {} for part in names}
    for key, value in options.items():
        part, _, option = key.partition(".")
        if part not in given or not (option or isinstance(value, Mapping)):
            kinds = [METHODS[part] for part in names if part in METHODS]
            known = [f"{kind.name}.{field.name}" for kind in kinds for field in fields(kind)]  # type: ignore[arg-type]
            raise unknown(f"{name} option", key, known)
        given[part] |= {option: value} if option else value
    return Mixed(*(make(part, given[part]) for part in names))


def parse(words: str) -> tuple[str, dict[str, Any]]:
    """Splits `name:option=value,…` into its name and options; values are read as YAML, so `[a, b]` is a list.

    `lora:rank=8+norms` is the mix `lora+norms` with the options {"lora": {"rank": 8}}.
    """
    parts: list[str] = []
    for piece in words.split("+"):
        # Within options a plus divides methods only where a method's name follows; the others belong to values.
        inside = parts and "=" in parts[-1] and piece.partition(":")[0].strip() not in METHODS
        parts = [*parts[:-1], f"{parts[-1]}+{piece}"] if inside else [*parts, piece]
    if len(parts) == 1:
        return parse_one(words)
    parsed = [parse_one(part) for part in parts]
    return "+".join(name for name, _ in parsed), {name: options for name, options in parsed if options}


def options_of(method: Method) -> dict[str, Any]:
    """Every hyperparameter of a method with its value, defaults included, ready for JSON and YAML."""
    if isinstance(method, Mixed):
        return {part.name: options_of(part) for part in method.parts}
    dumped: dict[str, Any] = _reader(type(method)).dump_python(method, mode="json")
    return dumped


@cache
def _reader(kind: type[Method]) -> TypeAdapter[Method]:
    """What reads and writes a method's options; to make one takes longer than to use it."""
    return TypeAdapter(kind)
