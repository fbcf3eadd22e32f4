"""minikube's command line (1.38), after its reference (site/content/en/docs/commands) and what the real one prints. A
new profile's API server is a real one, of another provider, that ``settings.json`` names.

``profiles.json`` holds configurations by name; ``running.json`` names the profiles whose API server runs, and
``booting.json`` those whose machine does.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from tests.rigs.standins.commandline import Command, Flag, anything, duration, matches, parse, refuse, switch
from tests.rigs.standins.world import World

COMPONENTS = "kubelet|kubeadm|apiserver|controller-manager|etcd|proxy|scheduler"
WAITS = "apiserver|system_pods|default_sa|apps_running|node_ready|kubelet|extra"
GLOBAL = {
    "--profile": Flag(check=matches(r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?")),
    "-p": Flag(check=matches(r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?")),
    "--alsologtostderr": switch(),
    "--v": Flag(check=matches(r"\d+")),
}
START_FLAGS = {
    "--addons": Flag(check=anything, repeatable=True),
    "--container-runtime": Flag(check=matches("docker|cri-o|containerd")),
    "--cpus": Flag(check=matches(r"\d+|max|no-limit")),
    "--driver": Flag(check=matches(r"docker|kvm2|podman|none|qemu2|virtualbox|ssh")),
    "--embed-certs": switch(),
    "--extra-config": Flag(check=matches(rf"({COMPONENTS})\.[a-z0-9.-]+=.*"), repeatable=True),
    "--insecure-registry": Flag(check=anything, repeatable=True),
    "--interactive": switch(),
    "--keep-context": switch(),
    "--kubernetes-version": Flag(check=matches(r"v?\d+\.\d+\.\d+|stable|latest")),
    "--listen-address": Flag(check=anything),
    "--memory": Flag(check=anything),
    "--nodes": Flag(check=matches(r"\d+")),
    "--wait": Flag(check=matches(rf"({WAITS})(,({WAITS}))*|all|none|true|false")),
    "--wait-timeout": Flag(check=duration),
}
COMMANDS: dict[tuple[str, ...], Command] = {
    ("version",): Command(
        flags=GLOBAL | {"--short": switch(), "--components": switch(), "--output": Flag(check=matches("json|yaml"))}
    ),
    ("start",): Command(flags=GLOBAL | START_FLAGS),
    ("delete",): Command(
        flags=GLOBAL | {"--all": switch(), "--purge": switch(), "--output": Flag(check=matches("text|json"))}
    ),
    ("profile", "list"): Command(
        flags=GLOBAL | {"--light": switch(), "-l": switch(), "--output": Flag(check=matches("json|table"))}
    ),
    ("status",): Command(
        flags=GLOBAL
        | {
            "--format": Flag(check=anything),
            "--layout": Flag(check=matches("nodes|cluster")),
            "--node": Flag(check=anything),
            "--output": Flag(check=matches("text|json")),
        }
    ),
    ("ssh",): Command(flags=GLOBAL | {"--native-ssh": switch(), "--node": Flag(check=anything)}, after_dashes=True),
}


MISSING = 85
STOPPED = 7
NOT_RUNNING = 83
FAILURE_BOX = """
X Exiting due to {reason}

* Suggestion: run "minikube logs" and look for what went wrong.

\u256d\u2500\u2500\u2500\u2500\u2500\u2500\u2500\u2500\u256e
\u2502 * If the above advice does not help, please let us know:      \u2502
\u2502   https://github.com/kubernetes/minikube/issues/new/choose    \u2502
\u2570\u2500\u2500\u2500\u2500\u2500\u2500\u2500\u2500\u256f
"""


def main(words: list[str]) -> NoReturn:
    """Behave as minikube would."""
    world = World.of_environment()
    world.note("minikube", words)
    parsed = parse(words, COMMANDS)
    profiles: dict[str, dict[str, Any]] = world.read("profiles", {})
    name = parsed.one("--profile", "minikube")
    match parsed.command:
        case ("version",):
            print(f"v{world.setting('minikube_version', '1.38.1')}")
        case ("start",):
            _start(world, name, parsed.one("--container-runtime", "docker"))
        case ("delete",):
            for file in ("running", "booting"):
                with world.changing(file, []) as names:
                    names[:] = [other for other in names if other != name]
            with world.changing("profiles", {}) as changing:
                changing.pop(name, None)
        case ("profile", "list"):
            listed = [
                {"Name": key, "Status": "OK" if value else "", "Config": value or None}
                for key, value in profiles.items()
            ]
            invalid = [entry for entry in listed if not entry["Config"]]
            print(json.dumps({"invalid": invalid, "valid": [entry for entry in listed if entry["Config"]]}))
        case ("status",):
            _status(world, name, profiles)
        case ("ssh",):
            _ssh(world, name, parsed.one("--node"), parsed.rest)
    sys.exit(0)


def _fail(code: int, reason: str) -> NoReturn:
    sys.stderr.write(FAILURE_BOX.format(reason=reason))
    sys.exit(code)


def _start(world: World, name: str, runtime: str) -> None:
    """A profile is listed long before it runs, and its context is written when all the rest is done."""
    if len(name) < 2:
        _fail(14, f"MK_USAGE: Profile name '{name}' is not valid")
    driver = os.environ.get("MINIKUBE_DRIVER") or world.setting("minikube_driver", "docker")
    if world.setting("root") and driver == "docker" and os.environ.get("MINIKUBE_FORCE") != "true":
        _fail(57, 'DRV_AS_ROOT: The "docker" driver should not be used with root privileges.')
    sys.stdout.write(f"* Using the {driver} driver\n* Starting control plane ...\n")
    sys.stdout.flush()
    if why := world.setting("minikube_fails"):
        with world.changing("profiles", {}) as profiles:
            profiles[name] = None
        _fail(80, why)
    with world.changing("profiles", {}) as profiles:
        profiles.setdefault(
            name,
            {
                "Driver": driver,
                "KubernetesConfig": {"ContainerRuntime": runtime},
                "Nodes": [
                    {"Name": "" if number == 1 else f"m{number:02}"}
                    for number in range(1, world.setting("nodes", 1) + 1)
                ],
            },
        )
    world.phase("profile")
    for file, phase in (("booting", "machine"), ("running", "apiserver")):
        with world.changing(file, []) as names:
            names.append(name)
        world.phase(phase)
    _write_context(world, name)
    world.phase("context")


def _machines(profile: dict[str, Any], name: str) -> list[str]:
    nodes = [node["Name"] for node in profile.get("Nodes") or [{"Name": ""}]]
    return [f"{name}-{node}" if node else name for node in nodes]


def _status(world: World, name: str, profiles: dict[str, Any]) -> NoReturn:
    """One node is an object, several are a list, a missing profile is two events."""
    if name not in profiles:
        for kind, message in (("step", f'Profile "{name}" not found.'), ("error", f"minikube start -p {name}")):
            event = {"specversion": "1.0", "type": f"io.k8s.sigs.minikube.{kind}", "data": {"message": message}}
            print(json.dumps(event))
        sys.exit(MISSING)
    server = "Running" if name in world.read("running", []) else "Stopped"
    host = server if name not in world.read("booting", []) else "Running"
    entries = []
    for index, machine in enumerate(_machines(profiles[name] or {}, name)):
        down = machine in world.setting("stopped_nodes", [])
        entry = {"Name": machine, "Host": "Stopped" if down else host, "Kubelet": server, "Worker": index > 0}
        entries.append(entry | {"APIServer": "Irrelevant" if index else server})
    print(json.dumps(entries[0] if len(entries) == 1 else entries))
    running = server == "Running" and all(entry["Host"] == "Running" for entry in entries)
    sys.exit(0 if running else STOPPED)


def _write_context(world: World, name: str) -> None:
    """minikube adds a context named as the profile to the first file of KUBECONFIG, and makes it current."""
    import yaml  # takes longer than all the rest of a start

    data = yaml.safe_load(Path(world.setting("kubeconfig")).read_text())
    for section in ("clusters", "contexts", "users"):
        data[section][0]["name"] = name
    data["contexts"][0]["context"] = {"cluster": name, "user": name}
    data["current-context"] = name
    assert base64.b64decode(data["users"][0]["user"]["client-key-data"]), "minikube was to embed the keys"
    Path(os.environ["KUBECONFIG"].split(os.pathsep)[0]).write_text(yaml.safe_dump(data))


def _ssh(world: World, name: str, node: str, rest: list[str]) -> None:
    if len(rest) != 1:
        refuse("one command line is expected after --")
    profile = world.read("profiles", {}).get(name) or {}
    machines = _machines(profile, name)
    machine = node if node in machines else f"{name}-{node}" if node else name
    if machine not in machines:
        _fail(80, f"GUEST_NODE_RETRIEVE: Could not find node {node}")
    if name not in world.read("running", []) or machine in world.setting("stopped_nodes", []):
        _fail(NOT_RUNNING, f"GUEST_NOT_RUNNING: The control-plane node {machine} host is not running")
    file = world.folder / "files" / machine / "hosts.toml"
    if rest[0] == "grep host.minikube.internal /etc/hosts":
        print(f"{world.setting('gateway')}\thost.minikube.internal", end="\r\n")
    elif rest[0].startswith("sudo cat "):
        sys.stdout.write(file.read_text().replace("\n", "\r\n") if file.is_file() else "")
    elif rest[0].startswith("sudo mkdir -p "):
        text = rest[0].split('printf "', 1)[1].rsplit('" | sudo tee', 1)[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace('\\"', '"').replace("\\n", "\n"))
    elif rest[0].startswith("sudo rm -rf "):
        file.unlink(missing_ok=True)
    else:
        refuse(f"unexpected command: {rest[0]}")
