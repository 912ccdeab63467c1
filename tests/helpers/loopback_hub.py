"""A model hub on this machine, as much of it as an upload talks to"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    "As much of a hub as an upload talks to; remembers what it was given"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        host, kept = f"http://{self.headers['Host']}", self.server.kept
        if self.path.endswith("/create"):
            told = json.loads(body)
            repo = f"{told.get('organization') or 'me'}/{told['name']}"
            kind = "datasets/" if told.get("type") == "dataset" else ""
            kept.setdefault(f"{kind}{repo}", {})
            answer = {"url": f"{host}/{kind}{repo}", "id": repo}
        elif self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = [{"path": f["path"]} for f in json.loads(body)["files"]]
            answer = {
                "files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in files]
            }
        else:
            repo = self.path.removeprefix("/api/").removeprefix("models/").partition("/commit/")[0]
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            kept[repo] |= {f["path"]: base64.b64decode(f["content"]) for f in files}
            answer = {"commitUrl": f"{host}/{repo}/commit/1", "commitOid": "1", "hookOutput": ""}
        self.server.tokens.add(self.headers["Authorization"])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: object) -> None:
        "Say nothing"


def open_hub() -> ThreadingHTTPServer:
    "Running; `kept` holds the files of every repository, `tokens` what it was shown"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.kept, server.tokens = {}, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
