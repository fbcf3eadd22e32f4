// The book: a file with a line per entry, by wasi:filesystem. A volume of the pod is a folder that the component is
// given (a "preopen"); what lies outside of those is not there.

import { getDirectories } from "wasi:filesystem/preopens@0.2.10";

export const MAX_ENTRY_BYTES = 1000;

const PIECE_BYTES = 65536n;

// All entries, the oldest first; none while there is no file yet.
export function readEntries(path) {
  const file = open(path, {}, { read: true });
  if (file === null) {
    return [];
  }
  const decoder = new TextDecoder();
  let text = "";
  for (let at = 0n, end = false; !end; ) {
    let piece;
    [piece, end] = file.read(PIECE_BYTES, at);
    text += decoder.decode(piece, { stream: true });
    at += BigInt(piece.length);
  }
  return text.split("\n").filter((line) => line !== "");
}

// Append an entry, by one write: instances that append at the same time do not mix their lines.
export function addEntry(path, entry) {
  const file = open(path, { create: true }, { write: true });
  file.appendViaStream().blockingWriteAndFlush(new TextEncoder().encode(`${entry}\n`));
}

// The file, or null where it is missing.
function open(path, openFlags, flags) {
  const [folder, name] = preopened(path);
  try {
    return folder.openAt({ symlinkFollow: true }, name, openFlags, flags);
  } catch (error) {
    if (error.payload === "no-entry") {
      return null;
    }
    throw error;
  }
}

// The folder of a volume that holds `path`, and the path in it.
function preopened(path) {
  for (const [folder, at] of getDirectories()) {
    const prefix = at.endsWith("/") ? at : `${at}/`;
    if (path.startsWith(prefix)) {
      return [folder, path.slice(prefix.length)];
    }
  }
  throw new Error(`no volume holds ${path}`);
}
