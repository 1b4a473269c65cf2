"""A headless Chromium, driven over its debugging pipe with the standard library alone."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--mute-audio",
)  # fmt: skip
NAMED_KEYS = ("Escape", "Enter", "ArrowRight", "ArrowLeft", "Home", "End", "Tab")
PATIENCE = 60.0  # seconds for one answer


def find() -> str | None:
    """Where a Chromium lies on this machine, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page. `errors` are what its console complained about, `requests` what it asked for.

    Use it as a context: at its end the browser and its profile are gone. Raises RuntimeError where it does not start
    or does not answer.
    """

    def __init__(self, executable: str) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="llmalign-chromium-")
        child_reads, self._writes = os.pipe()
        self._reads, child_writes = os.pipe()
        held = [os.dup(child_reads), os.dup(child_writes)]

        def place() -> None:
            high = [os.dup(one) for one in held]
            while min(high) < 5:
                high = [os.dup(one) for one in high]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [executable, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            preexec_fn=place, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for one in (child_reads, child_writes, *held):
            os.close(one)
        self._rest, self._last, self._session = b"", 0, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._reads)
        os.close(self._writes)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer. Raises RuntimeError for an error."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        left = memoryview(json.dumps(message).encode() + b"\0")
        while left:
            left = left[os.write(self._writes, left) :]
        while (found := self._read()).get("id") != self._last:
            self._note(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        result: dict[str, Any] = found.get("result", {})
        return result

    def view(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's size in pixels, and which colours the system asks for; under 600 wide it is a phone."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path, ready: str = "document.readyState === 'complete'") -> float:
        """Open a file and wait until the expression `ready` holds. Returns the seconds that this took."""
        started = time.perf_counter()
        self.errors.clear()
        self.requests.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait(ready)
        return time.perf_counter() - started

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, promises awaited. Raises RuntimeError where it throws."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:600])
        return found["result"].get("value")

    def wait(self, expression: str, patience: float = PATIENCE) -> None:
        """Wait until a JavaScript expression holds. Raises RuntimeError where it never does."""
        until = time.monotonic() + patience
        while not self.run(expression):
            if time.monotonic() > until:
                raise RuntimeError(f"{expression} did not come true in {patience:.0f} s; console: {self.errors}")
            time.sleep(0.02)

    def key(self, key: str) -> None:
        """Press and release a key, such as `j`, `/`, `Escape`."""
        text = {} if key in NAMED_KEYS else {"text": key}
        codes = {"Escape": 27, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9}
        if key in codes:
            text |= {"windowsVirtualKeyCode": codes[key]}  # type: ignore[dict-item]
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.send("Input.insertText", text=text)

    def point(self, x: float, y: float) -> None:
        """Move the pointer, in pixels of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], PATIENCE)
            part = os.read(self._reads, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError(f"Chromium does not answer (exit status {self._process.poll()})")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(told["args"])[:500])
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"][:200])
