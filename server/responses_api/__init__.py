"""The Responses API, /v1/responses, as a translation to and from the server's chat."""
