"""BFCL through HTTP: a served task's function calls from plain `tools`, unconstrained and constrained, judged by BFCL's checker.

    python serve/main.py --config configs/serve/smollm2.yaml                  # in another terminal
    python -m experiments.bfcl_http functions chat [--questions 200] [--json docs/bfcl_http.json]

Each question is asked in four ways: `auto` (the task writes what it wants), `single` (the same, read up to its first call: the
questions of `simple` need no more), `strict` (single, but what begins like a call is held to the function's schema) and
`required` (the answer is one call). Run it from the repository's root.
"""

import argparse
import concurrent.futures
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.progress import track

from pshare_jax.evaluation.intervals import wilson
from pshare_jax.text.tool_format import FORMATS
from pshare_jax.training.data.bfcl import BfclVerifier, fetch_wheel, read_questions

MODES = ("auto", "single", "strict", "required")
MAX_TOKENS = 256
TASKS = ("functions", "chat")


@dataclass(frozen=True)
class Row:
    """A task's answers in one mode.

    `right`: accepted by the checker. `no_call`: answers that ended without a call that parses. `cut`: answers that reached
    `MAX_TOKENS`, mostly in a list of calls that does not end.
    """

    task: str
    mode: str
    questions: int
    right: int
    no_call: int
    cut: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def main() -> None:
    """Asks all questions, writes the numbers, and prints the table of all tasks asked so far."""
    options = _options()
    client = OpenAI(base_url=options.url, api_key="none", timeout=600)
    wheel = fetch_wheel()
    questions = read_questions(options.category, wheel)
    # Evenly spaced, such as every second of 400.
    questions = questions[:: max(1, len(questions) // options.questions)][: options.questions]
    rows: dict[str, dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with BfclVerifier(wheel, FORMATS["json_list"]) as verifier:
        for task in options.tasks:
            for mode in options.modes:
                row = _row(client, task, mode, questions, verifier)
                rows[f"{task}, {mode}"] = asdict(row)
                options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(markdown(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bfcl_http", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS, help="served tasks to ask")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's API")
    parser.add_argument("--category", default="simple", help="BFCL's category (default simple)")
    parser.add_argument("--questions", type=int, default=200, help="number of questions, evenly spaced (default 200)")
    parser.add_argument("--json", type=Path, default=Path("docs/bfcl_http.json"), help="file of the numbers, updated")
    return parser.parse_args()


def _row(client: OpenAI, task: str, mode: str, questions: Sequence[Mapping[str, Any]], verifier: BfclVerifier) -> Row:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = pool.map(lambda question: _ask(client, task, mode, question), questions)
        answers = list(track(asked, f"{task}, {mode}", total=len(questions)))
    calls = [_calls(answer) for answer in answers]
    right = sum(
        bool(made) and verifier.check(made, dict(question))["valid"]
        for made, question in zip(calls, questions, strict=True)
    )
    cuts = [answer.choices[0].finish_reason == "length" for answer in answers]
    usages = [answer.usage for answer in answers]
    return Row(
        task,
        mode,
        questions=len(questions),
        right=right,
        no_call=sum(not made and not cut for made, cut in zip(calls, cuts, strict=True)),
        cut=sum(cuts),
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        cached_tokens=sum(usage.prompt_tokens_details.cached_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
    )


def _ask(client: OpenAI, task: str, mode: str, question: Mapping[str, Any]) -> Any:
    tools: Any = question["tools"]
    if mode == "strict":
        tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
    return client.chat.completions.create(
        model=task,
        messages=question["messages"],
        tools=tools,
        tool_choice="required" if mode == "required" else "auto",
        parallel_tool_calls=mode == "auto",
        temperature=0,
        max_tokens=MAX_TOKENS,
    )


def _calls(answer: Any) -> list[dict[str, Any]]:
    """The answer's calls in the checker's form; none if the arguments of one are no JSON object."""
    made = []
    for call in answer.choices[0].message.tool_calls or []:
        try:
            arguments = json.loads(call.function.arguments)
        except ValueError:
            return []
        if not isinstance(arguments, dict):
            return []
        made.append({call.function.name: arguments})
    return made


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for the docs."""
    lines = ["| task | mode | right (95 % interval) | answers without a call | cut |", "|---|---|---|---|---|"]
    for row in sorted(rows.values(), key=lambda row: (TASKS.index(row["task"]), MODES.index(row["mode"]))):
        low, high = wilson(row["right"], row["questions"])
        right = f"**{row['right'] / row['questions']:.1%}** ({low:.1%} to {high:.1%})"
        lines.append(f"| `{row['task']}` | {row['mode']} | {right} | {row['no_call']} | {row['cut']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
