"""Questions to a language model behind a server with OpenAI's chat completions, such as vLLM."""

from __future__ import annotations

from typing import Any


def connect(server: str, timeout: float, retries: int = 2):
    """Makes the `openai.OpenAI` client of a server.

    Args:
      server: address, such as "http://localhost:8000/v1". A key comes from OPENAI_API_KEY.
      timeout: seconds that a call may take.
      retries: of a call that fails by a fault of the server or the network; waits grow from half a second to eight.

    Raises:
      ImportError: the `openai` package is missing.
    """
    import openai  # takes a second, and most runs do without

    options = {"base_url": server, "timeout": timeout, "max_retries": retries}
    try:
        return openai.OpenAI(**options)
    except openai.OpenAIError:  # no key in the environment: local servers want none
        return openai.OpenAI(**options, api_key="none")


def ask(client, model: str, messages: list[dict[str, Any]], tokens: int) -> str:
    """Asks for the likeliest answer of a model, in one line; "" without an answer.

    Args:
      client: of `connect`.
      messages: in OpenAI's form.
      tokens: length of the answer, at most.

    Raises:
      openai.OpenAIError: the server does not answer, or refuses.
    """
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0.0, max_tokens=tokens)
    text = (answer.choices[0].message.content or "") if answer.choices else ""
    return " ".join(text.split())
