"""A server that speaks OpenAI's API (docs/serving.md)."""
