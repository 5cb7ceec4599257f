"""smolagents' ToolCallingAgent, which forces a call in every step, whole and streamed: `python use_smolagents.py URL TASK`."""

import sys

from smolagents import OpenAIServerModel, ToolCallingAgent, tool
from two_tools import QUESTION, TOOLS, report

url, task = sys.argv[1:]
model = OpenAIServerModel(model_id=task, api_base=f"{url}/v1", api_key="none", max_tokens=200, temperature=0)
answers = []
for streams in (False, True):
    agent = ToolCallingAgent(
        tools=[tool(one) for one in TOOLS], model=model, max_steps=4, stream_outputs=streams, verbosity_level=0
    )
    answers.append(agent.run(QUESTION))
    steps = [step.error for step in agent.memory.steps if hasattr(step, "error")]
report(answers=answers, errors=[str(error) for error in steps if error])
