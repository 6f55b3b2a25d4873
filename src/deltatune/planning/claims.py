"""The arithmetic that is taught about parameter-efficient fine-tuning, recomputed by the code that plans."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from deltatune.methods import LoRA, make
from deltatune.methods.contract import Site
from deltatune.models.count import count_on
from deltatune.planning.bases import known, planned_base, planned_outline
from deltatune.planning.machine import read_machine
from deltatune.planning.plan import Plan, plan
from deltatune.training.settings import Training
from deltatune.weights import parse_storage


@dataclass(frozen=True)
class Claim:
    """A figure that is taught, and what it comes to."""

    claim: str
    source: str
    verdict: str
    """holds, holds in one reading, does not hold."""
    computed: str
    """What is right, and how it is computed."""


_HOLDS, _READING, _NOT = "holds", "holds in one reading", "does not hold"


def check_claims() -> list[Claim]:
    """Every arithmetic claim with its verdict."""
    return [check() for check in _CHECKS]


def page(found: list[Claim] | None = None) -> str:
    """The text of docs/claims.md."""
    rows = [f"| {one.claim} | {one.source} | **{one.verdict}** | {one.computed} |" for one in found or check_claims()]
    return "\n".join([_INTRODUCTION, "| Claim | Source | Verdict | What it comes to |", "|---|---|---|---|", *rows, ""])


_INTRODUCTION = """\
# The figures that are taught

Written by `make docs`: `deltatune plan --claims` recomputes each figure with the code that counts and plans, and the
tests check that this page is current. GB are powers of ten. Nothing is downloaded: the
bases are known by their configuration.
"""


def _lora(out: int, in_: int, rank: int) -> int:
    return LoRA(rank=rank).parameters(Site(out, in_))


def _fewer(out: int, in_: int, rank: int) -> float:
    return 100 * (1 - _lora(out, in_, rank) / (out * in_))


@cache
def _total(base: str) -> int:
    return int(known()[base]["parameters"])


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


@cache
def _planned(base: str, method: str, storage: str, tokens: int, machine: str, lean: bool = False) -> Plan:
    settings = Training(batch_tokens=tokens, max_length=tokens)
    if lean:
        settings = settings.model_copy(update={"gradient_checkpointing": True, "optimiser": "paged"})
    [found] = plan(base, method, storage=storage, tokens=tokens, length=tokens, settings=settings, machine=machine)
    assert isinstance(found, Plan)
    return found


def _square() -> Claim:
    right = 768 * 768 == 589_824 and _lora(768, 768, 8) == 12_288
    return Claim(
        "768×768 weight: 589,824 parameters; LoRA r=8: 12,288 (98% fewer)",
        "LoRA lecture",
        _HOLDS if right and round(_fewer(768, 768, 8)) == 98 else _NOT,
        f"{768 * 768:,}; 8·(768 + 768) = {_lora(768, 768, 8):,}, {_fewer(768, 768, 8):.2f}% fewer",
    )


def _exercise() -> Claim:
    return Claim(
        "1024×1024, r=16: the reduction",
        "exercise of the same lecture",
        "an exercise",
        f"{1024 * 1024:,} → {_lora(1024, 1024, 16):,}: {_fewer(1024, 1024, 16):.3f}% fewer",
    )


def _thin() -> Claim:
    found = _lora(512, 64, 8), _lora(512, 64, 4)
    right = found == (512 + 4096, 2304) and 512 * 64 == 32_768 and round(_fewer(512, 64, 8)) == 86
    return Claim(
        "512×64 weight: 32,768; r=8: 512 + 4,096 (86% fewer); r=4: 256 + 2,048 = 2,304",
        "LoRA slides, chapter summary",
        _HOLDS if right else _NOT,
        f"r=8: {found[0]:,} ({_fewer(512, 64, 8):.1f}% fewer); r=4: {found[1]:,} ({_fewer(512, 64, 4):.1f}% fewer)",
    )


def _thousand() -> Claim:
    found = _lora(1000, 1000, 8)
    return Claim("1000×1000, r=8: 16,000", "comparison article", _HOLDS if found == 16_000 else _NOT, f"{found:,}")


def _klue() -> Claim:
    outline = planned_outline(planned_base("klue/bert-base"), ("0", "1"))
    plain = sum(parameter.numel() for parameter in outline.parameters())

    def trained(*targets: str) -> int:
        counted = count_on(outline, LoRA(rank=8, targets=targets))
        return counted.trainable - counted.head

    attention = trained("query", "key", "value", "attention.output.dense")
    dense = trained("query", "key", "value", "dense")
    larger = planned_outline(planned_base("google-bert/bert-large-uncased"), ("0", "1"))
    large = count_on(larger, LoRA(rank=8, targets=("query", "key", "value", "attention.output.dense")))
    right = large.trainable - large.head == 1_572_864
    return Claim(
        "klue/bert-base (vocabulary 32,000), LoRA r=8 on query, key, value, dense, 2 labels: 1,572,864 trainable of "
        "110,104,322, 1.43%",
        "lecture",
        _NOT if 1_572_864 not in (attention, dense) else _READING,
        f"the base with 2 labels has {plain:,} parameters. r=8 trains {attention:,} on query, key, value and the "
        f"attention's output ({100 * attention / (plain + attention):.2f}%); {dense:,} "
        f"({100 * dense / (plain + dense):.2f}%) where `dense` means every layer of that name, as PEFT takes it, "
        "pooler and MLP included; the head's 1,538 left out"
        + (
            "; 1,572,864 is what r=8 trains on query, key, value and the attention's output of BERT-large"
            if right
            else ""
        ),
    )


def _seven() -> Claim:
    total = _total("huggyllama/llama-7b")
    states = total * (4 + 4 + 8)
    return Claim(
        "7B model: 28 GB of fp32 weights; over 40 GB with gradients and optimiser states",
        "lecture",
        _READING,
        f"LLaMA-7B has {total:,} parameters: {_gb(4 * total)} in fp32 (28 for a round 7 billion). With fp32 gradients "
        f"and AdamW's two moments {_gb(states)}: over 40, and over twice that; {_gb(total * 6)} with bf16 weights and "
        "gradients and 8-bit moments",
    )


def _qlora() -> Claim:
    machine = read_machine("rtxa6000")
    plain, lean = (
        _planned("huggyllama/llama-65b", "lora:rank=64", "nf4", 512, "rtxa6000", lean) for lean in (False, True)
    )
    return Claim(
        "65B model fine-tuned on one 48 GB GPU with QLoRA",
        "lecture",
        _HOLDS if plain.memory.training <= machine.memory else _READING,
        f"a step on one example of 512 tokens, r=64 on all linear layers, planned for an RTX A6000 of "
        f"{_gb(machine.memory)}: with AdamW in fp32 and every activation kept {_gb(plain.memory.training)} (weights "
        f"{_gb(plain.memory.weights)}, activations {_gb(plain.memory.activations)}); with checkpointing and paged "
        f"moments, as the paper does it, {_gb(lean.memory.training)}, which "
        + ("fits" if lean.memory.training <= machine.memory else "does not fit either"),
    )


def _double() -> Claim:
    numbers = 2**24
    once = 8 * parse_storage("nf4:double=false").nbytes(numbers) / numbers
    twice = 8 * parse_storage("nf4").nbytes(numbers) / numbers
    saved = (once - twice) / 8 * _total("huggyllama/llama-65b")
    return Claim(
        "Double quantisation saves about 0.4 bit a parameter, about 3 GB at 65B",
        "slides",
        _HOLDS if abs(once - twice - 0.373) < 0.01 else _NOT,
        f"{once:.3f} → {twice:.3f} bits: {once - twice:.3f} saved, {_gb(saved)} at 65B",
    )


def _quarter() -> Claim:
    weights = {words: parse_storage(words).nbytes(2**24) / 2**24 for words in ("nf4", "bf16", "fp32")}
    a = _planned("huggyllama/llama-7b", "lora", "", 512, "a100")
    b = _planned("huggyllama/llama-7b", "lora", "nf4", 512, "a100")
    return Claim(
        "QLoRA cuts memory by about 75%",
        "lecture",
        _READING,
        f"of the linear weights against 16 bits: {100 * (1 - weights['nf4'] / weights['bf16']):.1f}% "
        f"({100 * (1 - weights['nf4'] / weights['fp32']):.1f}% against 32). Of a step, LoRA on LLaMA-7B at 512 tokens: "
        f"{_gb(a.memory.training)} → {_gb(b.memory.training)}, "
        f"{100 * (1 - b.memory.training / a.memory.training):.0f}%, "
        "since embeddings, activations and what trains stay",
    )


def _large() -> Claim:
    total = _total("openai-community/gpt2-large")
    outline = planned_outline(planned_base("openai-community/gpt2-large"), (), "nf4")
    four = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in outline.state_dict().values())
    tied = 4 * 50257 * 1280
    stored = four - (tied if "lm_head.weight" in outline.state_dict() else 0)
    return Claim(
        "GPT-2 Large: 2.88 GB in fp32, 0.46 GB (16%) in 4 bits",
        "comparison article",
        _READING if abs(4 * total / 2**30 - 2.88) < 0.01 else _NOT,
        f"{total:,} parameters are {_gb(4 * total)}, {4 * total / 2**30:.2f} GiB: taught in GiB. In nf4 the linear "
        f"layers with the embeddings left in fp32 are {_gb(stored)} ({100 * stored / (4 * total):.0f}%), in bf16 "
        f"{_gb(stored - 2 * _embedded())}; all of it in 4.127 bits would be {_gb(total * 4.127 / 8)} "
        f"({100 * 4.127 / 32:.0f}%)",
    )


def _embedded() -> int:
    return (50257 + 1024) * 1280


def _shares() -> Claim:
    outline = planned_outline(planned_base("huggyllama/llama-7b"), ())
    small = count_on(outline, LoRA(rank=8, targets="attention-qv"))
    wide = count_on(outline, LoRA(rank=16))
    adapters = count_on(outline, make("pfeiffer"))
    bert = planned_outline(planned_base("google-bert/bert-base-uncased"), ("0", "1"))
    houlsby = count_on(bert, make("houlsby:reduction=64".partition(":")[0], {"reduction": 64}))
    lora = count_on(outline, LoRA(rank=64))
    bank = count_on(outline, make("vblora", {"rank": 4, "vector_length": 256}))
    return Claim(
        "LoRA trains 0.1–0.5% (1–2%) of the parameters, adapters 0.1–1%; VB-LoRA stores about 0.01× of LoRA",
        "several",
        _READING,
        f"LLaMA-7B: LoRA r=8 on query and value {100 * small.trainable / small.total:.3f}%, r=16 on all linear layers "
        f"{100 * wide.trainable / wide.total:.2f}%, r=64 {100 * lora.trainable / lora.total:.2f}%. Adapters at "
        f"the paper's /16 {100 * adapters.trainable / adapters.total:.1f}% (after the FFN alone); Houlsby at /64 on "
        f"BERT-base {100 * (houlsby.trainable - houlsby.head) / houlsby.total:.2f}%. VB-LoRA (r=4, h=256, b=256) "
        f"stores {bank.stored:,} numbers, {bank.stored / lora.stored:.3f} of LoRA at r=64 and "
        f"{bank.stored / small.stored:.2f} of LoRA at r=8 on query and value",
    )


_CHECKS: tuple[Callable[[], Claim], ...] = (
    _square,
    _exercise,
    _thin,
    _thousand,
    _klue,
    _seven,
    _qlora,
    _double,
    _quarter,
    _large,
    _shares,
)
