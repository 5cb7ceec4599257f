"""Full fine-tuning against transformers and torch: the loss, and all weights after one step of AdamW."""

import numpy as np
import torch
from objective_models import BaseWithModules, fresh, samples, shape_of
from reference import load_hf

import pshare_jax as ps
from pshare_jax.training.config import OptimizerConfig
from pshare_jax.training.data.batches import one_stream
from pshare_jax.training.step.objective import decode_module
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.steps import train_steps

RATE, DECAY, EPS = 1e-2, 0.1, 1e-3
"""With a small eps the first step of AdamW is the sign of the gradient, which rounding flips near zero."""


def torch_step(model, found):
    """The mean loss over all answer tokens; updates the model by a step."""
    decayed = [one for name, one in model.named_parameters() if "norm" not in name]
    others = [one for name, one in model.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=EPS)
    total, count = torch.zeros(()), 0
    for sample in found:
        logprobs = model(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        for start, end in sample.turns:
            targets = torch.tensor(sample.ids[start:end])
            total = total - logprobs[start - 1 : end - 1].gather(1, targets[:, None]).sum()
            count += end - start
    loss = total / count
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_step_of_full_fine_tuning_equals_torch(tmp_path):
    models = BaseWithModules("llama", tmp_path)
    found = samples(12)
    module = fresh(models.base, "full_ft", shape_of("full"), "float32")
    config = OptimizerConfig(RATE, "constant", warmup_steps=0, eps=EPS, weight_decay=DECAY, clip_norm=None)
    steps = train_steps(module.objective, update_rule(config, 1), 0)
    # Two micro-batches with different numbers of tokens.
    state, sums = steps.init(module.trainable), steps.no_sums()
    for number, rows in enumerate(([found[:2], []], [[found[2]], [found[3]]])):
        batch = one_stream(rows, 64, 24)
        sums = steps.accumulate(sums, state.trainable, module.frozen, module.base_params, batch, number)
    state, result = steps.apply(state, sums)

    theirs = load_hf(models.folder)
    loss = torch_step(theirs, found)
    np.testing.assert_allclose(float(result.loss), loss, rtol=1e-5)
    ps.save_module(
        tmp_path / "after", decode_module(module.objective, state.trainable, models.base.params), models.base
    )
    ours = load_hf(tmp_path / "after").state_dict()
    before = load_hf(models.folder).state_dict()
    for name, expected in theirs.state_dict().items():
        moved = (expected - before[name]).abs().max()
        assert moved > 0, name
        assert (ours[name] - expected).abs().max() < 1e-3 * moved, name
