"""The screen as a page: one HTML file that needs no network and no kernel, or served by a model on this machine."""

import json
import sys
import threading
from base64 import b64encode
from collections.abc import Mapping
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from string import Template

from hat_lib.config import HatError
from hat_lib.workbook.screen import PRESETS, Screen

HTML, STYLE, *PARTS = (
    files("hat_lib.workbook").joinpath(name).read_text(encoding="utf-8")
    for name in ("play.html", "play.css", "play_parts.js", "play.js", "play_widget.js")
)
SCRIPT = "\n".join(PARTS)


def html(presets: Mapping[str, tuple[str, str]], screen: Screen | None = None) -> str:
    """The page of prompts, name -> prompt and hint: with all that a screen shows of them, else asking its server."""
    questions = [{"ask": "whole", "prompt": prompt} for prompt, _ in presets.values()]
    blocks = [screen and b64encode(screen.answer(question)).decode() for question in questions]
    given = {"presets": [[name, *words] for name, words in presets.items()], "served": screen is None, "blocks": blocks}
    text = json.dumps(given).replace("<", "\\u003c")  # a prompt must not end the script
    return Template(HTML).substitute(js=SCRIPT, css=STYLE, given=text)


class Server(ThreadingHTTPServer):
    """Serves the page, and answers it, on this machine alone. Questions wait for ``screen``, a future: so the page
    opens while the model is loaded. Raises `HatError` if the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int):
        self.screen: Future[Screen] = Future()
        self.one = threading.Lock()  # question at a time
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise HatError(f"cannot serve on port {port}: {error.strerror or error}; choose another, --port") from error
        self.host = f"127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a tab was closed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 20  # seconds in which a question must arrive

    def do_GET(self) -> None:
        if self.path == "/":
            self._reply(200, html(PRESETS), "text/html")
        else:
            self._reply(404, f"nothing at {self.path}")

    def do_POST(self) -> None:
        # A page of another site may not ask: this machine is neither its host nor its origin.
        host, size = self.headers["Host"] or "", self.headers["Content-Length"] or ""
        own = host.rpartition(":")[0] in ("127.0.0.1", "localhost")
        if self.path != "/ask" or not own or self.headers["Origin"] not in (None, f"http://{host}"):
            return self._reply(403, "only this server's own page may ask")
        if not size.isdecimal() or len(size) > 6:
            return self._reply(413, f"expected less than a million bytes, got {size[:20]!r}")
        try:
            question, screen = json.loads(self.rfile.read(int(size))), self.server.screen.result()
            with self.server.one:
                block = screen.answer(question)
        except TimeoutError:
            return self._reply(408, f"expected {size} bytes within {self.timeout} seconds")
        except (ValueError, RecursionError) as error:  # ours, and what is no JSON
            return self._reply(400, str(error))
        except Exception as error:
            return self._reply(500, f"{type(error).__name__}: {error}")
        self._reply(200, block, "application/octet-stream")

    def _reply(self, code: int, body: str | bytes, kind: str = "text/plain") -> None:
        if isinstance(body, str):
            body, kind = body.encode(), f"{kind}; charset=utf-8"
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
