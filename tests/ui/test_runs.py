"""The page of local runs in a real browser: the list, the filter, a run, a run that really trains, and texts that want to be code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import CDPSession, Locator, Page, expect

from charts import ROOT
from generated import load
from ui.conftest import PATIENCE, PHONE, Server
from ui.recorded import run, write_steps

Visit = Callable[..., Page]
Ui = Callable[..., Server]
pytestmark = pytest.mark.timeout(900)
expect.set_options(timeout=1000 * PATIENCE)
EVIL = "<script>window.owned=1</script><img src=x onerror='window.owned=1'><a href=\"javascript:window.owned=1\">x</a>"


def names(page: Page) -> list[str]:
    return page.locator(".table .row a").all_inner_texts()


def test_the_list_shows_what_each_run_is_and_how_far(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    run(tmp_path / "outputs/done")
    run(tmp_path / "outputs/team/half", steps=5, finished=False, algorithm="sft")
    page = visit(ui("outputs").address)
    expect(page.locator(".table .row a")).to_have_count(2)
    done, half = page.locator(".row", has_text="done"), page.locator(".row", has_text="half")
    expect(done).to_contain_text("Succeeded")
    expect(done).to_contain_text("20/20")
    expect(done).to_contain_text("GRPO · Qwen/Qwen2.5-0.5B")
    expect(half).to_contain_text("Stopped")
    expect(half).to_contain_text("5/20")
    expect(half).to_contain_text("No process trains it now")
    expect(half).to_contain_text("loss")


def test_filter_phases_and_keyboard(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    for number in range(6):
        run(tmp_path / f"outputs/run-{number}", finished=number % 2 == 0, model="Qwen" if number < 4 else "Llama")
    page = visit(ui("outputs").address)
    expect(page.locator(".table .row a")).to_have_count(6)
    page.keyboard.press("/")
    page.keyboard.type("llama")
    expect(page.locator(".table .row a")).to_have_count(2)
    expect(page.get_by_role("button", name=re.compile("^All"))).to_have_text("All 2")
    assert "q=llama" in page.url
    page.get_by_role("button", name="Succeeded 1").click()
    expect(page.locator(".table .row a")).to_have_text(["run-4"])
    page.reload()  # the address holds what was chosen
    expect(page.locator(".table .row a")).to_have_text(["run-4"])
    page.get_by_role("button", name=re.compile("^All")).click()
    page.locator("#filter").fill("no such thing")
    expect(page.locator(".empty")).to_contain_text("None of 6 jobs")
    page.locator("#filter").focus()
    page.keyboard.press("Escape")
    expect(page.locator(".table .row a")).to_have_count(6)
    first, second = names(page)[:2]
    page.keyboard.press("j")
    expect(page.locator(":focus")).to_have_text(first)
    page.keyboard.press("ArrowDown")
    expect(page.locator(":focus")).to_have_text(second)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(second)
    page.keyboard.press("Escape")
    expect(page.locator(".table .row a")).to_have_count(6)


def test_a_run_has_curves_samples_and_facts(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    folder = run(tmp_path / "outputs/one", kl=0.25)
    page = visit(ui("outputs").address)
    page.get_by_role("link", name="one").click()
    reward = page.locator("[data-metric=reward]")
    expect(reward.locator("canvas")).to_be_visible()
    expect(reward.locator("figcaption")).to_contain_text("0.09516 → 0.8647")
    # something is drawn: the curve's own colour is on the canvas
    drawn = """canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"""
    assert reward.locator("canvas").evaluate(drawn) > 8
    expect(page.get_by_role("region", name="Samples")).to_contain_text("2+2=")
    expect(page.get_by_role("region", name="Facts")).to_contain_text("outputs/one")
    write_steps(folder, range(21, 31))
    expect(reward.locator("figcaption")).to_contain_text("→ 0.9502")
    page.get_by_label("Smooth").check()
    expect(reward.locator("canvas")).to_be_visible()


WRITTEN = """() => {
  window.written = [];
  const fillText = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...place) {
    window.written.push(text);
    return fillText.call(this, text, ...place);
  };
}"""


def test_the_steps_of_a_short_run_are_marked_by_whole_numbers(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    run(tmp_path / "outputs/short", steps=3, reward=0.0, loss=0.0, step_seconds=0.0)
    page = visit(ui("outputs").address)
    page.get_by_role("link", name="short").click()
    expect(page.locator("[data-metric=reward] canvas")).to_be_visible()
    page.evaluate(WRITTEN)
    page.get_by_label("Smooth").check()
    page.wait_for_function("window.written.includes('3')")
    written = page.evaluate("window.written")
    assert {"1", "2", "3"} <= set(written)
    assert not {"1.5", "2.5"} & set(written), written


SWEEPS = """async () => {
  let frames = 0;
  for (const step of [120, -120]) {
    for (let n = 0; n < 40; n++, frames++) {
      window.scrollBy(0, step);
      await new Promise(requestAnimationFrame);
    }
  }
  return frames;
}"""


def test_the_cost_of_scrolling_grows_far_less_than_the_number_of_runs(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    """By the processor time of the page's thread, which does not depend on what else the machine does."""
    costs = []
    for count in (100, 1000):
        for number in range(count):
            run(tmp_path / f"of-{count}/run-{number:04d}", steps=1, finished=number % 2 == 0)
        page = visit(ui(f"of-{count}").address)
        expect(page.locator(".table .row a")).to_have_count(count)
        page.evaluate(SWEEPS)  # what comes into sight for the first time is laid out once
        tools = page.context.new_cdp_session(page)
        tools.send("Performance.enable", {"timeDomain": "threadTicks"})

        def spent(tools: CDPSession = tools) -> float:
            found = tools.send("Performance.getMetrics")["metrics"]
            return float(next(metric["value"] for metric in found if metric["name"] == "TaskDuration"))

        begin = spent()
        frames = page.evaluate(SWEEPS)
        costs.append(1000 * (spent() - begin) / frames)
        page.close()
    print(f"processor time of a frame while scrolling: {costs[0]:.2f} ms with 100 runs, {costs[1]:.2f} ms with 1,000")
    assert costs[1] < 5 * costs[0]


def test_names_prompts_and_completions_are_shown_as_text(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    name = EVIL.replace("/", "∕")
    run(tmp_path / "outputs" / name, completion=EVIL, prompt=EVIL, model=EVIL, **{EVIL: 1.0})
    page = visit(ui("outputs").address)
    expect(page.locator(".table .row a")).to_have_text(name)
    expect(page.locator(".cell-what")).to_contain_text(EVIL)
    page.locator(".table .row a").click()
    expect(page.locator("h1")).to_have_text(name)
    expect(page.locator("pre.completion")).to_have_text(EVIL)
    expect(page.locator("pre.prompt")).to_have_text(EVIL)
    expect(page.locator("figcaption", has_text="window.owned")).to_be_visible()
    assert page.evaluate("window.owned") is None
    assert page.locator("main script, main img, main a[href^=javascript]").count() == 0


def test_a_phone_shows_the_page_without_scrolling_sideways(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    run(tmp_path / f"outputs/{'a-rather-long-name-of-a-run-' * 4}", completion="word " * 400, model="m" * 150)
    page = visit(ui("outputs").address, **PHONE)
    sideways = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    expect(page.locator(".table .row a")).to_have_count(1)
    assert not page.evaluate(sideways)
    page.locator(".table .row a").click()
    expect(page.locator("[data-metric=reward] canvas")).to_be_visible()
    expect(page.locator("pre.completion")).to_be_visible()
    assert not page.evaluate(sideways)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


REAL_RUN = """
import pathlib, sys, time
import nemo_rl

def reward(prompt, response, step):
    # the test lets one step after the other go on; before the first one the reward is tried
    while step and not pathlib.Path("gate", str(step)).exists():
        time.sleep(0.05)
    return float(len(response) % 7)

nemo_rl.train(
    model=sys.argv[1], dataset=[{"prompt": "one two three"}] * 4, reward_fn=reward, backend="local", output_dir="outputs/live",
    max_steps=3, max_epochs=3, batch_size=1, num_generations_per_prompt=2, max_new_tokens=4, reward_timeout=3600, log_level="warning",
)
"""


def test_a_real_run_is_followed_live_to_its_end(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, content in load(ROOT / "charts/nemo-rl-operator/files/helm_test.py").tiny_model().items():
        (model / name).write_bytes(content)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "gate").mkdir()
    (tmp_path / "train.py").write_text(REAL_RUN)
    page = visit(ui("outputs").address)
    expect(page.locator(".empty")).to_contain_text("No jobs here yet")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "NEMO_RL_BACKEND": "local"}
    with open(tmp_path / "train.log", "w") as log:
        training = subprocess.Popen(
            [sys.executable, "train.py", str(model)],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def followed(locator: Locator, text: str, ends: bool = False) -> None:
        limit = time.monotonic() + 600
        while text not in " ".join(locator.all_inner_texts()):
            told = f"{text!r} is not on the page: {locator.all_inner_texts()}\n{(tmp_path / 'train.log').read_text()}"
            assert ends or training.poll() is None, told
            assert time.monotonic() < limit, told
            page.wait_for_timeout(200)

    try:
        row, job = page.locator(".row", has_text="live"), page.locator("header.job")
        followed(row, "Running")
        (tmp_path / "gate/1").touch()
        followed(row, "1/3")
        row.get_by_role("link").click()
        followed(job, "1/3")
        followed(job, "Running")
        (tmp_path / "gate/2").touch()
        followed(job, "2/3")
        expect(page.locator("[data-metric=reward] canvas")).to_be_visible()
        expect(page.get_by_role("region", name="Samples")).to_contain_text("one two three")
        (tmp_path / "gate/3").touch()
        followed(job, "Succeeded", ends=True)
        followed(job, "3/3", ends=True)
        assert training.wait(600) == 0, (tmp_path / "train.log").read_text()
    finally:
        training.kill()
