"""Prompts that strategies write: the run's own prompt with something added to it."""

from __future__ import annotations

from typing import cast

from orchestra.runtime.engine import Message, Prompt


def followed_by(prompt: Prompt, text: str) -> Prompt:
    """`prompt` with a paragraph added, in the last user message if it is a chat.

    System messages and earlier turns stay as they are; a chat that ends otherwise gets a user message.
    """
    if isinstance(prompt, str):
        return f"{prompt.rstrip()}\n\n{text}"
    messages = [cast(Message, dict(message)) for message in prompt]
    if messages and messages[-1]["role"] == "user":
        messages[-1]["content"] = f"{messages[-1]['content'].rstrip()}\n\n{text}"
    else:
        messages.append({"role": "user", "content": text})
    return messages


def question(prompt: Prompt) -> str:
    """What a prompt asks, as text to quote in another prompt: the last user message of a chat."""
    if isinstance(prompt, str):
        return prompt.strip()
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return (asked[-1] if asked else "\n\n".join(message["content"] for message in prompt)).strip()


def alike(prompt: Prompt, text: str) -> Prompt:
    """`text` as a prompt of the same form: a chat of one user message where `prompt` is a chat, else plain text."""
    return text if isinstance(prompt, str) else [{"role": "user", "content": text}]
