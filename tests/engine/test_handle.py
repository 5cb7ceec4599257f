"""Handles, `generate` and `run`: the engine as a library, with its threads and without."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import make_engine
from serving_fakes import EOS, Echo

from pshare_jax.engine.engine import UnknownTask
from pshare_jax.engine.handle import RequestFailed
from pshare_jax.engine.request import FAILED, Request
from pshare_jax.errors import PshareError

pytestmark = pytest.mark.host
ECHO = Echo("handle")
PROMPTS = [tuple(range(start, start + 9)) for start in range(0, 90, 10)]


@pytest.fixture(params=[False, True], ids=["stepped", "threads"])
def fakes(request):
    fakes = make_engine({"t": ECHO, "abc": [*b"abc", EOS]}, max_requests=4)
    if request.param:
        fakes.engine.start()
    yield fakes
    fakes.engine.stop()
    assert fakes.faults == []


def test_events_carry_ids_and_the_result_is_the_whole_answer(fakes):
    handle = fakes.engine.submit(Request("r", "abc", (1, 2), 9, stop_ids=frozenset({EOS}), logprobs=0))
    events = list(handle)
    assert [event.token_id for event in events] == [*b"abc", EOS]
    result = handle.result()
    assert (result.ids, result.text, result.finish_reason) == ([*b"abc", EOS], "abc", "stop")
    assert [item.token_id for item in result.logprobs] == result.ids
    assert handle.done
    assert list(handle) == []


def test_generate_answers_more_prompts_than_may_run_at_once_in_their_order(fakes):
    results = fakes.engine.generate(PROMPTS, "t", max_tokens=5, stop_ids=())
    assert [result.ids for result in results] == [ECHO.answer(prompt, 5) for prompt in PROMPTS]
    assert {result.finish_reason for result in results} == {"length"}


def test_run_mixes_tasks_and_reports_progress(fakes):
    requests = [Request(f"r{i}", "t" if i % 2 else "abc", prompt, 3) for i, prompt in enumerate(PROMPTS)]
    counts = []
    results = fakes.engine.run(requests, counts.append)
    assert [result.request for result in results] == requests
    assert results[0].text == "abc"
    assert results[1].ids == ECHO.answer(PROMPTS[1], 3)
    assert counts == sorted(counts)
    assert counts[-1] == len(PROMPTS)


def test_cancel_ends_a_request_at_once(fakes):
    handle = fakes.engine.submit(Request("r", "t", (1, 2), 200))
    next(iter(handle))
    handle.cancel()
    assert handle.result().finish_reason == "abort"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fact"),
    [((), 1, "empty"), ((1, 2), 10_000, "10000"), ((1, 260), 1, "259"), ((1, -1), 1, "259"), ((1,), -1, "max_tokens")],
)
def test_a_request_that_cannot_be_answered_is_refused_before_any_runs(fakes, prompt, max_tokens, fact):
    good, bad = Request("good", "t", (1, 2), 100), Request("bad", "t", prompt, max_tokens)
    with pytest.raises(PshareError, match=fact):
        fakes.engine.run([good, bad])
    with pytest.raises(PshareError, match=fact):
        fakes.engine.submit(bad)
    assert fakes.engine.num_live == 0
    assert fakes.decode["t"].rows == []


def test_the_whole_context_can_be_used_and_no_more(fakes):
    max_len = fakes.engine.facts.max_len
    prompt = tuple(range(200)) + tuple(range(max_len - 200 - 1))
    assert len(fakes.engine.generate([prompt], "t", max_tokens=1)[0].ids) == 1
    with pytest.raises(PshareError, match=str(max_len)):
        fakes.engine.submit(Request("r", "t", (*prompt, 1), 0, scores_prompt=True))


@pytest.mark.parametrize("started", [False, True])
def test_callers_in_several_threads_share_the_engine(started):
    fakes = make_engine({"t": ECHO}, max_requests=4)
    if started:
        fakes.engine.start()

    def ask(start):
        return [result.ids for result in fakes.engine.generate(PROMPTS[start:], "t", max_tokens=4, stop_ids=())]

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, range(4)))
    fakes.engine.stop()
    assert answers == [[ECHO.answer(prompt, 4) for prompt in PROMPTS[start:]] for start in range(4)]
    # Without threads of its own the engine is stepped by its callers, one at a time.
    assert set(fakes.faults) <= (set() if started else {"two threads touch one pool"})


def test_a_failed_request_cancels_the_others_and_their_pages_come_back(caplog):
    fakes = make_engine({"t": ECHO, "bad": Echo("bad")})
    fakes.decode["bad"].fail_at = 1
    requests = [Request("long", "t", (1, 2), 200), Request("bad", "bad", (3,) * 9, 9)]
    with pytest.raises(RequestFailed):
        fakes.engine.run(requests)
    assert fakes.engine.idle
    fakes.check()


def test_a_pause_between_two_handles_is_no_stall():
    fakes = make_engine({"t": ECHO}, stall_seconds=0.05)
    handle = fakes.engine.submit(Request("r", "t", (1, 2), 3))
    time.sleep(0.1)
    assert handle.result().finish_reason == "length"


def test_a_handle_with_a_callback_has_no_events(fakes):
    events = []
    handle = fakes.engine.submit(Request("r", "t", (1, 2), 2), events.append)
    with pytest.raises(ValueError, match="on_event"):
        handle.result()


def test_an_unknown_task_is_named_with_the_known_ones(fakes):
    with pytest.raises(UnknownTask, match=r"'u'.*t, abc"):
        fakes.engine.generate([(1, 2)], "u", max_tokens=1)


def test_a_failed_request_raises(fakes, caplog):
    fakes.decode["t"].fail_at = 2
    with pytest.raises(RequestFailed, match=FAILED):
        fakes.engine.generate([(1, 2)], "t", max_tokens=5)
