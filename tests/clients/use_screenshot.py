"""Takes a screenshot of the live page after some agents' sessions: `python use_screenshot.py URL FILE.png [dark]`.

docs/testing.md has the server's command. Each session is a growing context that all tasks read in turn; then one prompt is
sent to several tasks at once.
"""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
from PIL import Image
from use_browser import ask_all, browser_page

NOTES = (
    "Weather station: it measures wind, rain, temperature and pressure on a roof every minute and sends them over a slow "
    "radio link to a computer in the basement, which draws the curves that the town looks at. ",
    "Library of tools: drills, ladders and sewing machines are lent as books are. Members book them for a week, pay a "
    "deposit and bring them back clean; a volunteer checks each one and notes what must be repaired. ",
    "Train: it leaves the valley at six, stops in nine villages and reaches the city at half past seven. In winter snow "
    "may close the pass; then buses go around it, which takes forty minutes more. ",
)
PROMPT = (
    "You are one of several agents who work on the same problem. A village of four hundred people wants to heat its "
    "houses with the waste heat of a bakery that runs at night. The pipes would be two kilometres long. Name the one "
    "question that you would ask first, and say in a sentence why."
)


def run_session(client, tasks, number):
    notes = NOTES[number % len(NOTES) :] + NOTES[: number % len(NOTES)]
    messages = [{"role": "user", "content": f"Notes of day {number + 1}. {''.join(notes)}Say what matters most."}]
    for turn in range(2):
        for task in tasks:
            headers = {"x-session-id": f"session {number}"}
            asked = {"model": task, "messages": messages, "max_tokens": 24, "temperature": 0, "extra_headers": headers}
            said = client.chat.completions.create(**asked).choices[0].message.content
        messages = [*messages, {"role": "assistant", "content": said}]
        messages.append({"role": "user", "content": f"Go on, and be concrete. This is round {turn + 2}."})


def main(url, file, scheme="light"):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    tasks = [model.id for model in client.models.list()]
    with ThreadPoolExecutor(2) as agents:
        list(agents.map(lambda number: run_session(client, tasks, number), range(5)))
    options = {"viewport": {"width": 1180, "height": 900}, "color_scheme": scheme}
    with browser_page(shutil.which("chromium"), **options) as (page, _):
        page.goto(url)
        page.locator("#state.good").wait_for()
        ask_all(page, PROMPT, tasks[1:4], 48)
        page.wait_for_timeout(2500)
        page.screenshot(path=file, full_page=True)
    # A palette is enough and takes a third of the bytes.
    Image.open(file).quantize(256, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
