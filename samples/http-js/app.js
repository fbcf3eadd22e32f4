// A guestbook over HTTP, without a server: the node accepts the connection and makes an event per request.
//
// `GET /` shows the book, `POST /` adds the body to it as a line, `GET /healthz` says that the book can be read. Each
// request has an instance of its own, so nothing stays in memory: the book is a file, `BOOK` (default `/data/book.txt`).
// `GREETING` is its title. What stands outside of functions runs once, while the component is made: neither files nor
// the environment are there then.

import { getEnvironment } from "wasi:cli/environment@0.2.10";
import { MAX_ENTRY_BYTES, addEntry, readEntries } from "./book.js";

addEventListener("fetch", (event) => event.respondWith(respond(event.request)));

async function respond(request) {
  try {
    return await answerTo(request, new Map(getEnvironment()));
  } catch (error) {
    console.error(String(error));
    return answer(500, "the book is not at hand\n");
  }
}

async function answerTo(request, environment) {
  const { pathname } = new URL(request.url);
  const path = environment.get("BOOK") ?? "/data/book.txt";
  const route = `${request.method} ${pathname}`;
  if (route === "GET /") {
    return show(environment.get("GREETING") ?? "A guestbook", readEntries(path));
  }
  if (route === "POST /") {
    return sign(path, new Uint8Array(await request.arrayBuffer()));
  }
  if (route === "GET /healthz") {
    readEntries(path);
    return answer(200, "ok\n");
  }
  return pathname === "/" ? answer(405, "the guestbook takes GET and POST\n") : answer(404, `there is no ${pathname}\n`);
}

function show(title, entries) {
  const count = entries.length === 1 ? "1 entry" : `${entries.length} entries`;
  return answer(200, `${title}, in JavaScript: ${count}\n` + entries.map((entry) => `- ${entry}\n`).join(""));
}

function sign(path, body) {
  if (body.length > MAX_ENTRY_BYTES) {
    return answer(413, `an entry has at most ${MAX_ENTRY_BYTES} bytes\n`);
  }
  let entry;
  try {
    entry = new TextDecoder("utf-8", { fatal: true }).decode(body).trim();
  } catch {
    return answer(400, "the body is not UTF-8\n");
  }
  if (entry === "" || /[\x00-\x1f\x7f-\x9f]/.test(entry)) {
    return answer(400, "an entry is one line of text\n");
  }
  addEntry(path, entry);
  console.log(`signed: ${entry}`);
  return answer(201, "thank you\n");
}

function answer(status, text) {
  return new Response(text, { status, headers: { "content-type": "text/plain; charset=utf-8" } });
}
