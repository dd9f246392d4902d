"""A server that speaks OpenAI's API."""
