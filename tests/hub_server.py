"""A hub on the loopback that takes what `huggingface_hub` itself sends: repositories as dictionaries of files."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        answer = {
            "create": lambda: {"url": f"{self.server.address}/me/{json.loads(body)['name']}"},
            "validate-yaml": lambda: {"errors": [], "warnings": []},
            "main": lambda: self._of_repository(body),
        }[self.path.rsplit("/", 1)[-1]]()
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _of_repository(self, body):
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                self.server.commits.append(line["value"]["summary"])
        return {"commitUrl": f"{self.server.address}/me/emoji/commit/1", "commitOid": "1", "success": True}

    def log_message(self, *args):
        pass


@contextmanager
def hub():
    """The server; `.address`, and what it was asked and sent: `.asked`, `.files`, `.commits`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.files, server.commits = [], {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
