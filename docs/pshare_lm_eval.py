"""lm-eval with scores as PrefillShare trains: run as `python pshare_lm_eval.py run --model pshare-completions ...`.

lm-eval's own `local-completions` asks for plain echo, which scores every token of a continuation as if it were the first
of an answer. For continuations of one token that is the same. For longer ones this class tells the server where the
continuation begins (`response_start`), so that the decode module reads it on its own KV, as it would have written it.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI


class _Prompt(list):
    """Token ids of a context and its continuation, and where the continuation begins."""

    start: int


@register_model("pshare-completions")
class PshareCompletions(LocalCompletionsAPI):
    """`local-completions` that sends `response_start` with every prompt whose continuation is scored."""

    def batch_loglikelihood_requests(self, chunks: Any) -> tuple[list[Any], list[int], list[Any]]:
        """The prompts, each with its context's length."""
        inputs, lengths, keys = super().batch_loglikelihood_requests(chunks)
        prompts = [_Prompt(ids) for ids in inputs]
        for prompt, length in zip(prompts, lengths, strict=True):
            prompt.start = length
        return prompts, lengths, keys

    def _create_payload(self, messages: Any, generate: bool = False, **kwargs: Any) -> dict[str, Any]:
        payload = super()._create_payload(messages, generate=generate, **kwargs)
        if generate:
            return payload
        if not all(isinstance(prompt, _Prompt) for prompt in messages):
            raise ValueError(
                "pshare-completions scores token ids: leave tokenized_requests=True and batch sizes as they are."
            )
        return {**payload, "response_start": [prompt.start for prompt in messages]}


if __name__ == "__main__":
    cli_evaluate()
