"""A judge whose verdicts are known, behind a server on loopback."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def shown(question):
    """The two answers that a judge sees."""
    a, b = question.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
    return a, b.split("\n\nReason")[0]


def longer(question):
    a, b = shown(question)
    return "[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]"


@contextmanager
def serving():
    """It speaks the chat part of OpenAI's protocol.

    `.failures` are statuses it gives, `.bodies` what it sends in place of a reply, `.reply` is what judges.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, self.headers["Authorization"], asked))
            reply = {"role": "assistant", "content": self.server.reply(asked["messages"][0]["content"])}
            choice = {"index": 0, "message": reply, "finish_reason": "stop"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}
            status = self.server.failures.pop(0) if self.server.failures else 200
            data = json.dumps(body if status == 200 else {"error": {"message": "no such model"}}).encode()
            data = self.server.bodies.pop(0) if self.server.bodies else data
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if data[:1] == b"<" else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.asked, served.failures, served.bodies, served.reply = [], [], [], longer
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        served.shutdown()
        thread.join()
        served.server_close()
