"""minikube's command line (1.37), after its reference (site/content/en/docs/commands). A new profile's API server is a
real one, of another provider, that ``settings.json`` names.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

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


def main(words: list[str]) -> NoReturn:
    """Behave as minikube would."""
    world = World.of_environment()
    world.note("minikube", words)
    parsed = parse(words, COMMANDS)
    profiles: dict[str, dict[str, Any]] = world.read("profiles", {})
    name = parsed.one("--profile", "minikube")
    match parsed.command:
        case ("version",):
            print(f"v{world.setting('minikube_version', '1.37.0')}")
        case ("start",):
            sys.stdout.write("* Starting control plane ...\n")
            profiles.setdefault(
                name,
                {
                    "Driver": os.environ.get("MINIKUBE_DRIVER", "docker"),
                    "KubernetesConfig": {"ContainerRuntime": parsed.one("--container-runtime", "docker")},
                },
            )
            world.write("profiles", profiles)
            world.write("running", [*world.read("running", []), name])
            _write_context(world, name)
        case ("delete",):
            profiles.pop(name, None)
            world.write("profiles", profiles)
        case ("profile", "list"):
            valid = [{"Name": key, "Status": "OK", "Config": value} for key, value in profiles.items()]
            print(json.dumps({"invalid": [], "valid": valid}))
        case ("status",):
            state = "Running" if name in world.read("running", []) else "Stopped"
            print(json.dumps({"Name": name, "Host": state, "Kubelet": state, "APIServer": state, "Worker": False}))
            sys.exit(0 if state == "Running" else 7)
        case ("ssh",):
            _ssh(world, parsed.rest)
    sys.exit(0)


def _write_context(world: World, name: str) -> None:
    """minikube adds a context named as the profile to the first file of KUBECONFIG, and makes it current."""
    data = yaml.safe_load(Path(world.setting("kubeconfig")).read_text())
    for section in ("clusters", "contexts", "users"):
        data[section][0]["name"] = name
    data["contexts"][0]["context"] = {"cluster": name, "user": name}
    data["current-context"] = name
    assert base64.b64decode(data["users"][0]["user"]["client-key-data"]), "minikube was to embed the keys"
    Path(os.environ["KUBECONFIG"].split(os.pathsep)[0]).write_text(yaml.safe_dump(data))


def _ssh(world: World, rest: list[str]) -> None:
    if len(rest) != 1:
        refuse("one command line is expected after --")
    file = world.folder / "files" / "hosts.toml"
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
