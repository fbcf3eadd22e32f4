"""A guestbook over HTTP, without a server: the node accepts the connection and calls ``handle`` per request.

``GET /`` shows the book, ``POST /`` adds the body to it as a line, ``GET /healthz`` says that the book can be read.
Each request has an instance of its own, so nothing stays in memory: the book is a file, ``BOOK`` (default
``/data/book.txt``). ``GREETING`` is its title.
"""

import os
import sys

import book
from answers import Answer, BodyError, read_body, send
from wit_world import exports
from wit_world.imports.types import IncomingRequest, Method_Get, Method_Post, ResponseOutparam


class IncomingHandler(exports.IncomingHandler):
    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        try:
            answer = answer_to(request)
        except OSError as error:
            print(error, file=sys.stderr)
            answer = Answer(500, "the book is not at hand\n")
        send(response_out, answer)


def answer_to(request: IncomingRequest) -> Answer:
    path = (request.path_with_query() or "").partition("?")[0]
    method = request.method()
    if path == "/" and isinstance(method, Method_Get):
        return show()
    if path == "/" and isinstance(method, Method_Post):
        return sign(request)
    if path == "/healthz" and isinstance(method, Method_Get):
        book.entries()
        return Answer(200, "ok\n")
    if path == "/":
        return Answer(405, "the guestbook takes GET and POST\n")
    return Answer(404, f"there is no {path}\n")


def show() -> Answer:
    title = os.environ.get("GREETING", "A guestbook")
    entries = book.entries()
    count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    return Answer(200, f"{title}, in Python: {count}\n" + "".join(f"- {entry}\n" for entry in entries))


def sign(request: IncomingRequest) -> Answer:
    try:
        entry = read_body(request, book.MAX_ENTRY_BYTES).strip()
    except BodyError as error:
        return error.answer
    if not entry.isprintable() or not entry:
        return Answer(400, "an entry is one line of text\n")
    book.add(entry)
    print(f"signed: {entry}")
    return Answer(201, "thank you\n")
