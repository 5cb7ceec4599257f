"""Agents' sessions over HTTP: shared against isolated prefill, this checkout against another, or any OpenAI-compatible URL.

    python benchmarks/agents.py --config configs/bench/w1.yaml [FILE ...] [--set a.b=c] [--against CHECKOUT] [--out FOLDER]

Each config is a load and the servers that it goes to (agents_load/config.py; docs/benchmarks.md says what the keys mean).
Writes tables, `results.json` and `calls.jsonl` (after every run) and figures; the servers' logs and the tasks' modules are
there too.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    # Run as a file: Python then looks for modules beside it, where `benchmarks` itself is not.
    sys.path[0] = str(ROOT)

from benchmarks.agents_load.campaign import Campaign, num_calls  # noqa: E402
from benchmarks.agents_load.config import BenchConfig, Numbers, check, points, shown, targets_of  # noqa: E402
from benchmarks.agents_load.figures import save_figure  # noqa: E402
from benchmarks.agents_load.machine import machine  # noqa: E402
from benchmarks.agents_load.report import compared, print_tables  # noqa: E402
from benchmarks.agents_load.servers import Checkout  # noqa: E402
from pshare_jax.errors import PshareError  # noqa: E402
from pshare_jax.settings import load_settings  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if a call failed, 2 after a mistake or if a server died, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    # A stop must pass through the code that ends the servers.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(options)
    except PshareError as error:
        print(f"agents: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("agents: stopped; results.json has the runs that ended", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/agents.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--config", nargs="+", required=True, type=Path, help="YAML files, such as configs/bench/w1.yaml"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a config value, for all files")
    parser.add_argument("--against", type=Path, help="another checkout of this project, run by turns with this one")
    parser.add_argument("--out", type=Path, default=Path("runs/agents"), help="folder of everything that is written")
    parser.add_argument("--write-trace", type=Path, metavar="FILE", help="write the first run as a Mooncake trace")
    return parser


def _run(options: argparse.Namespace) -> int:
    configs = {path.stem: load_settings(BenchConfig, path, options.set) for path in options.config}
    if len(configs) < len(options.config):
        raise PshareError("Two config files have the same name; results are by name, so rename one.")
    for config in configs.values():
        check(config)
    checkouts = [Checkout("this", ROOT)]
    if options.against is not None:
        checkouts.append(Checkout("against", options.against.resolve()))
    for checkout in checkouts:
        checkout.check()
    console = Console()
    if not console.is_terminal:
        # A log: lines of tables must not be folded.
        console = Console(width=200)
    _announce(console, configs, [one.name for one in checkouts])
    options.out.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine(), "commits": {one.name: one.commit() for one in checkouts}}
    head["configs"] = {name: asdict(shown(config)) for name, config in configs.items()}
    file = options.out / "results.json"

    def save(runs: list[Numbers]) -> None:
        by_config = {name: [run for run in runs if run["config"] == name] for name in configs}
        ratios = {name: compared(some) for name, some in by_config.items()}
        file.write_text(json.dumps({**head, "ratios": ratios, "runs": runs}, indent=1) + "\n")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        campaign = Campaign(checkouts, options.out, console, progress, save, options.write_trace)
        for name, config in configs.items():
            campaign.run(name, config)
            _report(console, options.out, name, [run for run in campaign.runs if run["config"] == name])
    console.print(f"wrote {file}")
    return 1 if any(run["failures"] for run in campaign.runs) else 0


def _announce(console: Console, configs: dict[str, BenchConfig], checkouts: Sequence[str]) -> None:
    """Says before anything is started how much there is to do."""
    for name, config in configs.items():
        kinds = targets_of(config, checkouts)
        runs = config.repetitions * sum(map(len, kinds.values()))
        calls = sum(num_calls(config, point) for point in points(config))
        which = ", ".join(f"{kind} {' and '.join(names)}".strip() for kind, names in kinds.items())
        console.print(f"{name}: {which}; {runs * len(points(config))} runs, {runs * calls:,} calls")


def _report(console: Console, folder: Path, name: str, runs: Sequence[Numbers]) -> None:
    print_tables(console, name, runs)
    figure = folder / f"{name}.png"
    if save_figure(figure, name, runs):
        console.print(f"wrote {figure}")


if __name__ == "__main__":
    sys.exit(main())
