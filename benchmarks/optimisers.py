"""What the optimisers cost: time of a step, bytes of their states, anonymous memory; and how far they stray from AdamW.

python benchmarks/optimisers.py [--rounds 15]

Full fine-tuning of `minilm` on real batches of 1,024 tokens, in the machine's precision. Times are medians over the
rounds and medians of the ratios within a round: each optimiser has its own copy of the parameters, gets the gradients
of the same backward pass, and they take turns at being first. Memory is that of a fresh process for each, after a few
steps of the training loop. Distance is over 30 steps of the loop, on what AdamW itself moved.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import deltatune
from deltatune import Full, Training
from deltatune.data.batches import collate, epoch
from deltatune.data.tokens import tokenize
from deltatune.training.attention import choose_attention
from deltatune.training.events import Event, Step
from deltatune.training.optimisers import make_optimiser
from deltatune.training.precision import autocast, prepare, resolve

NAMES = ("adamw", "adamw8bit", "paged")


def times(rounds: int) -> None:
    """Prints what a step of each optimiser takes, beside the backward pass, and the bytes of its states."""
    data = deltatune.load_data("rotten-tomatoes").limited(train=2000, validation=10, test=10, seed=0)
    base = deltatune.load("minilm", labels=data.labels)
    precision = resolve("auto")
    model = deltatune.attach(base.model, Full())
    prepare(model, precision)
    choose_attention(model, 256)
    model.train()
    tokens = tokenize(data.train, base.tokenizer, 256)
    batches = [collate(tokens, places, 0) for places in epoch(tokens.lengths, 1024, np.random.default_rng(0))]
    named = dict(model.named_parameters())
    copies = {
        name: {path: nn.Parameter(parameter.detach().clone()) for path, parameter in named.items()} for name in NAMES
    }
    optimisers = {
        name: make_optimiser(name, copies[name], dict.fromkeys(named, 1.0), decay=0.01)  # type: ignore[arg-type]
        for name in NAMES
    }
    taken: dict[str, list[float]] = {name: [] for name in ("forward", "backward", *NAMES)}
    for number in range(rounds + 2):
        batch = batches[number % len(batches)]
        began = time.perf_counter()
        with autocast(precision, torch.device("cpu")):
            logits = model(**batch.inputs).logits
        loss = F.cross_entropy(logits.float(), batch.labels)
        forward = time.perf_counter()
        loss.backward()
        taken["forward"].append(1000 * (forward - began))
        taken["backward"].append(1000 * (time.perf_counter() - forward))
        first = number % len(NAMES)
        for name in (*NAMES, *NAMES)[first : first + len(NAMES)]:
            for path, parameter in named.items():
                copies[name][path].grad = parameter.grad
            began = time.perf_counter()
            optimisers[name].step()
            taken[name].append(1000 * (time.perf_counter() - began))
        model.zero_grad()
    taken = {name: every[2:] for name, every in taken.items()}  # two rounds of warming up

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[name], taken[other], strict=True))

    count = sum(parameter.numel() for parameter in named.values())
    print(f"{precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, {count:,} parameters")
    print(
        f"forward {statistics.median(taken['forward']):.0f} ms, backward {statistics.median(taken['backward']):.0f} ms"
    )
    print(f"{'optimiser':10} {'ms':>6} {'of adamw':>9} {'of backward':>12} {'bytes of states':>16} {'a parameter':>12}")
    for name in NAMES:
        states = [tensor for state in optimisers[name].state.values() for tensor in state.values()]
        size = sum(tensor.nbytes for tensor in states)
        print(
            f"{name:10} {statistics.median(taken[name]):6.0f} {ratio(name, 'adamw'):9.2f} "
            f"{ratio(name, 'backward'):12.2f} {size:16,} {size / count:12.3f}",
            flush=True,
        )


def smaps() -> dict[str, int]:
    """This process' memory now, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def trained(name: str, steps: int) -> tuple[dict[str, torch.Tensor], list[float], dict[str, int]]:
    """The parameters after some steps of the loop, the loss of each, and memory after the last but before its end."""
    data = deltatune.load_data("rotten-tomatoes").limited(train=50 * steps, validation=10, test=10, seed=0)
    tokens = tokenize(data.train, deltatune.load("minilm", labels=data.labels).tokenizer, 256)
    whole = len(epoch(tokens.lengths, 1024, np.random.default_rng(0)))
    losses: list[float] = []
    memory: dict[str, int] = {}

    def listen(event: Event) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)
            memory.update(smaps())

    settings = Training(optimiser=name, epochs=steps / whole, learning_rate=1e-4, keep="last")  # type: ignore[arg-type]
    tuned = deltatune.tune(deltatune.load("minilm", labels=data.labels), data, Full(), settings, listen=listen)
    return {path: p.detach().clone() for path, p in tuned.base.model.named_parameters()}, losses, memory


def memory() -> None:
    """Prints the memory of a fresh process for each optimiser."""
    print(f"{'optimiser':10} {'anonymous MB':>13} {'resident MB':>12}")
    for name in NAMES:
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", name], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:10} {found['Anonymous'] / 1e6:13.0f} {found['Rss'] / 1e6:12.0f}", flush=True)


def distances(steps: int = 30) -> None:
    """Prints how far each optimiser is from AdamW after some steps."""
    start = dict(deltatune.load("minilm", labels=("rotten", "fresh")).model.named_parameters())
    theirs, losses, _ = trained("adamw", steps)

    def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return sum(float((a[path] - b[path]).detach().double().square().sum()) for path in a) ** 0.5

    moved = norm(theirs, start)
    print(f"after {len(losses)} steps: parameters apart on what AdamW moved; mean and largest difference of the losses")
    for name in NAMES[1:]:
        ours, others, _ = trained(name, steps)
        apart = [abs(a - b) for a, b in zip(others, losses, strict=True)]
        print(f"{name:10} {norm(ours, theirs) / moved:.4f} {statistics.mean(apart):.5f} {max(apart):.5f}", flush=True)


def main() -> None:
    """Measures everything, or in a process of its own the memory of one optimiser."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=15, help="a multiple of 3 gives each optimiser each place")
    options.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.memory_of:
        print(json.dumps(trained(given.memory_of, 5)[2]))
        return
    times(given.rounds)
    memory()
    distances()


if __name__ == "__main__":
    main()
