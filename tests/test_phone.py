"""lab/phone.py: it serves one page and one file to whoever knows the token, whatever else is asked; in a real
browser the page chats as llama.cpp does, and measures."""
import base64
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import common
from lab import phone

ROOT = Path(common.__file__).parent


class Desk:
    """`python -m lab.phone` in a process of its own."""

    def __init__(self, model: Path, *options, scratch: Path):
        command = [sys.executable, "-u", "-m", "lab.phone", str(model), "--port", "0", *options]
        env = {**os.environ, "TMPDIR": str(scratch)}
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
        line = next(line for line in self.process.stdout if "open on the phone" in line)
        self.scheme, port, self.root = re.search(r"(https?)://[^:]+:(\d+)(/\S+)", line).groups()
        self.port = int(port)

    def ask(self, path: str, method: str = "GET", body=None, **headers) -> tuple[int, bytes, dict]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        link.request(method, path, body, headers)
        answer = link.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())

    def end(self) -> str:
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=20)[0]


@pytest.fixture(scope="module")
def desk(finished_run, tmp_path_factory):
    pytest.importorskip("xllamacpp")
    desk = Desk(finished_run / "mobilemoe.gguf", scratch=tmp_path_factory.mktemp("scratch"))
    yield desk
    desk.process.kill()


def test_a_phone_gets_the_page_and_any_part_of_the_file(desk, finished_run):
    status, page, headers = desk.ask(desk.root)
    assert status == 200 and b"mobilemoe.gguf" in page and b"ABOUT" not in page
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    data = (finished_run / "mobilemoe.gguf").read_bytes()
    assert desk.ask(f"{desk.root}model")[:2] == (200, data)
    for first, last in ((0, 99), (1000, 1000), (len(data) - 5, 10**9)):
        status, part, headers = desk.ask(f"{desk.root}model", Range=f"bytes={first}-{last}")
        assert (status, part) == (206, data[first:last + 1])
        assert headers["Content-Range"] == f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
    assert desk.ask(f"{desk.root}model", Range=f"bytes={len(data)}-")[0] == 416


def test_two_hundred_bad_requests_read_nothing_and_stop_nobody(desk):
    chance = random.Random(0)
    secret = (ROOT / "README.md").read_bytes()[:200]
    paths = ["/", "/model", "/wrong/model", f"{desk.root}../README.md", f"{desk.root}%2e%2e/README.md",
             f"{desk.root}/etc/passwd", f"{desk.root}model/..", "//", f"{desk.root}wllama/esm/index.min.js"]
    ranges = ["bytes=-1", "bytes=5-1", "bytes=0-1,3-4", "bytes=" + "9" * 400, "lines=1-2", "bytes=a-b"]
    for _ in range(190):
        status, body, _ = desk.ask(chance.choice(paths), Range=chance.choice(ranges))
        assert status == 404 and secret not in body
    for wrong in ranges[:5]:
        assert desk.ask(f"{desk.root}model", Range=wrong)[0] in (200, 416)
    for path, body in (("result", "{"), ("result", "[]"), ("result", '{"device": 5}'), ("model", "x")):
        assert desk.ask(f"{desk.root}{path}", "POST", body)[0] in (400, 404)
    with socket.create_connection(("127.0.0.1", desk.port)) as link:        # promises 10 GB, sends some
        link.sendall(f"POST {desk.root}result HTTP/1.1\r\nContent-Length: 10000000000\r\n\r\n".encode())
        assert b"404" in link.recv(1000)
    slow = [socket.create_connection(("127.0.0.1", desk.port)) for _ in range(20)]
    for link in slow:
        link.sendall(b"GET / HT")
    assert desk.ask(desk.root)[0] == 200                                    # while all of them hang
    for link in slow:
        link.close()


def test_what_a_phone_measured_appears_and_ctrl_c_leaves_nothing(finished_run, tmp_path):
    pytest.importorskip("xllamacpp")
    desk = Desk(finished_run / "mobilemoe.gguf", scratch=tmp_path)
    row = json.dumps({"device": "WebAssembly in a browser", "prefill": 12.34, "decode": 5.67})
    assert desk.ask(f"{desk.root}result", "POST", row)[0] == 204
    out = desk.end()
    assert re.search(r"\| WebAssembly in a browser \| +12\.3 \| +5\.7 \|", out)
    assert desk.process.returncode == 130 and not list(tmp_path.iterdir())


def test_what_is_missing_is_refused(refused, finished_run, tmp_path):
    assert "none.gguf" in refused(phone.main, "none.gguf")
    assert "index.min.js" in refused(phone.main, finished_run / "mobilemoe.gguf", "--wllama", tmp_path)


class Browser:
    """Headless Chromium, a phone's size, driven through a pipe."""

    def __init__(self, profile: Path):
        (read, self.out), (self.inp, write) = os.pipe(), os.pipe()
        command = (f"exec chromium --headless=new --no-sandbox --ignore-certificate-errors "
                   f"--remote-debugging-pipe --user-data-dir={profile} about:blank 3<&{read} 4>&{write}")
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(read, write),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.numbers, self.buffer, self.session = itertools.count(1), b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        self.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2,
                  mobile=True)

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.inp, 2**20)
            text, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == number:
                return answer["result"]

    def wait_for(self, code: str):
        for _ in range(400):
            found = self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")
            if found:
                return found
            time.sleep(0.3)
        raise TimeoutError(code)


@pytest.fixture(scope="module")
def wllama(tmp_path_factory) -> Path:
    if not shutil.which("chromium") or not shutil.which("npm"):
        pytest.skip("needs chromium and npm (`apt install chromium npm`)")
    folder = tmp_path_factory.mktemp("npm")
    for name in ("wllama", "wllama-compat"):
        pack = ["npm", "pack", f"@wllama/{name}@{phone.VERSION}"]
        if subprocess.run(pack, cwd=folder, capture_output=True).returncode:
            pytest.skip(f"npm cannot fetch @wllama/{name}")
        with tarfile.open(folder / f"wllama-{name}-{phone.VERSION}.tgz") as tar:
            tar.extractall(folder, filter="data")
        (folder / "package").rename(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tls", [[], ["--tls"]], ids=["http", "https"])
@pytest.mark.parametrize("query", ["", "?compat"])
def test_a_browser_says_what_llama_cpp_says_and_measures(finished_run, wllama, tmp_path, tls, query):
    model = finished_run / "mobilemoe.gguf"
    chats = [[{"role": "user", "content": "What is 7 + 5?"}]]
    want = common.ask_llama_cpp(model, chats=chats, kv="f32", threads=1)["answers"][0]
    desk = Desk(model, "--wllama", str(wllama), *tls, scratch=tmp_path)
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=f"{desk.scheme}://localhost:{desk.port}{desk.root}{query}")
        assert "ready" in browser.wait_for("document.querySelector('.error')?.textContent || "
                                           "!document.querySelector('input').disabled && "
                                           "document.querySelector('#status').textContent")
        browser.call("Runtime.evaluate", expression="document.querySelector('nav button').click()")
        browser.wait_for("document.querySelector('small')")
        said = browser.wait_for("document.querySelector('.assistant').textContent")
        assert said.strip() == want.strip()
        browser.call("Runtime.evaluate", expression="document.querySelector('#measure').click()")
        assert "sent to the desk" in browser.wait_for(
            "!document.querySelector('input').disabled && document.querySelector('#status').textContent")
        shot = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
        assert shot.startswith(b"\x89PNG")
    finally:
        browser.process.kill()
        out = desk.end()
    assert "WebAssembly in a browser" in out
