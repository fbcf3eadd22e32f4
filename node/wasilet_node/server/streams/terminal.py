"""The little of a terminal that ``kubectl exec -it`` needs from the other side.

kubectl puts the user's terminal into raw mode and leaves echo, line editing and control characters to the remote
terminal. A wasm module has none: WASI preview 1 knows no terminals. Without this, typing would show nothing, Enter
would send a carriage return that no program waits for, and Ctrl-C would be a byte. So: canonical mode, as a Linux
terminal in its default state, without job control.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_LINE_BYTES = 4096
"""As the kernel's canonical mode."""

_INTERRUPT, _EOF, _BACKSPACE, _KILL_LINE, _DELETE = 0x03, 0x04, 0x08, 0x15, 0x7F
_CR, _LF = 0x0D, 0x0A


@dataclass(frozen=True, kw_only=True)
class Typed:
    """What came of some keystrokes."""

    input: bytes = b""
    """Whole lines, for the guest."""

    echo: bytes = b""
    """For the user's screen."""

    end: bool = False
    """Ctrl-D on an empty line: no more input."""

    interrupt: bool = False
    """Ctrl-C."""


class LineDiscipline:
    """Keystrokes to lines."""

    def __init__(self) -> None:
        self._line = bytearray()

    def type(self, data: bytes) -> Typed:
        """Take keystrokes; everything behind a Ctrl-C or the end is dropped."""
        lines, echo = bytearray(), bytearray()
        for key in data:
            if key == _INTERRUPT:
                self._line.clear()
                return Typed(input=bytes(lines), echo=bytes(echo) + b"^C\r\n", interrupt=True)
            if key == _EOF:
                if not self._line:
                    return Typed(input=bytes(lines), echo=bytes(echo), end=True)
                lines += self._line
                self._line.clear()
            elif key in {_CR, _LF}:
                lines += self._line + b"\n"
                self._line.clear()
                echo += b"\r\n"
            elif key in {_BACKSPACE, _DELETE}:
                if self._erase():
                    echo += b"\b \b"
            elif key == _KILL_LINE:
                while self._erase():
                    echo += b"\b \b"
            elif len(self._line) < MAX_LINE_BYTES:
                self._line.append(key)
                echo += bytes([key]) if key >= 0x20 or key == 0x09 else b"^" + bytes([key + 0x40])
        return Typed(input=bytes(lines), echo=bytes(echo))

    def _erase(self) -> bool:
        """Remove the last character, all bytes of it."""
        if not self._line:
            return False
        while self._line and self._line[-1] & 0xC0 == 0x80:
            self._line.pop()
        if self._line:
            self._line.pop()
        return True


def to_screen(data: bytes) -> bytes:
    """Line feeds of a program as a raw terminal wants them."""
    return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
