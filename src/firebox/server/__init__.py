"""The HTTP side: OpenAI's API over one text engine."""
