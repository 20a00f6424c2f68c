"""openai-agents and pydantic-ai against a running server: `python check_agents.py BASE_URL [--api-key KEY]`.

The bundled demo calls no tools: what is checked is that whole and streamed answers pass through both frameworks.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import agents
import anthropic
import openai
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from report import Checks

checks = Checks("openai-agents", "pydantic-ai-slim", "openai", "anthropic")
client = openai.AsyncOpenAI(base_url=checks.api_url, api_key=checks.api_key, max_retries=0)
agents.set_tracing_disabled(True)
PROMPT = "Who was Moses?"
KINDS: list[Any] = [agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel]


def agent(kind: Any) -> Any:
    # An answer that is cut off is an error to this framework.
    settings = agents.ModelSettings(temperature=0, max_tokens=200, extra_body={"stop": [",", ".", ";", ":"]})
    return agents.Agent("a", instructions="Be brief.", model=kind(checks.model, client), model_settings=settings)


@checks
async def openai_agents_run() -> None:
    results = [await agents.Runner.run(agent(kind), PROMPT) for kind in KINDS]
    assert results[0].final_output == results[1].final_output
    counts = [result.context_wrapper.usage.output_tokens for result in results]
    assert counts[0] == counts[1] > 0


@checks
async def openai_agents_stream() -> None:
    whole = (await agents.Runner.run(agent(KINDS[0]), PROMPT)).final_output
    for kind in KINDS:
        result = agents.Runner.run_streamed(agent(kind), PROMPT)
        pieces = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        assert "".join(pieces) == whole == result.final_output


@checks
async def openai_agents_go_on_with_the_servers_memory() -> None:
    first = await agents.Runner.run(agent(KINDS[0]), PROMPT)
    second = await agents.Runner.run(agent(KINDS[0]), "Why?", previous_response_id=first.last_response_id)
    assert second.context_wrapper.usage.input_tokens > first.context_wrapper.usage.input_tokens


@checks
async def pydantic_ai_runs_and_streams() -> None:
    provider = OpenAIProvider(openai_client=client)
    own = anthropic.AsyncAnthropic(base_url=checks.server_url, api_key=checks.api_key, max_retries=0)
    models: list[Any] = [
        OpenAIChatModel(checks.model, provider=provider),
        OpenAIResponsesModel(checks.model, provider=provider),
        AnthropicModel(checks.model, provider=AnthropicProvider(anthropic_client=own)),
    ]
    for model in models:
        assistant = Agent(model, model_settings={"max_tokens": 40, "extra_body": {"temperature": 0}})
        whole = (await assistant.run(PROMPT)).output
        async with assistant.run_stream(PROMPT) as result:
            pieces = [piece async for piece in result.stream_text(delta=True)]
        assert "".join(pieces) == whole and whole, model


checks.run()
