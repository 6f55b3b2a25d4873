"""Who races in which work, and with which settings: everything that is not the work itself stands here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OUR_BATCHES = "our-batches"
"""What a contestant with batches of its own is told where it shall take ours."""

ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=68719476736",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""glibc keeps what is freed instead of giving it back, so that large temporaries need no fresh pages; PyTorch asks for
large pages, as ours does by itself."""


@dataclass(frozen=True)
class Contestant:
    """One entry: what it is, which module runs it, and how."""

    name: str
    what: str
    module: str
    """Within `race`; its function `run(work, contestant, turn)` trains."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    same_batches: bool = True
    """Whether each of its steps has the examples of ours."""
    kind: str = "lora"
    """What it trains: those of one kind have as many parameters and like losses."""

    def facts(self) -> dict[str, Any]:
        """What stands of it in the results."""
        return asdict(self)


OURS = Contestant("deltatune", "`deltatune.tune`", "ours", {"method": "lora", "options": {"rank": 8}})
TUNED = {"dtype": "bfloat16", "bf16": True, "attention": "eager", "gradient_checkpointing": False}
"""As fast as we could make Transformers' Trainer with peft: bf16 base, fp32 adapters, autocast, plain attention, which
is faster on a CPU than SDPA at these lengths, our batches of like length padded to their longest, completions alone
scored."""
DORA, QLORA = {**TUNED, "dora": True}, {**TUNED, "nf4": True}

WORKS: Mapping[str, tuple[Contestant, ...]] = {
    "minilm": (
        OURS,
        Contestant(
            "trainer",
            "Transformers' Trainer with peft as taught: fp32, padded to 128, random batches of 32",
            "trainer",
            {"dtype": "float32", "bf16": False, "attention": "sdpa", "pad_to": 128},
            same_batches=False,
        ),
        Contestant("peft", "Trainer with peft, tuned", "trainer", TUNED),
        Contestant("peft, allocator", "Trainer with peft, tuned, with a tuned allocator", "trainer", TUNED, ALLOCATOR),
    ),
    "smollm2": (
        OURS,
        Contestant(
            "trl",
            "TRL's SFTTrainer with peft as documented: its defaults, batches of 8",
            "sft",
            {},
            same_batches=False,
        ),
        Contestant(
            "trl, tuned",
            "SFTTrainer with peft, tuned, with a tuned allocator",
            "sft",
            TUNED,
            ALLOCATOR,
        ),
        Contestant("peft", "Trainer with peft, tuned", "trainer", TUNED),
        Contestant("peft, allocator", "Trainer with peft, tuned, with a tuned allocator", "trainer", TUNED, ALLOCATOR),
    ),
    "smollm2-8x128": (
        OURS,
        Contestant("probe", "the matrix products alone", "probe", kind="probe"),
        Contestant("peft", "Trainer with peft, tuned", "trainer", TUNED),
        Contestant("peft, allocator", "Trainer with peft, tuned, with a tuned allocator", "trainer", TUNED, ALLOCATOR),
    ),
    "smollm2-dora": (
        OURS,
        Contestant("deltatune dora", "DoRA", "ours", {"method": "dora", "options": {"rank": 8}}, kind="dora"),
        Contestant("peft dora", "peft's DoRA, tuned", "trainer", DORA, kind="dora"),
        Contestant(
            "peft dora, allocator",
            "peft's DoRA, tuned, with a tuned allocator",
            "trainer",
            DORA,
            ALLOCATOR,
            kind="dora",
        ),
    ),
    "smollm2-qlora": (
        OURS,
        Contestant("deltatune qlora", "LoRA over nf4", "ours", {**OURS.settings, "storage": "nf4"}, kind="qlora"),
        Contestant("peft qlora", "peft over bitsandbytes' nf4, tuned", "trainer", QLORA, kind="qlora"),
        Contestant(
            "peft qlora, allocator",
            "peft over bitsandbytes' nf4, tuned, with a tuned allocator",
            "trainer",
            QLORA,
            ALLOCATOR,
            kind="qlora",
        ),
    ),
}
"""Those of a work are in memory together: few enough that 16 GB hold them."""


def contestant(work: str, name: str) -> Contestant:
    """The entry of that name."""
    return next(one for one in WORKS[work] if one.name == name)
