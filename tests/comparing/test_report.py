import importlib.util
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from deltatune.comparing import table
from deltatune.comparing.charts import colours
from deltatune.comparing.curves import sweeps
from deltatune.comparing.plots import plots
from deltatune.comparing.report import again, check_installed, write_report
from deltatune.comparing.results import Latency
from deltatune.comparing.search import Range, Search, Trial, write_searches
from deltatune.comparing.summary import findings, matched, summary, tiles
from deltatune.errors import UserError

PLOTS = ["quality", "difference", "size", "front-memory", "front-bytes", "time", "memory", "loss"]


def written(comparison, folder: Path) -> Path:
    return write_report(folder, comparison.experiment, comparison.results, comparison.failed, comparison.curves)


@pytest.fixture(scope="module")
def report(comparison, tmp_path_factory) -> Path:
    return written(comparison, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def crowded(crowd, tmp_path_factory) -> Path:
    return written(crowd, tmp_path_factory.mktemp("crowd"))


@pytest.fixture
def opened(browser: Browser) -> Iterator[object]:
    """Opens a report offline; whatever the page says or asks for beyond itself fails the test at its end."""
    contexts, complaints = [], []

    def open_page(path: Path, width: int = 1280, **settings: str) -> Page:
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url))
        page.goto(path.as_uri())
        if page.locator(".plot").count():
            page.wait_for_selector("html[data-drawn]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def marks(page: Page, plot: str, kind: str) -> int:
    return page.locator(
        f"#plot-{plot} svg .mark-{kind}.role-mark > path, #plot-{plot} svg .mark-{kind}.role-mark > line"
    ).count()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn_offline_without_a_complaint(report: Path, opened, scheme: str):
    page = opened(report, color_scheme=scheme)
    for plot in PLOTS:
        box = page.locator(f"#plot-{plot} svg").bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100
    assert marks(page, "quality", "rect") == 4
    assert marks(page, "time", "rect") == 2 * 4, "a bar, and where full fine-tuning ends"
    assert marks(page, "memory", "rect") == 2 * 4
    assert marks(page, "quality", "symbol") == 8, "a dot for each seed of the methods with several"
    assert marks(page, "difference", "symbol") == 3
    for front in ("size", "front-memory", "front-bytes"):
        assert marks(page, front, "symbol") == 2 * 4, "a circle and its middle"
    assert page.locator("#plot-loss svg .mark-line path").count() == 9 + 3 * 3, "own curves, and the reference's behind"
    assert marks(page, "loss", "symbol") == 9 * 4


@pytest.mark.browser
def test_the_table_has_every_label_and_says_why_a_cell_failed(report: Path, opened, comparison):
    page = opened(report)
    shown = [head.strip() for head in page.locator("#methods tbody th").all_inner_texts()]
    for row, text in zip(table.rows(comparison.results, comparison.failed), shown, strict=True):
        assert " ".join(text.split()).startswith(row.label)
    assert (
        "the loss became <b>nan</b> at step 31 (hint: lower the learning rate)" in page.locator("#methods").inner_text()
    )
    assert "the process was ended by signal 9 (KILL)" in page.locator(".failures").inner_text()


@pytest.mark.browser
def test_a_label_that_looks_like_a_script_is_only_a_label(report: Path, opened):
    page = opened(report)
    assert page.locator("tbody script, svg script, tbody b, .failures b").count() == 0
    assert "<script>alert('x')</script>" in page.locator("#methods tbody").inner_text()
    assert "<script>alert('x')</script>" in page.locator("#plot-time").text_content()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 375])
def test_twelve_methods_fit_the_page_without_scrolling_it_sideways(crowded: Path, opened, width: int):
    page = opened(crowded, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert marks(page, "quality", "rect") == 12
    assert page.locator("#methods tbody tr").count() == 12
    names = page.locator("#plot-size svg .mark-text.role-mark text")
    tops = sorted(names.nth(index).bounding_box()["y"] for index in range(names.count()))
    assert len(tops) == 12
    assert all(below - above > 12 for above, below in pairwise(tops)), "no name lies on another"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 375])
def test_no_word_in_a_plot_is_cut_off(report: Path, opened, width: int):
    cut = """() => [...document.querySelectorAll('.plot svg')].flatMap(svg => {
        const outer = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(text => {
            const inner = text.getBoundingClientRect();
            return inner.left < outer.left - 2 || inner.right > outer.right + 2
                || inner.top < outer.top - 2 || inner.bottom > outer.bottom + 2;
        }).map(text => text.textContent);
    })"""
    assert opened(report, width).evaluate(cut) == []


@pytest.mark.browser
def test_a_click_on_a_heading_sorts_and_failed_methods_stay_last(report: Path, opened):
    page = opened(report)
    heading = page.get_by_role("button", name="Accuracy", exact=True)
    heading.click()
    column = page.locator("#methods tbody tr td:nth-child(2)")
    figures = [float(text.split("%")[0]) for text in column.all_inner_texts()[:4]]
    assert figures == sorted(figures, reverse=True)
    heading.click()
    assert [float(text.split("%")[0]) for text in column.all_inner_texts()[:4]] == figures[::-1]
    assert "nan" in column.all_inner_texts()[4]
    assert page.locator("#methods th[aria-sort]").get_attribute("aria-sort") == "ascending"


@pytest.mark.browser
def test_the_table_is_filtered_by_keyboard_and_its_groups_of_columns_can_go(report: Path, opened):
    page = opened(report)
    rows, said = page.locator("#methods tbody tr:visible"), page.locator(".filters output")
    page.get_by_label("Method", exact=True).press_sequentially("LORA")
    assert (rows.count(), said.inner_text()) == (3, "3 of 5 methods")
    page.keyboard.press("Tab")
    page.keyboard.press("w")  # the select's "worse"
    assert rows.count() == 1
    assert "▼ worse" in rows.inner_text()
    page.get_by_role("button", name="Show all").press("Enter")
    page.wait_for_function("document.querySelector('.filters output').value === '5 methods'")
    box = page.get_by_label("Memory", exact=True)
    box.press("Space")
    assert page.get_by_role("columnheader", name="Peak").count() == 0
    assert page.get_by_role("columnheader", name="Adapter").count() == 1
    box.press("Space")
    assert page.get_by_role("columnheader", name="Peak").count() == 1


@pytest.mark.browser
def test_every_runs_settings_unfold_alone_from_the_table_and_together(report: Path, opened):
    page = opened(report)
    opened_runs = page.locator(".runs details[open]")
    page.locator("#methods tbody a", has_text=re.compile("^lora$")).click()
    assert opened_runs.count() == 3
    assert "all-linear" in opened_runs.first.inner_text()
    assert "510000" not in opened_runs.first.inner_text()
    page.get_by_role("button", name="Unfold all").press("Enter")
    assert opened_runs.count() == page.locator(".runs details").count() == 11
    page.get_by_role("button", name="Unfold all").click()
    assert opened_runs.count() == 0


@pytest.mark.browser
def test_the_colours_are_the_systems_until_a_reader_chooses(report: Path, opened):
    page = opened(report, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Light", exact=True).click()
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Auto").click()
    assert page.evaluate(ground) == dark


CONTRASTS = """() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = colour => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value => value / 255)
            .map(value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
        return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2];
    };
    const ground = node => {
        const colour = getComputedStyle(node).backgroundColor;
        return colour.endsWith(', 0)') ? ground(node.parentElement) : colour;
    };
    return [...document.querySelectorAll('body *:not(svg *, script, option)')].filter(node => {
        if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) return false;
        const [more, less] = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
        return (more + .05) / (less + .05) < 4.5;
    }).map(node => node.outerHTML.slice(0, 80));
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_and_a_screen_reader_finds_its_way(report: Path, opened, scheme: str):
    page = opened(report, color_scheme=scheme)
    assert page.evaluate(CONTRASTS) == []
    for landmark in ("banner", "main", "navigation", "contentinfo", "search"):
        assert page.get_by_role(landmark).count() == 1, landmark
    alternatives = [plot.get_attribute("aria-label") for plot in page.locator(".plot[role=img]").all()]
    assert len(alternatives) == len(PLOTS)
    assert all("lora" in words and re.search(r"\d", words) for words in alternatives)
    assert page.locator("#methods caption").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the results"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "who uses the keyboard sees where they are"


@pytest.mark.browser
def test_a_report_in_which_everything_failed_still_opens(comparison, tmp_path, opened):
    page = opened(write_report(tmp_path, {"base": "minilm", "data": None}, [], comparison.failed, {}))
    assert page.title() == "minilm on data · Deltatune"
    assert "No run finished. 2 of 2 runs failed" in page.locator(".summary").inner_text()


def test_every_plot_is_saved_as_a_picture_of_its_own(report: Path):
    folder = report.parent / "plots"
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in PLOTS for kind in ("svg", "png")}
    for name in PLOTS:
        assert (folder / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
        header = (folder / f"{name}.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(header[16:20]) > 1000, "wide enough to print"


def test_the_page_shows_what_was_run_and_forbids_every_fetch(report: Path):
    page = report.read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    for words in ("minilm on rotten-tomatoes", "2.13.0", "Intel Xeon Platinum 8488C", "tokens per batch", "9512"):
        assert words in page


def test_the_summary_is_made_from_the_figures(comparison):
    words = summary(table.rows(comparison.results, comparison.failed))
    assert re.match(
        r"lora reaches 82\.\d% test accuracy with 1\.3% of the parameters trained, in 61% of the time", words
    )
    assert "is not distinguishable from zero" in words
    assert words.endswith("The 2 other methods are worse. 2 of 11 runs failed; the reasons are below.")


def test_the_summary_of_one_method_compares_nothing(make_cell):
    assert "nothing to compare it with" in summary(table.rows([make_cell("lora")]))


def test_the_summary_without_full_fine_tuning_names_the_reference(make_cell):
    words = summary(table.rows([make_cell("head", "head", accuracy=0.75), make_cell("lora", accuracy=0.82)]))
    assert "; that is better than head, by +7.0 points [" in words
    assert "of the time" not in words


def test_the_findings_say_who_was_compared_what_it_cost_and_who_is_worth_it(comparison):
    rows = table.rows(comparison.results, comparison.failed)
    found = findings(rows, comparison.results)
    assert found["Compared"].startswith("4 methods, up to 3 seeds each, 240 optimiser steps each")
    assert found["Not distinguishable from full fine-tuning"] == "lora."
    assert found["Worse than full fine-tuning"].startswith("head and lora <script>")
    assert found["Cost"].startswith("9m 30s of training in 9 runs. Training took from 21.5s (head) to 1m 39s (full).")
    assert "For its bytes nothing beats full, head, lora and lora <script>" in found["Worth its price"]
    label, shown = tiles(rows)
    assert label == "lora"
    assert [tile.value for tile in shown] == ["82.7%", "61%", "69%", "1.3%"]


@pytest.mark.browser
def test_pairs_searches_and_what_the_test_could_show_are_on_the_page(comparison, make_cell, tmp_path, opened):
    cells = [
        make_cell(
            name,
            method,
            accuracy=accuracy,
            latency=Latency(tokens=27, rounds=9, base=0.004, adapted=0.005, merged=0.004),
        )
        for name, method, accuracy in (("full", "full", 0.83), ("lora", "lora", 0.829), ("head", "head", 0.75))
    ]
    trials = [
        Trial(
            number=number,
            settings={"learning_rate": rate},
            status="done",
            value=value,
            validation={"loss": 1 - value},
            steps=92,
            seconds=41,
        )
        for number, (rate, value) in enumerate(((5e-4, 0.77), (2.13e-3, 0.81)))
    ]
    space = {"learning_rate": Range(low=1e-5, high=1e-2, log=True)}
    write_searches(tmp_path, [Search(label="lora", method="lora", space=space, budget=2, seed=7, trials=tuple(trials))])
    page = opened(write_report(tmp_path, comparison.experiment, cells, [], {}), 375)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    pairs = [row.split() for row in page.locator(".pairs tbody tr").all_inner_texts()]
    assert [row[0] for row in pairs] == ["full", "lora", "head"]
    assert pairs[0][1:4:2] == ["≈", "not"]
    assert [row.count("▼") for row in pairs] == [0, 0, 2]
    assert "would be found 4 times out of 5" in page.locator(".findings").inner_text()
    search = page.locator("section[aria-labelledby=searches] details")
    assert "learning_rate 0.00213" in search.inner_text()
    search.locator("summary").press("Enter")
    assert search.locator("tbody th").all_inner_texts() == ["0", "1 · chosen"]
    assert page.get_by_role("columnheader", name="Pass, merged").count() == 1


def test_plans_stand_beside_what_was_measured_where_a_run_has_them(make_cell):
    plan = {"planned_seconds": 66.0, "planned_peak_bytes": 900_000_000, "training_peak_bytes": 1_000_000_000}
    cells = [make_cell("lora", seconds=60, **plan), make_cell("head")]
    drawn = {plot.name: plot for plot in plots(table.rows(cells), cells, {})}
    assert drawn["planned-time"].alternative == "Planned and measured time. lora: 1m 00s, planned 1m 06s (+10%)."
    assert "lora: 1.00 GB, planned 900 MB (−10%)." in drawn["planned-memory"].alternative


def test_what_was_matched_is_said_with_how_near_it_came():
    one = {"by": "parameters", "to": "lora", "wanted": 100.0}
    alike = [{**one, "label": "lora", "ratio": 1.0, "setting": "rank", "value": 8}]
    alike.append({**one, "label": "houlsby", "ratio": 1.04, "setting": "width", "value": 16})
    words = matched({"resolved": {"matched": alike}})
    assert words == "All methods were given sizes near the parameters of lora: houlsby 1.04× (width 16)."
    assert matched({}) == ""


def test_nothing_is_worth_more_than_what_costs_less_and_does_as_well():
    assert table.on_front([(1, 0.5), (2, 0.7), (2, 0.6), (3, 0.7), (4, 0.9)]) == [True, True, False, False, True]
    assert table.on_front([(1, 0.5), (1, 0.5)]) == [True, True], "equals stand beside each other"


def test_ranks_of_one_method_are_drawn_as_a_curve_and_what_differs_otherwise_is_another(make_cell):
    ranks = [
        make_cell(f"lora {rank} {targets}", options={"rank": rank, "alpha": 2.0 * rank, "targets": targets})
        for targets in ("mlp", "all-linear")
        for rank in (16, 1, 4)
    ]
    rows = table.rows(ranks)
    done = [(row, row.figures) for row in rows]
    [sweep] = sweeps(done, colours(rows))
    assert sweep.title == "Accuracy against the rank of lora"
    [points] = sweep.spec["datasets"].values()
    assert [(point["curve"], point["size"]) for point in points] == [(0, 1), (0, 4), (0, 16), (1, 1), (1, 4), (1, 16)]
    assert sweeps(done[:2], colours(rows)) == []


def test_the_experiment_to_run_again_is_the_one_that_ran_at_its_revision():
    commit = "0123456789abcdef0123456789abcdef01234567"
    ran = {"base": "user/model", "seeds": [0], "resolved": {"base": {"id": "user/model", "revision": commit}}}
    assert again(ran) == {"base": f"user/model@{commit}", "seeds": [0]}
    assert again({"base": "minilm", "resolved": {"base": {"revision": "gt 0.1.0"}}}) == {"base": "minilm"}


def test_with_one_seed_the_page_says_what_the_intervals_leave_out(crowded: Path):
    assert "not the luck of the seed" in crowded.read_text(encoding="utf-8")


def test_a_label_has_one_colour_in_every_plot_and_twelve_labels_have_twelve(crowd):
    rows = table.rows(crowd.results)
    palette = colours(rows)
    assert len(set(palette.values())) == 12
    for plot in plots(rows, crowd.results, crowd.curves):
        text = str(plot.spec)
        assert str(list(palette)) in text
        assert str(list(palette.values())) in text


@pytest.mark.parametrize("missing", ["altair", "vl_convert", "jinja2"])
def test_without_the_report_extra_the_error_says_how_to_get_it(monkeypatch, missing: str):
    find = importlib.util.find_spec
    monkeypatch.setattr("deltatune.comparing.report.find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError, match=missing) as caught:
        check_installed()
    assert caught.value.hint == "pip install 'deltatune[report]'"
