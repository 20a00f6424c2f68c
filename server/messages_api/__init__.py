"""Anthropic's Messages API, /v1/messages, as a translation to and from the server's chat."""
