"""The loss of a run over its steps as a picture, drawn from the run's metrics."""

import json
from pathlib import Path

from matplotlib.figure import Figure


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draws the training loss of every step, its running mean and the held-out losses; writes a PNG."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    # A step that was not finite has no point.
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, a step")
        axes.plot(steps, _running_mean(losses), color="C0", label="training, running mean")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color="C1", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token (nats)")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(picture, dpi=150)


def _running_mean(losses: tuple[float, ...]) -> list[float]:
    """Over a twentieth of the run around each step."""
    half = len(losses) // 40
    windows = (losses[max(0, at - half) : at + half + 1] for at in range(len(losses)))
    return [sum(window) / len(window) for window in windows]
