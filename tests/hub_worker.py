"""A process of its own that runs snippets and reports: to publish and to consume as users do, in few starts of Python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_LOOP = """
import contextlib, io, json, os, sys
replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    code, environment, scope = json.loads(line)
    os.environ.update({k: v for k, v in environment.items() if v is not None})
    for name in [k for k, v in environment.items() if v is None]:
        os.environ.pop(name, None)
    said = io.StringIO()
    reply = {"result": None, "error": None, "message": ""}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            exec(code, scope)
        reply["result"] = scope.get("result")
    except BaseException as error:
        reply |= {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(reply | {"said": said.getvalue()}), file=replies, flush=True)
"""


class Reply:
    """What a snippet left: `result`, or the `error`'s type and its `message`; `said` is what it printed."""

    def __init__(self, result: Any, error: str | None, message: str, said: str):
        self.result, self.error, self.message, self.said = result, error, message, said

    def __repr__(self) -> str:
        return f"{self.error or self.result}: {self.message}\n{self.said}"


class Worker:
    """Python with nothing of the user's Hub settings but these; use as a context manager."""

    def __init__(self, folder: Path, **environment: str):
        folder.mkdir(parents=True)
        self.errors = folder / "stderr.txt"
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GBNZOO_", "HUGGING"))}
        self.environment = ours | {
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "no_proxy": "127.0.0.1,localhost",
            **environment,
        }

    def __enter__(self) -> "Worker":
        with open(self.errors, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LOOP],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self.environment,
                text=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # quicker than to let Python take torch down
        self._process.communicate()

    def __call__(self, code: str, environment: dict[str, str | None] | None = None, /, **values: Any) -> Reply:
        """Run a snippet with these values as its globals; what it calls `result` comes back."""
        print(json.dumps([code, environment or {}, values]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the process ended: {self.errors.read_text()}"
        return Reply(**json.loads(line))
