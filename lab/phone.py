"""A trained file on any phone: this serves it and a web page in which llama.cpp, as WebAssembly, runs it.

    python -m lab.phone runs/tiny/mobilemoe.gguf                  prints the URL to open on the phone
    python -m lab.phone S.gguf --tls                              https with a certificate of its own: threads
    python -m lab.phone S.gguf --wllama node_modules/@wllama      no CDN: `npm install @wllama/wllama@3.13.0
                                                                  @wllama/wllama-compat@3.13.0` brings these

The phone must reach this computer: the same Wi-Fi, or a cable and `adb reverse tcp:8000 tcp:8000`, then
http://localhost:8000/... The page chats, and measures; what it measured appears here beside this computer's
own figures. In a browser the default file runs about ten times slower than in llama.cpp itself
(docs/results.md), so a page shows *that* a phone runs a file, never the phone's own speed.

Everybody in a Wi-Fi can ask this server, so every address begins with a random token, and behind it are the
file, the page and wllama's files, nothing else. What it is not: a web server for more than a few guests.
Source: wllama (github.com/ngxson/wllama, MIT), llama.cpp compiled to WebAssembly.
"""
import contextlib
import http.server
import json
import re
import secrets
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path

import common
from common import Parser, UserError, number, run_main

CDN = "https://cdn.jsdelivr.net/npm/@wllama/"
VERSION = "3.13.0"
# What the page loads of wllama, and the SHA-256 that the browser checks. The second pair is for browsers that
# cannot suspend WebAssembly (iPhones).
WLLAMA = {"wllama/esm/index.min.js": "5/N0XuUIwRHCLReNI8Usx0AW3YzsOeRgDYfijSh9eYE=",
          "wllama/esm/wasm/wllama.wasm": "eaxb6Re3HVBXGk9YRDap9rr2tuV3GdCU7YvZUOmmV4A=",
          "wllama-compat/wasm/wllama.js": "lCBip0lXkKMXBhsnprzSvTskfi3e9ToGm69auwcoR1g=",
          "wllama-compat/wasm/wllama.wasm": "Nd+MHi99vXS46LAQVPufH76Gz1ZpRfv0zvOWWFWouS4="}
QUESTIONS = ("What is 7 + 5?", "What is 14 + 5 - 7?", "Sort 9, 4, 17.", "What day is 3 days after Monday?",
             "How do you spell banana?", "What does len do?", "What does foo.bar do?", "Who are you?")
PROMPT = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on. " * 8
DECODE = 32             # tokens that a measurement generates
KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".wasm": "application/wasm"}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"       # keeps the connection: a file is read in hundreds of pieces
    timeout = 20                        # seconds that a silent client holds a thread

    def do_GET(self):
        path = self.server.files.get(self.path.partition("?")[0])
        if path is None:
            return self.send_error(404)
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d{1,15})-(\d{0,15})", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        end = min(size, int(wanted[2]) + 1) if wanted and wanted[2] else size
        if first >= end:
            return self.send_error(416)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        self.send_header("Content-Type", KINDS.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(end - first))
        self.end_headers()
        with open(path, "rb") as file:
            file.seek(first)
            while piece := file.read(min(2**20, end - file.tell())):
                self.wfile.write(piece)
        if path.suffix == ".html":
            print(f"opened by {self.client_address[0]}", flush=True)

    def do_POST(self):
        self.close_connection = True            # what else may come is not read
        length = self.headers.get("Content-Length", "")
        if self.path != f"{self.server.root}result" or not re.fullmatch(r"\d{1,4}", length):
            return self.send_error(404)
        try:
            result = json.loads(self.rfile.read(int(length)))
            row = [f"{result['device']:.60}", *(f"{result[what]:.1f}" for what in ("prefill", "decode"))]
        except (ValueError, KeyError, TypeError):
            return self.send_error(400)
        self.server.rows.append(row)
        print("\n" + common.markdown_table(["tokens/s", "prefill", "decode"], self.server.rows), flush=True)
        self.send_response(204)
        self.end_headers()

    def end_headers(self):
        # Threads need a page that is isolated from all others.
        policies = {"Opener": "same-origin", "Embedder": "require-corp", "Resource": "same-origin"}
        for name, value in policies.items():
            self.send_header(f"Cross-Origin-{name}-Policy", value)
        super().end_headers()

    def log_message(self, *_):                  # not a line for each of hundreds of pieces
        pass


def native(model: Path) -> list[str]:
    """The same measurement by llama.cpp itself on this computer."""
    [ids] = common.ask_llama_cpp(model, texts=[PROMPT])["tokens"]
    order = {"path": str(model), "prompt": ids, "decode": DECODE, "threads": 0, "kv": "f32", "mmap": True,
             "repack": True, "touch": False}
    said, _ = common.in_fresh_process("profile_device.measure", order)
    speeds = (1e3 * said[f"{what}_n"] / said[f"{what}_ms"] for what in ("prompt", "decode"))
    return ["this computer, native", *(f"{speed:.1f}" for speed in speeds)]


def serve(model: Path, wllama: Path | None, port: int, tls: bool, folder: Path):
    """Serve until Ctrl-C. `folder` is for what lasts as long: the page, and a certificate."""
    server = http.server.ThreadingHTTPServer(("", port), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None       # phones leave without a word
    server.root = root = f"/{secrets.token_urlsafe(9)}/"
    server.rows = []
    # The CDN wants the version between package and path.
    urls = [f"{root}{name}" if wllama else CDN + name.replace("/", f"@{VERSION}/", 1) for name in WLLAMA]
    about = {"name": model.name, "size": model.stat().st_size, "questions": QUESTIONS, "prompt": PROMPT,
             "decode": DECODE, "wllama": [[url, f"sha256-{sum}"] for url, sum in zip(urls, WLLAMA.values())]}
    page = Path(folder, "page.html")
    page.write_text(Path(__file__).with_suffix(".html").read_text().replace("ABOUT", json.dumps(about)))
    server.files = {root: page, f"{root}model": model}
    server.files |= {url: wllama / name for url, name in zip(urls, WLLAMA)} if wllama else {}
    if tls:
        make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mobilemoe -keyout key -out cert"
        subprocess.run(make.split(), cwd=folder, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert", folder / "key")
        server.socket = context.wrap_socket(server.socket, True, do_handshake_on_connect=False)
    with contextlib.suppress(UserError):        # without xllamacpp the phone's figures stand alone
        server.rows.append(native(model))
    address = "localhost"
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))         # sends nothing; tells which address faces the network
        address = probe.getsockname()[0]
    print(f"open on the phone: http{'s' * tls}://{address}:{server.server_port}{root}\n"
          "For threads: --tls, or a cable and `adb reverse`. Ctrl-C ends it.", flush=True)
    server.serve_forever()


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, help="a .gguf file that export_mobile.py wrote")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="(%(default)s)")
    parser.add_argument("--tls", action="store_true", help="https; click the browser's warning away")
    parser.add_argument("--wllama", type=Path, metavar="DIR", help="wllama's npm packages (none: its CDN)")
    args = parser.parse_args()
    for path in [args.model, *(args.wllama / name for name in (WLLAMA if args.wllama else ()))]:
        if not path.is_file():
            raise UserError(f"no file {path}")
    with tempfile.TemporaryDirectory() as folder:
        serve(args.model, args.wllama, args.port, args.tls, Path(folder))


if __name__ == "__main__":
    run_main(main)
