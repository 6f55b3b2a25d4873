"""`deltatune watch`: a real server and a real browser that follow a run whose files appear as a real one's do."""

import json
import threading
import urllib.error
import urllib.request
from dataclasses import asdict

import pytest
import yaml
from playwright.sync_api import expect

from command import assert_refused, deltatune
from deltatune.comparing.locks import running
from deltatune.comparing.watching import WatchServer
from deltatune.files import write_json, write_text


class LiveRun:
    """A run folder that is written to step by step."""

    def __init__(self, folder, labels):
        self.folder = folder
        experiment = {"methods": [{"label": label} for label in labels], "seeds": [0], "data": {"name": "reviews"}}
        write_text(folder / "experiment.yaml", yaml.safe_dump(experiment))
        (folder / "cells").mkdir()

    def begin(self, label):
        cell = self.folder / "cells" / f"{label}-seed0-1234"
        write_json(cell / "spec.json", {"method": {"label": label}, "seed": 0})
        return cell

    def tell(self, cell, events, end="\n"):
        with (cell / "events.jsonl").open("a") as file:
            file.writelines(json.dumps({"event": type(e).__name__.lower(), **asdict(e)}) + end for e in events)


@pytest.fixture
def live(tmp_path):
    return LiveRun(tmp_path, ["full", "lora"])


@pytest.fixture
def server(live):
    with WatchServer(live.folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.browser
def test_the_page_follows_a_run_from_its_first_step_to_its_report(live, server, browser, comparison):
    result, events = comparison.results[0], comparison.curves["full", 0]
    cell = live.begin("full")
    page = browser.new_page(viewport={"width": 375, "height": 800})
    said = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.url)
    first = page.locator("#cells li").first
    with running(cell):
        live.tell(cell, events[:51])
        expect(first.locator(".state")).to_have_text("training")
        expect(first).to_contain_text("step 50 of 240")
        expect(first).to_contain_text("left")
        early = first.locator("polyline").get_attribute("points")
        live.tell(cell, events[51:-1])
        expect(first).to_contain_text("step 240 of 240")
        expect(first).to_contain_text(f"val {result.quality:.1%}")
        assert first.locator("polyline").get_attribute("points") != early
        write_json(cell / "result.json", result.model_dump(mode="json"))
    expect(first.locator(".state")).to_have_text("done")
    expect(page.get_by_role("status")).to_have_text("1 of 2 runs done")
    lora = live.begin("lora")
    expect(page.locator("#cells li", has_text="lora").locator(".state")).to_have_text("stopped")
    write_json(lora / "failed.json", {"reason": "the process was <b>killed</b>", "hint": "lower it"})
    expect(page.locator("#cells li", has_text="the process was <b>killed</b>")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("1 of 2 runs done · 1 failed · finished")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    write_text(live.folder / "report.html", "<title>the report</title>")
    page.get_by_role("link", name="Report").click()
    expect(page).to_have_title("the report")
    page.close()
    assert not said


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_serves_a_reports_files_to_this_machine_and_nothing_else(live, server):
    write_text(live.folder / "results.csv", "label\n")
    write_text(live.folder / "plots" / "loss.svg", "<svg/>")
    assert server.server_address[0] == "127.0.0.1"
    assert [status(server.url + name) for name in ("", "results.csv", "plots/loss.svg")] == [200] * 3
    for name in (
        "experiment.yaml",
        "cells/",
        "../etc/passwd",
        "plots/../experiment.yaml",
        "plots/%2e%2e/x.svg",
        "report.html",
    ):
        assert status(server.url + name) == 404, name
    assert status(server.url, Host="evil.example") == 403, "a site that lets its own name lead here"


def test_a_folder_that_is_no_run_and_a_taken_port_are_refused(live, server, tmp_path):
    assert_refused(deltatune("watch", tmp_path / "cells"), "is no run", "--out")
    assert_refused(deltatune("watch", live.folder, "--port", server.server_port), "cannot be used", "--port")
