"""The live page in a real browser: what a person does with it, step by step. Prints what it saw.

Arguments: scenario (see SCENARIOS), URL, the browser's program, and what the scenario needs as JSON.
"""

import json
import os
import re
import sys
from contextlib import contextmanager

from playwright.sync_api import expect, sync_playwright

CARD = "article.answer"


@contextmanager
def browser_page(program, **options):
    """A page, and lists of what it asked for, of errors on its console and of exceptions in it."""
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        page = browser.new_page(**options)
        seen = {"requests": [], "console": [], "exceptions": []}
        page.on("request", lambda request: seen["requests"].append(request.url))
        page.on(
            "console", lambda told: seen["console"].append(told.text) if told.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: seen["exceptions"].append(str(error)))
        yield page, seen
        browser.close()


def ask_all(page, prompt, tasks, most):
    """Sends a prompt to these tasks and waits for the ends; each task's card as (state, text, figures)."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Most tokens").fill(str(most))
    for box in page.locator("#ask-tasks input").all():
        box.set_checked(box.get_attribute("value") in tasks)
    page.get_by_role("button", name="Send").click()
    page.locator("#stop:disabled").wait_for(timeout=60_000)
    return cards(page)


def cards(page):
    told = {}
    for card in page.locator(CARD).all():
        figures = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
        text = card.locator(".text").evaluate("element => element.textContent")
        told[card.get_attribute("data-task")] = (card.locator("h3 span").inner_text(), text, figures)
    return told


def rows(page, table):
    return [row.locator("th, td").all_inner_texts() for row in page.locator(f"#{table} tbody tr").all()]


def ask(url, program, prompt, tasks, most):
    with browser_page(program) as (page, seen):
        page.goto(url)
        page.locator("#state.good").wait_for()
        saw = {"empty_sessions": rows(page, "sessions"), "before": page.locator("#saved").inner_text()}
        saw["offered"] = page.locator("#ask-tasks label").all_inner_texts()
        saw["cards"] = ask_all(page, prompt, tasks, most)
        saw["note"] = page.locator("#ask-note").inner_text()
        boxes = [card.bounding_box() for card in page.locator(CARD).all()]
        saw["side_by_side"] = len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == len(boxes)
        page.locator("#latency-chart circle").first.wait_for()
        saw["chart"] = page.locator("#latency-chart").get_attribute("aria-label")
        page.get_by_label("whole request").check()
        saw["other_chart"] = page.locator("#latency-chart").get_attribute("aria-label")
        saw["bars"] = page.locator(".bar svg").evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
        saw["tasks"], saw["sessions"] = rows(page, "tasks"), rows(page, "sessions")
        saw["reused"], saw["saved"] = page.locator("#reused-note").inner_text(), page.locator("#saved").inner_text()
        saw["refused"] = ask_all(page, prompt, tasks, 10**6)
        page.set_viewport_size({"width": 360, "height": 800})
        saw["overflow"] = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        # What the policy forbids: another host, a style or a script that is not the page's.
        saw["clean"] = {name: list(told) for name, told in seen.items()}
        saw["elsewhere"] = page.evaluate("fetch('http://127.0.0.2:1/').then(() => 'went', (error) => error.name)")
        saw["violations"] = [told for told in seen["console"] if "Content Security Policy" in told]
    return saw


def stop(url, program, prompt, most):
    """Answers that go on until they are stopped, by the keyboard alone."""

    def go_on(route):
        # A tiny model's end would come before the stop.
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})

    with browser_page(program) as (page, seen):
        page.goto(url)
        page.locator("#state.good").wait_for()
        page.route("**/v1/chat/completions", go_on)
        page.get_by_label("Most tokens").fill(str(most))
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_label("Prompt").press("Control+Enter")
        for text in page.locator(f"{CARD} .text").all():
            expect(text).to_have_text(re.compile("."))
        page.get_by_role("button", name="Stop").press("Enter")
        page.locator("#stop:disabled").wait_for()
        saw = {"cards": cards(page)}
    return {**saw, "exceptions": seen["exceptions"]}


def key(url, program, right):
    with browser_page(program) as (page, seen):
        page.goto(url)
        told = page.locator("#key-told")
        told.wait_for()
        saw = {"first": told.inner_text(), "board": page.locator("#board").is_visible()}
        page.get_by_label("Key").fill("wrong")
        page.get_by_role("button", name="Open").click()
        page.get_by_text("refused").wait_for()
        saw["wrong"] = told.inner_text()
        page.get_by_label("Key").fill(right)
        page.get_by_label("Key").press("Enter")
        page.locator("#board").wait_for()
        saw["tasks"] = rows(page, "tasks")
        saw["cards"] = ask_all(page, "hello there", ["chat"], 4)
        page.reload()
        page.locator("#board").wait_for()
        saw["in_url"] = right in "".join(seen["requests"])
        page.get_by_role("button", name="Forget the key").click()
        told.wait_for()
        saw["forgotten"] = (told.inner_text(), page.evaluate("sessionStorage.length"))
    return {**saw, **seen}


def outage(url, program):
    """The server goes and comes back; the page says so and recovers by itself."""
    with browser_page(program) as (page, seen):
        page.goto(url)
        page.locator("#state.good").wait_for()
        page.route("**/live", lambda route: route.abort("connectionrefused"))
        page.locator("#trouble").wait_for(timeout=10_000)
        saw = {"told": page.locator("#trouble").inner_text(), "state": page.locator("#state").inner_text()}
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        saw["cards"] = ask_all(page, "hello", ["chat"], 4)
        page.unroute_all()
        page.locator("#trouble").wait_for(state="hidden", timeout=10_000)
        saw["after"] = page.locator("#state").inner_text()
    return {**saw, "exceptions": seen["exceptions"]}


SCENARIOS = {"ask": ask, "stop": stop, "key": key, "outage": outage}

if __name__ == "__main__":
    scenario, url, program, *needs = sys.argv[1:]
    print(json.dumps(SCENARIOS[scenario](url, program, *map(json.loads, needs))))
