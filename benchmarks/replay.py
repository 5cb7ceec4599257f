"""Agents over small pools: tokens prefilled, against the tokens that no pool held when their requests were admitted.

    python -m benchmarks.replay [--agents 10] [--turns 8] [--seeds 5] [--json FILE]

Agents with random sizes call random tasks; each call continues the agent's context, which began with a shared prompt. The
counts depend on the scheduler, router and page managers alone, so the model side is fake (tests/helpers) and no device
computes anything: one turn of the engine is the clock.
"""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import common
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.handle import Handle
from pshare_jax.engine.request import Request
from pshare_jax.engine.sequence import Sequence

PLACEMENTS: dict[str, dict[str, Any]] = {
    "1+1": {"pages": 128, "decode_pages": 512},
    "colocated": {"pages": 400, "colocated": True},
    "2+2": {"num_prefill": 2, "num_decode": 2, "pages": 112, "decode_pages": 256},
}
"""Pages of each pool: fewer than the agents' contexts have together."""
PAGE = 4
MAX_LEN = 380
TASKS = ("plan", "act", "check")


@dataclass
class Agent:
    """One call at a time, each with all of the context; a pause of random length after it."""

    name: str
    draw: random.Random
    context: list[int]
    turns: int
    pause: int = 0
    call: Handle | None = None

    def step(self, engine: Engine) -> None:
        """Takes up the answer if it has come, and calls again after the pause."""
        if self.call is not None and self.call.sequence.final:
            self.context += self.call.sequence.decode.completion_ids
            self.call, self.pause = None, self.draw.randrange(40)
            self.turns -= 1
        elif self.call is None and self.turns and self.pause:
            self.pause -= 1
        elif self.call is None and self.turns:
            self._ask(engine)

    def _ask(self, engine: Engine) -> None:
        draw = self.draw
        max_tokens = draw.randrange(1, 25)
        self.context += [draw.randrange(250) for _ in range(draw.randrange(5, 50))]
        if len(self.context) + max_tokens > MAX_LEN:
            # The agent begins a new context after the shared prompt.
            self.context = [*self.context[:40], *self.context[-40:]]
        request = Request(
            f"{self.name} {self.turns}", draw.choice(TASKS), tuple(self.context), max_tokens, session=self.name
        )
        self.call = engine.submit(request, lambda event: None)


@dataclass
class Counts:
    """Tokens of the contexts of all requests, and those that no pool held at the first admission; tokens prefilled."""

    asked: int = 0
    unheld: int = 0
    prefilled: int = 0

    @property
    def ratio(self) -> float:
        """Tokens prefilled for each token that no pool held."""
        return self.prefilled / self.unheld


@dataclass
class Replay:
    """A random trace on an engine that nothing else uses, stepped until all agents are done."""

    engine: Engine
    seed: int
    num_agents: int
    turns: int
    counts: Counts = field(default_factory=Counts)

    def run(self) -> Counts:
        """Returns the counts."""
        draw = random.Random(self.seed)
        prompts = [[draw.randrange(250) for _ in range(draw.randrange(40, 120))] for _ in range(3)]
        agents = [
            Agent(f"agent {i}", random.Random(f"{self.seed} {i}"), list(draw.choice(prompts)), self.turns)
            for i in range(self.num_agents)
        ]
        self.engine.on_admitted.append(self._admitted)
        while any(agent.turns for agent in agents):
            for agent in agents:
                agent.step(self.engine)
            self.engine.step()
        self.counts.prefilled = sum(worker.stats.tokens for worker in self.engine.prefill_workers)
        return self.counts

    def _admitted(self, sequence: Sequence) -> None:
        # Its own pages are not yet published. Pages that are on their way for another request count as held.
        published = max(pool.manager.num_hits(sequence.keys) for pool in self.engine.pools) * PAGE
        self.counts.asked += sequence.split.base_len
        self.counts.unheld += sequence.split.base_len - max(published, sequence.cached_tokens)


def fake_engine(placement: str) -> Engine:
    """An engine whose pages and weights are fake."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from fake_engine import make_engine  # pyright: ignore[reportMissingImports]
    from serving_fakes import Echo  # pyright: ignore[reportMissingImports]

    tasks = {task: Echo(task) for task in TASKS}
    made = make_engine(tasks, page_size=PAGE, chunk=32, rows=4, max_len=MAX_LEN, debug=False, **PLACEMENTS[placement])
    return made.engine


def replay(placement: str, num_seeds: int, num_agents: int, turns: int) -> Counts:
    """The counts of several random traces, each on a new engine, added up."""
    total = Counts()
    for seed in range(num_seeds):
        counts = Replay(fake_engine(placement), seed, num_agents, turns).run()
        total.asked, total.unheld = total.asked + counts.asked, total.unheld + counts.unheld
        total.prefilled += counts.prefilled
    return total


def report(results: dict[str, dict[str, float]]) -> None:
    """Prints the table."""
    headings = ("", "context tokens", "held by no pool", "prefilled", "ratio")
    table = common.table("Tokens prefilled again", headings)
    for name, row in results.items():
        table.add_row(
            name, f"{row['asked']:,.0f}", f"{row['unheld']:,.0f}", f"{row['prefilled']:,.0f}", f"{row['ratio']:.3f}"
        )
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = common.parser("replay", __doc__)
    parser.add_argument("--agents", type=int, default=10, help="agents at once")
    parser.add_argument("--turns", type=int, default=8, help="calls of each agent")
    parser.add_argument("--seeds", type=int, default=5, help="random traces, added up")
    options = parser.parse_args(arguments)
    results = {}
    for placement in PLACEMENTS:
        total = replay(placement, options.seeds, options.agents, options.turns)
        results[placement] = {**vars(total), "ratio": total.ratio}
    report(results)
    common.save(results, options.json)


if __name__ == "__main__":
    main()
