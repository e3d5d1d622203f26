"""OpenAI's HTTP API: bodies in, answers and event streams out."""
