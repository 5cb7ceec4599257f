"""Where the base's part of a prompt ends and the decode module's begins. Host code without jax."""

from pshare_jax.errors import PshareError


def base_len(prompt_len: int, response_start: int | None = None) -> int:
    """Leading tokens of a prompt that the base encodes; the decode module consumes the others itself.

    That is all but the last token. With `response_start` k, tokens k, k + 1, ... are a begun answer of the module's, so the
    base encodes the k - 1 first.

    Raises:
        PshareError: there is no token before the begun answer, or none in it.
    """
    if response_start is None:
        return prompt_len - 1
    if not 1 <= response_start < prompt_len:
        raise PshareError(
            f"response_start is {response_start}, but for a prompt of {prompt_len} tokens it must be at least 1 and less "
            f"than {prompt_len}."
        )
    return response_start - 1
