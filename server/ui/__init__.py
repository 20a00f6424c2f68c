"""The page at `/`: a chat and the engine live, for whoever has just started the server."""
