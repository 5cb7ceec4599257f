"""Uses the live page in a real browser and prints its observations as JSON.

Arguments: scenario (see SCENARIOS), URL, the browser's executable, and the scenario's arguments as JSON.
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
    """A page, and lists of its requests, console errors and exceptions."""
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        page = browser.new_page(**options)
        seen = {"requests": [], "console": [], "exceptions": []}
        page.on("request", lambda request: seen["requests"].append(request.url))
        page.on(
            "console", lambda entry: seen["console"].append(entry.text) if entry.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: seen["exceptions"].append(str(error)))
        yield page, seen
        browser.close()


def ask_all(page, prompt, tasks, most):
    """Sends a prompt to these tasks and waits for their ends; each task's card as (state, text, figures)."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Max tokens").fill(str(most))
    for box in page.locator("#ask-tasks input").all():
        box.set_checked(box.get_attribute("value") in tasks)
    page.get_by_role("button", name="Send").click()
    page.locator("#stop:disabled").wait_for(timeout=60_000)
    return cards(page)


def cards(page):
    seen = {}
    for card in page.locator(CARD).all():
        figures = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
        text = card.locator(".text").evaluate("element => element.textContent")
        seen[card.get_attribute("data-task")] = (card.locator("h3 span").inner_text(), text, figures)
    return seen


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
        saw["bars"] = page.locator(".bar svg").evaluate_all("all => all.map((bar) => bar.getAttribute('aria-label'))")
        saw["tasks"], saw["sessions"] = rows(page, "tasks"), rows(page, "sessions")
        saw["reused"], saw["saved"] = page.locator("#reused-note").inner_text(), page.locator("#saved").inner_text()
        saw["refused"] = ask_all(page, prompt, tasks, 10**6)
        page.set_viewport_size({"width": 360, "height": 800})
        saw["overflow"] = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        # The policy forbids other hosts, and styles and scripts that are not the page's.
        saw["clean"] = {name: list(entries) for name, entries in seen.items()}
        saw["elsewhere"] = page.evaluate("fetch('http://127.0.0.2:1/').then(() => 'went', (error) => error.name)")
        saw["violations"] = [text for text in seen["console"] if "Content Security Policy" in text]
    return saw


def stop(url, program, prompt, most):
    """Answers that run until they are stopped, by keyboard."""

    def ignore_eos(route):
        # The tiny model would end before the stop.
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})

    with browser_page(program) as (page, seen):
        page.goto(url)
        page.locator("#state.good").wait_for()
        page.route("**/v1/chat/completions", ignore_eos)
        page.get_by_label("Max tokens").fill(str(most))
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
        message = page.locator("#key-message")
        message.wait_for()
        saw = {"first": message.inner_text(), "board": page.locator("#board").is_visible()}
        page.get_by_label("Key").fill("wrong")
        page.get_by_role("button", name="Open").click()
        page.get_by_text("refused").wait_for()
        saw["wrong"] = message.inner_text()
        page.get_by_label("Key").fill(right)
        page.get_by_label("Key").press("Enter")
        page.locator("#board").wait_for()
        saw["tasks"] = rows(page, "tasks")
        saw["cards"] = ask_all(page, "hello there", ["chat"], 4)
        page.reload()
        page.locator("#board").wait_for()
        saw["in_url"] = right in "".join(seen["requests"])
        page.get_by_role("button", name="Forget the key").click()
        message.wait_for()
        saw["forgotten"] = (message.inner_text(), page.evaluate("sessionStorage.length"))
    return {**saw, **seen}


def outage(url, program):
    """The server becomes unreachable and returns; the page reports it and recovers by itself."""
    with browser_page(program) as (page, seen):
        page.goto(url)
        page.locator("#state.good").wait_for()
        page.route("**/live", lambda route: route.abort("connectionrefused"))
        page.locator("#trouble").wait_for(timeout=10_000)
        saw = {"trouble": page.locator("#trouble").inner_text(), "state": page.locator("#state").inner_text()}
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
