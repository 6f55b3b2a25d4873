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

_EVERY: tuple[type[Method], ...] = (
    Full,
    Head,
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
    BitFit,
    Norms,
    LastK,
    Select,
    Houlsby,
    Pfeiffer,
    Parallel,
    Compacter,
    Prompt,
    PTuning,
    Prefix,
)
METHODS: Mapping[str, type[Method]] = {method.name: method for method in _EVERY}
"""Every registered method, by its name."""


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of that name with those hyperparameters; what is unknown or ill-typed is an error that names it."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    options, kind = options or {}, METHODS[name]
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


def options_of(method: Method) -> dict[str, Any]:
    """Every hyperparameter of a method with its value, defaults included, ready for JSON and YAML."""
    dumped: dict[str, Any] = _reader(type(method)).dump_python(method, mode="json")
    return dumped


@cache
def _reader(kind: type[Method]) -> TypeAdapter[Method]:
    """What reads and writes a method's options; to make one takes longer than to use it."""
    return TypeAdapter(kind)
