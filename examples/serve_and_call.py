"""Start the server and call its OpenAI-compatible API.

    python examples/serve_and_call.py MODEL [PORT]

Needs the extra [serve]. Any client of OpenAI's API can call it; here the standard library does.
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request


def wait_until_up(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Return when the server answers; raise when it has ended."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise SystemExit(server.returncode)


def ask(url: str, text: str) -> str:
    """One answer to one message."""
    body = {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 24}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        choice = json.load(answer)["choices"][0]
    return str(choice["message"]["content"])


def main() -> None:
    model, *port = sys.argv[1:]
    url = f"http://127.0.0.1:{port[0] if port else 23333}"
    command = [sys.executable, "-m", "turbomind_quant", "serve", model, "--model-name", "demo"]
    server = subprocess.Popen([*command, "--server-port", url.rpartition(":")[2]])
    try:
        wait_until_up(url, server)
        print(ask(url, "Name three rivers."))
    finally:
        server.terminate()  # running requests end first
        server.wait()


if __name__ == "__main__":
    main()
