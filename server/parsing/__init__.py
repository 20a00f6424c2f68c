"""From the text of an answer to its reasoning, content and tool calls."""
