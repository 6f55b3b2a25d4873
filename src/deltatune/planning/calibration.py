"""Measuring this machine: products and other operations by type and size, and what starting one takes.

The sizes are powers of two, and the small model that is trained has widths that no real base has: what a plan says of
a base was not measured on it.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from deltatune import kernels
from deltatune.data.batches import Batch
from deltatune.errors import UserError
from deltatune.files import read_json, write_json
from deltatune.methods import make
from deltatune.models.attach import attach
from deltatune.models.base import Base
from deltatune.models.count import count_on
from deltatune.packages import cache_root
from deltatune.planning.machine import Machine, Overhead, from_json
from deltatune.planning.rehearsal import BatchShape, rehearse
from deltatune.planning.work import OWN_PRODUCT
from deltatune.training.classification import Classification
from deltatune.training.memory import peak, resident
from deltatune.training.pieces import quicken
from deltatune.training.pooled import pooled
from deltatune.training.precision import Computed, prepare, resolve
from deltatune.weights import parse_storage
from deltatune.weights.codec import decode, encode

_SIDES = (8, 64, 512, 2048)
"""Sides of the measured products."""
_MOST = 1.2e9
"""Operations of the largest measured product."""
_NUMBERS = (2**10, 2**15, 2**18, 2**21)
"""Numbers in the tensors of everything else."""
_TURNS = 64
"""The most tensors that are measured in turn."""
_CACHES = 2**25
"""Bytes of them that are more than a core's own caches hold."""
_FORM = 5
_GLIBC: dict[str, Any] = {"slack": 1.4, "most_slack": 96 * 2**20, "heap": 40 * 2**20}
"""Of glibc's heap on a CPU, fitted once to runs of the embedded bases (docs/log.md); no machine measures them."""
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


_UNMEASURED = "a guess: `deltatune doctor --measure` measures this machine"


def this_machine(measure: bool = False) -> Machine:
    """This machine as it was measured last, or now where that is asked for; a guess where it never was."""
    path = _path()
    if path.is_file() and not measure:
        try:
            return replace(from_json(read_json(path)), **_GLIBC)
        except (UserError, KeyError, TypeError):  # damaged, or from another version
            pass
    if not measure:
        return _guessed()
    machine = _measured()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, machine.as_json())
    return machine


def _path() -> Path:
    """A file for this machine and number of threads."""
    name = f"{platform.node()}-{os.cpu_count()}-{torch.get_num_threads()}-torch{torch.__version__}-{_FORM}"
    return cache_root() / "machines" / f"{name}.json"


def _measured() -> Machine:
    precision = resolve("auto")
    kinds = ["float32", "bfloat16"] if precision == "bf16" else ["float32"]
    processes, (grown, longer) = _processes()
    machine = Machine(
        name=f"{torch.cpu.get_capabilities().get('cpu_name') or platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        memory=_memory(),
        precision=precision,
        source="measured here",
        processes=processes,
        kernel=grown,
        making=longer,
        **_GLIBC,
        products={kind: _products(_TYPES[kind]) for kind in kinds} | _own_products(),
        moves={f"{name} {kind}": points for kind in kinds for name, points in _moves(_TYPES[kind]).items()},
    )
    return _with_real_steps(machine)


def _guessed() -> Machine:
    threads = torch.get_num_threads()
    process = Overhead(400 * 2**20, 420 * 2**20, 460 * 2**20, 560 * 2**20)
    return Machine(
        name=f"this machine, {threads} threads ({_UNMEASURED})",
        memory=_memory(),
        precision=resolve("auto"),
        source=_UNMEASURED,
        processes={"fresh": process, "forked": process},
        **_GLIBC,
        peaks={"float32": 1e11 * threads, "bfloat16": (4e11 if resolve("auto") == "bf16" else 2e10) * threads},
        bandwidth=1.5e10,
        call=3e-5,
    )


def _memory() -> int:
    """Bytes of memory that are there for a process: what the system has, or less where a limit is set."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total


_PROCESS = """
import json, os, tempfile
import deltatune.comparing.cell
from deltatune.planning.calibration import kernel, small_run
from deltatune.training.memory import resident

imported = resident()
read, write = os.pipe()
if not os.fork():
    os.write(write, json.dumps(small_run()).encode())
    os._exit(0)
os.wait()
print(json.dumps({"forked": json.loads(os.read(read, 1000)), "fresh": small_run(), "kernel": kernel()}))
"""


def _processes() -> tuple[dict[str, Overhead], tuple[int, float]]:
    """What a process holds besides the run, of a fresh one and of one that was forked from it; and `kernel`."""
    done = subprocess.run([sys.executable, "-c", _PROCESS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Overhead(*found[name]) for name in ("forked", "fresh")}, found["kernel"]


def kernel() -> tuple[int, float]:
    """Bytes by which this process grows with a product of a new shape, and seconds that it takes longer than the next.

    The means of some in the machine's precision.
    """
    dtype = torch.bfloat16 if resolve("auto") == "bf16" else torch.float32
    weight, rows, before, took = torch.randn(396, 176, dtype=dtype), range(331, 427), 0, [0.0, 0.0]
    for number, count in enumerate(rows):
        if number == len(rows) // 2:  # by then the heap has what the products themselves need
            before, took = resident(), [0.0, 0.0]
        x = torch.randn(count, 176, dtype=dtype)
        for turn in (0, 1):
            began = _clock()
            (x @ weight.T) @ weight
            took[turn] += _clock() - began
    # half of the rows, two products each
    return max(0, resident() - before) // len(rows), max(0.0, took[0] - took[1]) / len(rows)


def small_run() -> tuple[int, int, int, int]:
    """Resident memory of this process now, and once it has loaded a tiny model, trained it, and scored it."""
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        BertForSequenceClassification(_config()).save_pretrained(folder)
        model = BertForSequenceClassification.from_pretrained(folder)
    loaded = peak()
    _real_step(model, _SHORT, resolve("auto"))
    trained, then = peak(), resident()
    import sklearn.metrics  # noqa: F401  # as scoring does

    return before, loaded, trained, trained + resident() - then


def _clock() -> float:
    """Seconds; on one thread those of the processor, which others touch little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _took(run: Callable[[], Any]) -> float:
    """Seconds of one call, the median of some."""
    run()
    began = _clock()
    run()
    once = _clock() - began
    times = []
    repeat = max(1, round(0.0005 / max(once, 1e-7)))
    for _ in range(3):
        began = _clock()
        for _ in range(repeat):
            run()
        times.append((_clock() - began) / repeat)
    return statistics.median(times)


def _products(dtype: torch.dtype) -> list[tuple[tuple[float, ...], float]]:
    found: list[tuple[tuple[float, ...], float]] = []
    for batch, sides in ((1, _SIDES), (64, (16, 64, 256))):
        for m in sides:
            for k in sides:
                for n in sides:
                    if not 1e4 < 2 * batch * m * k * n <= _MOST:
                        continue
                    a, b = torch.randn(batch, m, k, dtype=dtype), torch.randn(batch, n, k, dtype=dtype).transpose(1, 2)
                    if batch == 1:
                        a, b = a[0], b[0]
                    found.append(((batch, m, k, n), _took(partial(torch.matmul, a, b))))
    return found


def _own_products() -> dict[str, list[tuple[tuple[float, ...], float]]]:
    """Those of `kernels`, where this processor has them."""
    found: list[tuple[tuple[float, ...], float]] = []
    for tokens, width, out in product((64, 512, 2048), (64, 512, 2048), (64, 512, 2048)):
        x, weight = torch.randn(tokens, width).bfloat16(), torch.randn(out, width).bfloat16()
        if 2 * tokens * width * out <= _MOST and kernels.multiplies(x, weight):
            found.append(((1, tokens, width, out), _took(partial(kernels.product, x, weight))))
    return {f"{OWN_PRODUCT} bfloat16": found} if found else {}


def _moves(dtype: torch.dtype) -> dict[str, list[tuple[float, float]]]:
    """As in a step, where what an operation reads has left the caches since: each call has tensors of its own."""
    found: dict[str, list[tuple[float, float]]] = {}
    for numbers in _NUMBERS:
        turns = range(min(_TURNS, max(2, _CACHES // (numbers * dtype.itemsize))))
        several = [_runs(dtype, numbers) | _decodings(dtype, numbers) for _ in turns]
        for name, (_, moved) in several[0].items():
            turn = cycle([runs[name][0] for runs in several])
            found.setdefault(name, []).append((moved, _took(lambda turn=turn: next(turn)())))  # type: ignore[misc]
    return found


def _decodings(dtype: torch.dtype, numbers: int) -> dict[str, tuple[Callable[[], Any], float]]:
    found: dict[str, tuple[Callable[[], Any], float]] = {}
    for words in ("nf4", "nf3", "int8"):
        storage = parse_storage(words)
        packed, into = encode(torch.randn(numbers // 64, 64), storage), torch.empty(numbers, dtype=dtype)
        found[f"decode {words}"] = (partial(decode, packed, storage, into), into.nbytes + packed.codes.nbytes)
    return found


def _runs(dtype: torch.dtype, numbers: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Operations on tensors of so many numbers, and the bytes that they read and write."""
    x = torch.randn(numbers // 64, 64, dtype=dtype)
    wide, ids = torch.randn(512, 64, dtype=dtype), torch.randint(0, 512, (numbers // 64,))
    size, ones = x.nbytes, torch.ones(64, dtype=dtype)
    soft, mask = x.softmax(-1), x > 0
    out, mean, scale = torch.native_layer_norm(x, [64], ones, ones, 1e-5)
    backward = (x, x, [64], mean, scale, ones, ones, [True, True, True])
    words = torch.empty(numbers // 4 + 1, dtype=torch.int64)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    return {
        "mul": (lambda: x * x, 3 * size),
        "add": (lambda: x + x, 3 * size),
        "mul_": (lambda: x.mul_(1.0), 2 * size),
        "add_": (lambda: x.add_(x, alpha=0.0), 3 * size),
        "clone": (lambda: x.clone(), 2 * size),
        "copy_": (lambda: out.copy_(x), 2 * size),
        "_to_copy": (lambda: x.to(other), size + numbers * other.itemsize),
        "cat": (lambda: torch.cat((x, x)), 4 * size),
        "sum": (lambda: x.sum(0), size),
        "mean": (lambda: x.mean(-1), size),
        "pow": (lambda: x.pow(2), 2 * size),
        "neg": (lambda: -x, 2 * size),
        "zeros": (lambda: torch.zeros_like(x), size),
        "new_zeros": (lambda: torch.zeros_like(x), size),
        "gelu": (lambda: F.gelu(x), 2 * size),
        "gelu_backward": (lambda: torch.ops.aten.gelu_backward(x, x), 3 * size),
        "silu": (lambda: F.silu(x), 2 * size),
        "silu_backward": (lambda: torch.ops.aten.silu_backward(x, x), 3 * size),
        "relu": (lambda: F.relu(x), 2 * size),
        "tanh": (lambda: x.tanh(), 2 * size),
        "tanh_backward": (lambda: torch.ops.aten.tanh_backward(x, x), 3 * size),
        "_softmax": (lambda: x.softmax(-1), 2 * size),
        "_log_softmax": (lambda: x.log_softmax(-1), 2 * size),
        "_softmax_backward_data": (lambda: torch._softmax_backward_data(x, soft, -1, dtype), 3 * size),
        "_log_softmax_backward_data": (
            lambda: torch.ops.aten._log_softmax_backward_data(x, soft, -1, dtype),
            3 * size,
        ),
        "native_layer_norm": (lambda: torch.native_layer_norm(x, [64], ones, ones, 1e-5), 2 * size),
        "native_layer_norm_backward": (lambda: torch.ops.aten.native_layer_norm_backward(*backward), 3 * size),
        "random_": (lambda: words.random_(-(2**63), None), 2 * words.nbytes),
        "ge": (lambda: x >= 0.5, size + numbers),
        "where": (lambda: torch.where(mask, x, x), 3 * size + numbers),
        "embedding": (lambda: F.embedding(ids, wide), size + wide.nbytes),
        "index": (lambda: x[ids % len(x)], 2 * size),
        "index_select": (lambda: wide[ids], size + wide.nbytes),
    }


_SHORT, _LONG = BatchShape(5, 23), BatchShape(21, 45)


def _config(width: int = 176) -> BertConfig:
    return BertConfig(
        vocab_size=1009,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=width // 44,
        intermediate_size=width * 9 // 4,
    )


def _with_real_steps(machine: Machine) -> Machine:
    """The machine with what only steps show: two unknowns from a step of little work and one of much.

    took = calls · `call` + work · `fresh`. Work takes no less than in a loop, and starting it something.
    """
    found = []
    for width, shape in ((176, _SHORT), (528, _LONG)):
        with torch.device("meta"):
            outline = BertForSequenceClassification(_config(width))
        counted = count_on(outline, make("lora")).trainable
        planned = rehearse(outline, make("lora"), shape, machine.precision, trained=counted).step
        took = _real_step(BertForSequenceClassification(_config(width)), shape, machine.precision)
        found.append((planned.calls, machine.work(planned), took))
    (calls, work, took), (more_calls, more_work, longer) = found
    fresh = max(1.0, (longer * calls - took * more_calls) / (more_work * calls - work * more_calls))
    return replace(machine, call=max(1e-6, (took - fresh * work) / calls), fresh=fresh)


def _real_step(model: BertForSequenceClassification, shape: BatchShape, precision: Computed) -> float:
    attach(model, make("lora"))
    prepare(model, precision)
    quicken(model, shape.length)
    model.train()
    ids = torch.randint(5, 1000, (shape.examples, shape.length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    labels: Tensor = torch.zeros(shape.examples, dtype=torch.int64)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, labels, (0,), shape.tokens, shape.examples)
    task = Classification(Base(model, None, "", ""), precision)

    def step() -> None:
        task.backward(batch, shape.examples)
        model.zero_grad()

    with pooled(model, lambda: task.run(batch)):  # as the rehearsal has it
        for _ in range(3):
            step()
        return min(_took(step) for _ in range(3))


def checks(machine: Machine) -> list[tuple[str, str]]:
    """What `deltatune doctor --measure` says of this machine, line by line."""
    largest = {
        kind: max(2 * math.prod(shape) / took for shape, took in measured)
        for kind, measured in machine.products.items()
    }
    own = largest.pop(f"{OWN_PRODUCT} bfloat16", None)
    moved = {kind: max(size / took for size, took in machine.moves[f"clone {kind}"]) for kind in largest}
    return [
        ("machine", machine.name),
        ("memory", f"{machine.memory / 2**30:.1f} GiB"),
        ("precision", machine.precision),
        *((f"products in {kind}", f"{rate / 1e9:,.0f} GFLOP/s") for kind, rate in largest.items()),
        *([] if own is None else [("products of our own", f"{own / 1e9:,.0f} GFLOP/s")]),
        *((f"copies in {kind}", f"{rate / 1e9:,.1f} GB/s") for kind, rate in moved.items()),
        ("starting an operation", f"{1e6 * machine.call:.1f} µs"),
        (
            "a kernel for products of a new shape",
            f"{machine.kernel / 2**20:.2f} MiB, {1000 * machine.making:.1f} ms",
        ),
        ("work in a step", f"{machine.fresh:.2f} of what it takes in a loop"),
        ("a process that has trained a tiny model", f"{machine.processes['fresh'].training / 2**20:,.0f} MiB"),
    ]
