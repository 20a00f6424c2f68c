"""The faces: command line, HTTP routes and their protocol."""
