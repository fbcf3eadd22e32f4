"""Kubeconfig files: Wasilet's own, and one context in the user's.

The user's file belongs to the user: entries of Wasilet's name are added and removed, everything else stays as it is,
with its comments, its order and its quoting. So the text is edited, not dumped again; where the edit does not parse to
exactly what was meant (flow style, anchors, tabs), and only there, the file is written again from its data.

The lock is kubectl's own (``<file>.lock``, created exclusively), so `kubectl config` and Wasilet do not lose each
other's changes.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wasilet_common import kube_yaml, kubeconfig
from wasilet_common.kubeconfig import SECTIONS, KubeconfigError

from wasilet.errors import StateError
from wasilet.kube.client import KubeObject
from wasilet.process import check_cancelled
from wasilet.storage import storage_errors, write_file

LOCK_TIMEOUT_SECONDS = 10.0


def build(
    *,
    name: str,
    server: str,
    ca: bytes | None,
    certificate: bytes | None = None,
    key: bytes | None = None,
    token: str = "",
) -> KubeObject:
    """A kubeconfig of one context; everything embedded."""
    cluster: KubeObject = {"server": server}
    if ca:
        cluster["certificate-authority-data"] = base64.b64encode(ca).decode()
    user: KubeObject = {"token": token} if token else {}
    if certificate and key:
        user["client-certificate-data"] = base64.b64encode(certificate).decode()
        user["client-key-data"] = base64.b64encode(key).decode()
    return kubeconfig.document(cluster=cluster, user=user, context=name, cluster_name=name, user_name=name)


def renamed(path: Path, name: str) -> KubeObject:
    """A file of one context with every entry under another name, credentials as they are: a plugin stays a plugin.
    Raises StateError when it has not exactly one of each."""
    data = read_config(path)
    if any(len(data.get(section) or []) != 1 for section in SECTIONS):
        raise StateError(f"{path} should hold one context", hint="`invoke down --purge` removes the cluster")
    wanted = copy.deepcopy(data)
    for section in SECTIONS:
        wanted[section][0]["name"] = name
    wanted["contexts"][0]["context"] |= {"cluster": name, "user": name}
    wanted["current-context"] = name
    return wanted


def write_kubeconfig(
    path: Path,
    *,
    name: str,
    server: str,
    ca: bytes | None,
    certificate: bytes | None = None,
    key: bytes | None = None,
    token: str = "",
) -> None:
    """Write one of Wasilet's own files, atomically, mode 0600. Raises StateError."""
    write_file(
        path,
        _dump(build(name=name, server=server, ca=ca, certificate=certificate, key=key, token=token)).encode(),
    )


def kubeconfig_files(environ: Mapping[str, str]) -> list[Path]:
    """The files that kubectl reads, in its order: those of ``$KUBECONFIG``, else ``~/.kube/config``. A relative name
    counts from the folder that the command was typed in. ``~`` is the shell's: client-go does not know it either."""
    base = Path(environ.get("WASILET_INVOCATION_DIR") or Path.cwd())
    named = [entry for entry in environ.get("KUBECONFIG", "").split(os.pathsep) if entry]
    home = environ.get("HOME")
    default = (Path(home) if home else Path.home()) / ".kube" / "config"
    return list(dict.fromkeys(base / entry for entry in named)) or [default]


def user_kubeconfig(environ: Mapping[str, str]) -> Path:
    """The file that kubectl would change: the first that is there, else the last (client-go's GetDefaultFilename)."""
    files = kubeconfig_files(environ)
    return next((file for file in files if file.exists()), files[-1])


def read_config(path: Path) -> KubeObject:
    """The file's data; empty when there is none. Raises StateError when it is no kubeconfig."""
    try:
        data = kubeconfig.read(path).data
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StateError(f"cannot read kubeconfig {path}: {error.strerror}") from error
    except KubeconfigError as error:
        raise StateError(str(error), hint="repair it, or use --kubeconfig PATH") from error
    if not all(isinstance(data.get(s) or [], list) for s in SECTIONS):
        raise StateError(f"{path} is no kubeconfig", hint="repair it, or use --kubeconfig PATH")
    return dict(data)


def check_changeable(path: Path) -> None:
    """Raise StateError when a kubeconfig could not be changed: it is damaged, or cannot be written where it is."""
    if path.is_dir():
        raise StateError(f"{path} is a folder, not a kubeconfig", hint="use --kubeconfig PATH")
    target = path.resolve() if path.is_symlink() else path
    read_config(path)
    # A symbolic link's lock stands beside the link, and the file is replaced where it really is.
    for folder in {path.parent, target.parent}:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not there.is_dir():
            raise StateError(f"cannot write kubeconfig {path}: {there} is no folder", hint="use --kubeconfig PATH")
        if not os.access(there, os.W_OK | os.X_OK):
            raise StateError(
                f"cannot write kubeconfig {path}: {there} is not yours to write to, or is read-only",
                hint="use --kubeconfig PATH",
            )


def holds(path: Path, ours: KubeObject) -> bool:
    """Whether a file has Wasilet's entries exactly (the current context aside), and no one else may read them."""
    try:
        data = read_config(path)
        private = not path.stat().st_mode & 0o077
    except (StateError, OSError):
        return False
    return private and all(ours[section][0] in (data.get(section) or []) for section in SECTIONS)


def add(path: Path, ours: KubeObject) -> str:
    """Put Wasilet's entries into a file and make its context the current one. The file gets mode 0600, since a key is
    in it. Returns the context that was current before (empty: none). Raises StateError."""
    name = str(ours["current-context"])
    with locked(path):
        data = read_config(path)
        before = str(data.get("current-context") or "")
        wanted = _without(data, name)
        for section in SECTIONS:
            wanted[section] = [*(wanted.get(section) or []), ours[section][0]]
        wanted["current-context"] = name
        wanted.setdefault("apiVersion", "v1")
        wanted.setdefault("kind", "Config")
        _save(path, data, wanted, name, mode=0o600)
    return before


def remove(path: Path, name: str, *, server: str = "", previous: str = "", delete_if_empty: bool = False) -> bool:
    """Take Wasilet's entries out again; whether there were any. ``server``: only when its cluster entry still names it.
    When Wasilet's context is current, ``previous`` becomes current again if it still exists. Raises StateError."""
    if not path.exists():
        return False
    with locked(path):
        data = read_config(path)
        entries = [e for e in data.get("clusters") or [] if isinstance(e, dict) and e.get("name") == name]
        if not entries or (server and (entries[0].get("cluster") or {}).get("server") != server):
            return False
        wanted = _without(data, name)
        if wanted.get("current-context") == name:
            known = [e.get("name") for e in wanted.get("contexts") or [] if isinstance(e, dict)]
            wanted["current-context"] = previous if previous in known else ""
        if delete_if_empty and not any(wanted.get(section) for section in SECTIONS):
            with storage_errors(path):
                path.unlink(missing_ok=True)
            return True
        _save(path, data, wanted, name)
    return True


def _without(data: KubeObject, name: str) -> KubeObject:
    wanted = copy.deepcopy(data)
    for section in SECTIONS:
        if section in wanted:
            kept = [e for e in wanted[section] or [] if not (isinstance(e, dict) and e.get("name") == name)]
            wanted[section] = kept
    return wanted


def _save(path: Path, data: KubeObject, wanted: KubeObject, name: str, *, mode: int | None = None) -> None:
    """``mode``: None keeps the file's."""
    target = path.resolve() if path.is_symlink() else path
    text = ""
    if data:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = target.read_bytes().decode()
    edited = _edited(text, wanted, name) if text else None
    if mode is None:
        mode = 0o600
        with contextlib.suppress(OSError):
            mode = target.stat().st_mode & 0o777
    if edited is None:
        edited = _dump(wanted).replace("\n", _line_end(text))
    write_file(target, edited.encode(), mode=mode)


@contextlib.contextmanager
def locked(path: Path, *, timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
    """Hold ``<path>.lock`` as client-go does. One that a killed run of Wasilet's left behind is taken away."""
    lock = path.with_name(path.name + ".lock")
    with storage_errors(lock):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            fd = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            break
        except FileExistsError:
            if _left_by_the_dead(lock):
                lock.unlink(missing_ok=True)
                continue
            if time.monotonic() >= deadline:
                raise StateError(
                    f"kubeconfig {path} is locked by another program", hint=f"if none runs, remove {lock}"
                ) from None
            check_cancelled()
            time.sleep(0.05)
        except OSError as error:
            with storage_errors(lock):
                raise error from None
    try:
        with os.fdopen(fd, "w") as file:
            file.write(f"wasilet {os.getpid()}\n")
        yield
    finally:
        lock.unlink(missing_ok=True)


def _left_by_the_dead(lock: Path) -> bool:
    try:
        word, pid = lock.read_text().split()
        return word == "wasilet" and not Path(f"/proc/{int(pid)}").exists()
    except (OSError, ValueError):
        return False


# --- text surgery ----------------------------------------------------------------------------------------------------


def _edited(text: str, wanted: KubeObject, name: str) -> str | None:
    """``text`` changed into something that parses to ``wanted``; None when that cannot be done by lines."""
    import yaml

    try:
        # A line keeps its carriage return: what is not touched stays as it is, whatever the others end with.
        end = _line_end(text).removesuffix("\n")
        lines = text.removesuffix("\n").split("\n")
        if not text.endswith("\n"):
            lines[-1] += end
        for section in SECTIONS:
            lines = _edit_section(lines, section, wanted, name, end)
        lines = _edit_scalar(lines, "current-context", wanted, end)
        for key in ("apiVersion", "kind"):
            lines = _edit_scalar(lines, key, wanted, end)
        edited = "\n".join(lines) + "\n"
        return edited if _same(kube_yaml.load(edited), wanted) else None
    except (yaml.YAMLError, kube_yaml.YamlError, _NotByLinesError):
        return None


def _line_end(text: str) -> str:
    """What most lines of a text end with."""
    return "\r\n" if text.count("\r\n") * 2 > text.count("\n") else "\n"


class _NotByLinesError(Exception):
    """The file is written in a way that cannot be edited line by line."""


def _same(one: Any, other: KubeObject) -> bool:
    if not isinstance(one, dict):
        return False
    return _normal(one) == _normal(other)


def _normal(data: KubeObject) -> KubeObject:
    """An empty section and an absent one say the same, and so do an empty current context and none."""
    return {k: v for k, v in data.items() if not (k in {*SECTIONS, "current-context"} and not v)}


def _top_level(lines: list[str]) -> dict[str, tuple[Any, Any]]:
    import yaml

    root = yaml.compose("\n".join(lines) + "\n", Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise _NotByLinesError
    return {str(key.value): (key, value) for key, value in root.value}


def _edit_section(lines: list[str], section: str, wanted: KubeObject, name: str, end: str) -> list[str]:
    import yaml

    entry = next((e for e in wanted.get(section) or [] if isinstance(e, dict) and e.get("name") == name), None)
    nodes = _top_level(lines)
    if section not in nodes:
        return [*lines, f"{section}:{end}", *_entry_lines(entry, "", end)] if entry else lines
    key, value = nodes[section]
    if not isinstance(value, yaml.SequenceNode) or value.flow_style or not value.value:
        # `clusters: []`, `clusters: null`, `clusters:`: nothing in it that could be lost.
        if getattr(value, "value", None):
            raise _NotByLinesError
        first, last = key.start_mark.line, max(key.start_mark.line, value.end_mark.line)
        last = min(last, first)
        if entry is None:
            return lines
        return [*lines[:first], f"{section}:{end}", *_entry_lines(entry, "", end), *lines[last + 1 :]]
    indent = " " * value.start_mark.column
    kept = list(lines)
    for item in reversed(value.value):
        if _item_name(item) == name:
            start = item.start_mark.line
            stop = _end_line(kept, item)
            if "-" not in kept[start][: item.start_mark.column]:
                raise _NotByLinesError
            del kept[start:stop]
    if entry is None:
        if all(_item_name(item) == name for item in value.value):
            kept[key.start_mark.line] = f"{section}: []{end}"
        return kept
    removed = len(lines) - len(kept)
    last_item = value.value[-1]
    position = _end_line(lines, last_item) - removed
    return [*kept[:position], *_entry_lines(entry, indent, end), *kept[position:]]


def _end_line(lines: list[str], item: Any) -> int:
    """The line after an item's last one; comments and blank lines that follow it belong to what comes next."""
    end = int(item.end_mark.line) + (1 if item.end_mark.column > 0 else 0)
    end = min(end, len(lines))
    while end - 1 > item.start_mark.line and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    if end - 1 > item.start_mark.line and item.end_mark.column > 0:
        tail = lines[end - 1]
        # A block mapping's end mark stands at the beginning of the token after it.
        if tail.lstrip().startswith("- ") or (tail[:1].strip() and not tail.startswith("-")):
            end -= 1
    return end


def _item_name(item: Any) -> str | None:
    for key, value in getattr(item, "value", None) or []:
        if getattr(key, "value", None) == "name":
            return str(value.value)
    return None


def _entry_lines(entry: KubeObject | None, indent: str, end: str) -> list[str]:
    return [] if entry is None else [f"{indent}{line}{end}" for line in _dump([entry]).splitlines()]


def _edit_scalar(lines: list[str], key: str, wanted: KubeObject, end: str) -> list[str]:
    import yaml

    nodes = _top_level(lines)
    value = wanted.get(key)
    if key not in nodes:
        return lines if value in {None, ""} else [*lines, _dump({key: value}).rstrip("\n") + end]
    name, node = nodes[key]
    if not isinstance(node, yaml.ScalarNode) or name.start_mark.line != node.end_mark.line:
        raise _NotByLinesError
    if (node.value or "") == (value or ""):
        return lines
    number = node.start_mark.line
    line = lines[number]
    text = _dump({key: value or ""}).rstrip("\n").partition(": ")[2]
    before, after = line[: node.start_mark.column].rstrip(), line[node.end_mark.column :]
    return [*lines[:number], f"{before} {text}{after}", *lines[number + 1 :]]


def _dump(data: Any) -> str:
    import yaml

    dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(data, Dumper=dumper, sort_keys=False, width=10**9)
    # PyYAML leaves out quotes that kubectl needs, as those of "1e3": then JSON, which is YAML too.
    return text if kube_yaml.load(text) == data else json.dumps(data, indent=2) + "\n"
