"""Prompts rewritten by a language model behind an OpenAI-compatible server; without a server, nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence

from tora_jax.errors import UserError
from tora_jax.io import chat_server

# After the instructions of Open-Sora v1.2 (opensora/utils/inference_utils.py, refine_prompt_by_openai), in short.
INSTRUCTIONS = (
    "You write prompts for a text-to-video model. Rewrite the user's prompt as one paragraph of at most 80 words that "
    "describes what is seen: the subject, how it moves, the background, the light and the camera. Keep every subject, "
    "number, colour and movement that the user names, invent no others, and end with the score suffixes of the prompt "
    "('aesthetic score: ...', 'motion score: ...', 'camera motion: ...') unchanged, if there are any. Answer with the "
    "prompt alone, in English."
)
# CogVideoX's training captions are long (THUDM/CogVideo, inference/convert_demo.py asks for that style as well).
LONG_INSTRUCTIONS = (
    "You write prompts for a text-to-video model that was trained on long captions. Rewrite the user's prompt as one "
    "paragraph of 100 to 150 words: the subject and how it looks, how it moves from beginning to end, the "
    "surroundings, the light, the mood, the style and the camera. Keep every subject, number, colour and movement that "
    "the user names, and add no movement that contradicts them. Answer with the prompt alone, in English."
)
TIMEOUT = 60.0  # seconds
TOKENS = 300  # of an answer, at most


def rewrite(prompts: Sequence[str], server: str, model: str = "", instructions: str = INSTRUCTIONS) -> list[str]:
    """Rewrites prompts.

    Args:
      server: address, such as "http://localhost:8000/v1". A key comes from OPENAI_API_KEY.
      model: its name on the server; "" = the first that the server lists.
      instructions: that the model gets before each prompt.

    Raises:
      UserError: the `openai` package or the server is missing, or the server gives no answer.
    """
    try:
        import openai
    except ImportError:
        raise UserError("--rewrite_url needs the openai package: pip install openai") from None
    client = chat_server.connect(server, TIMEOUT)
    try:
        model = model or client.models.list().data[0].id
        return [_ask(client, model, instructions, prompt) for prompt in prompts]
    except (openai.OpenAIError, IndexError, ValueError) as error:
        raise UserError(f"--rewrite_url {server}: gives no prompt ({error}); start it, or leave the flag out") from None


def _ask(client, model: str, instructions: str, prompt: str) -> str:
    messages = [{"role": "system", "content": instructions}, {"role": "user", "content": prompt}]
    text = chat_server.ask(client, model, messages, TOKENS)
    if not text:
        raise ValueError("an empty answer")
    return text
