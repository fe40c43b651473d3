"""The screen as a page: one HTML file that needs no network and no kernel, or served by a model on this machine."""

from __future__ import annotations

import json
import re
import sys
import threading
from base64 import b64encode
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hat_lib.config import HatError
from hat_lib.workbook.screen import PRESETS, Screen

HERE = Path(__file__).parent
PARTS = "play_parts.js", "play.js", "play_widget.js"
SCRIPT = "\n".join((HERE / name).read_text(encoding="utf-8") for name in PARTS)
STYLE = (HERE / "play.css").read_text(encoding="utf-8")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; connect-src 'self'">
<title>What does a token cost?</title>
<style>body {{ margin: 0 auto; max-width: 1240px; padding: 16px 24px 40px }} h1 {{ font: 600 20px system-ui }}
.about {{ font: 13px/1.5 system-ui; max-width: 64em }}
{css}</style>
<h1>What does a token cost?</h1>
<p class="about">{about}</p>
<div id="play"></div>
<script type="module">
{js}
const given = {given};
const bytes = text => text && Uint8Array.from(atob(text), c => c.charCodeAt(0));
const ask = async question => {{
  const reply = await fetch("ask", {{ method: "POST", body: JSON.stringify(question) }});
  if (!reply.ok) throw new Error(await reply.text());
  return new Uint8Array(await reply.arrayBuffer());
}};
mount(document.getElementById("play"),
  {{ presets: given.presets, blocks: given.blocks.map(bytes), ask: given.served ? ask : null }});
</script></html>
"""
ABOUT = """Each row is a token of the prompt, each column a layer of a frozen language model. Move the dial: at a lower
<b>capacity</b> each token skips a part of every layer's work, chosen anew for each token. The map shows who still gets
it, the tables what the model would say next, dense and at this capacity, and the texts how it goes on."""
LENGTH = re.compile("[0-9]{1,6}")
"""of a question, in bytes"""


def page(presets: Sequence[Sequence[str]], blocks: Sequence[bytes | None], served: bool = False) -> str:
    """The page of prompts, ``[name, prompt, hint]`` each, and their blocks; a ``served`` one asks for what it lacks."""
    given = {"presets": presets, "served": served, "blocks": [b and b64encode(b).decode() for b in blocks]}
    text = json.dumps(given).replace("<", "\\u003c")  # a prompt must not end the script
    return PAGE.format(js=SCRIPT, css=STYLE, about=ABOUT, given=text)


def still_page(screen: Screen, prompts: Mapping[str, tuple[str, str]]) -> str:
    """The page of these prompts, name -> prompt and hint, with all that it shows inside it."""
    blocks = [screen.answer({"ask": "whole", "prompt": prompt}) for prompt, _ in prompts.values()]
    return page([[name, *words] for name, words in prompts.items()], blocks)


class Server(ThreadingHTTPServer):
    """Serves the page, and answers it, on this machine alone. Questions wait for ``screen``, a future: so the page
    opens while the model is loaded. Raises `HatError` if the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int):
        self.screen: Future[Screen] = Future()
        self._one = threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise HatError(f"cannot serve on port {port}: {error.strerror or error}; choose another, --port") from error
        self.host = f"127.0.0.1:{self.server_port}"

    def answer(self, question: Mapping) -> bytes:
        screen = self.screen.result()
        with self._one:
            return screen.answer(question)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a tab was closed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 20  # seconds in which a question must arrive

    def do_GET(self) -> None:
        presets = [[name, *words] for name, words in PRESETS.items()]
        found = self.path == "/"
        text = page(presets, [None] * len(presets), served=True) if found else f"nothing at {self.path}"
        self._reply(200 if found else 404, text.encode(), "text/html" if found else "text/plain")

    def do_POST(self) -> None:
        # A page of another site may not ask: this machine is neither its host nor its origin.
        host = self.headers["Host"] or ""
        own = host.rpartition(":")[0] in ("127.0.0.1", "localhost")
        own = own and self.headers["Origin"] in (None, f"http://{host}")
        if self.path != "/ask" or not own:
            return self._reply(403, b"only this server's own page may ask", "text/plain")
        size = self.headers["Content-Length"] or ""
        if not LENGTH.fullmatch(size):
            return self._reply(413, f"expected less than a million bytes, got {size[:20]!r}".encode(), "text/plain")
        try:
            block = self.server.answer(json.loads(self.rfile.read(int(size))))
        except TimeoutError:
            return self._reply(408, f"expected {size} bytes within {self.timeout} seconds".encode(), "text/plain")
        except (ValueError, RecursionError) as error:  # ours, and what is no JSON
            return self._reply(400, str(error).encode(), "text/plain")
        except Exception as error:
            return self._reply(500, f"{type(error).__name__}: {error}".encode(), "text/plain")
        self._reply(200, block, "application/octet-stream")

    def _reply(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text") else kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
