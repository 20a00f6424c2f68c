"""Makes an environment per client, serves the demo and runs every check: `python run_all.py [NAME ...]`.

The environments stay in `--folder` and are made once; `--renew` makes them anew, with the clients' latest releases.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

HERE = Path(__file__).parent
KEY = "secret"
# By environment: what is installed, and which checks run there.
CLIENTS = {
    "openai1": (("openai<2",), ("openai", "responses")),
    "openai2": (("openai>=2,<3",), ("openai", "responses")),
    "openai3": (("openai>=3,<4",), ("openai", "responses")),
    "anthropic": (("anthropic",), ("anthropic",)),
    "litellm": (("litellm",), ("litellm",)),
    "instructor": (("instructor",), ("instructor",)),
    "langchain": (("langchain-openai",), ("langchain",)),
    "agents": (("openai-agents", "pydantic-ai-slim[openai,anthropic]"), ("agents",)),
    "llamaindex": (("llama-index-llms-openai-like",), ("llamaindex",)),
}


def environment(name: str, folder: Path, *, renew: bool) -> Path:
    """The Python of the client's environment, which is made if it is not there."""
    place, done = folder / name, folder / name / "installed"
    if renew or not done.exists():
        print(f"{name}: installing {', '.join(CLIENTS[name][0])}", flush=True)
        venv.create(place, clear=True, with_pip=True)
        subprocess.run([place / "bin" / "python", "-m", "pip", "install", "-q", *CLIENTS[name][0]], check=True)
        done.touch()
    return place / "bin" / "python"


def serve(log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server of the demo model that answers, and its address; RuntimeError if it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from omni_engine.server.cli import main; import sys; sys.exit(main())"]
    command += ["serve", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return process, url
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the server does not answer; its log is: {log}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="which clients; all by default")
    parser.add_argument("--folder", type=Path, default=Path(".venv-clients"), help="of the environments")
    parser.add_argument("--renew", action="store_true", help="install the clients anew")
    arguments = parser.parse_args()
    names = arguments.names or list(CLIENTS)
    pythons = {name: environment(name, arguments.folder.absolute(), renew=arguments.renew) for name in names}
    process, url = serve(arguments.folder / "server.log")
    failed = []
    try:
        for name, python in pythons.items():  # one at a time: the checks count what the server holds
            for check in CLIENTS[name][1]:
                words = [python, HERE / f"check_{check}.py", url, "--api-key", KEY]
                print(f"== {name}: {check}", flush=True)
                # A client that knows of keys and addresses in the environment must not take them for these.
                clean = {
                    key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "ANTHROPIC_"))
                }
                if subprocess.run(words, env=clean, cwd=HERE).returncode:
                    failed.append(f"{name}: {check}")
    finally:
        process.terminate()
        process.wait(60)
    print("all checks passed" if not failed else f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
