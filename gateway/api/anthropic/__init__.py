"""Anthropic's Messages API, translated to a chat of OpenAI's form and back. Pure."""
