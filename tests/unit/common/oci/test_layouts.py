"""Which module a manifest means, for each layout in use, and in which words anything else is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from wasilet_common.oci import mediatypes as media
from wasilet_common.oci.layouts import (
    ImageManifest,
    Index,
    Layout,
    LayoutError,
    Plan,
    check_config_type,
    parse_manifest,
    plan,
)

from tests.unit.node.images.fakes import COMPONENT, MODULE, descriptor

pytestmark = pytest.mark.unit

SHA = "sha256:" + "0" * 64
TITLE = media.TITLE_ANNOTATION


def manifest(config_type: str, *layers: dict[str, Any], kind: str = media.OCI_MANIFEST) -> bytes:
    config = descriptor(b"{}", config_type)
    return json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}).encode()


def planned(body: bytes, config: dict[str, Any] | bytes, kind: str = media.OCI_MANIFEST) -> Plan:
    document = parse_manifest(body, kind)
    assert isinstance(document, ImageManifest)
    check_config_type(document)
    return plan(document, config if isinstance(config, bytes) else json.dumps(config).encode())


def wasm(media_type: str, title: str = "") -> dict[str, Any]:
    return descriptor(MODULE, media_type, **({"annotations": {TITLE: title}} if title else {}))


def image_config(entrypoint: list[str] | None = None, cmd: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"architecture": "wasm", "os": "wasi", "config": {"Entrypoint": entrypoint, "Cmd": cmd}, **more}


@pytest.mark.parametrize("system", ["wasip1", "wasip2", "wasi"])
def test_the_cncf_artifact_runs_its_first_layer(system: str) -> None:
    body = manifest(media.CNCF_WASM_CONFIG, wasm(media.CNCF_WASM_LAYER, "a/hello.wasm"), wasm("text/plain", "README"))
    result = planned(body, {"architecture": "wasm", "os": system, "layerDigests": [SHA]})
    assert (result.layout, result.layers[0].size, result.member) == (Layout.CNCF, len(MODULE), "")
    assert result.module_name == "hello.wasm"


def test_wasm_to_ocis_artifact_needs_no_config() -> None:
    result = planned(manifest(media.WASM_TO_OCI_CONFIG, wasm(media.WASM_TO_OCI_LAYER)), b"")
    assert (result.layout, result.module_name) == (Layout.WASM_TO_OCI, "")


def test_runwasis_image_brings_its_entrypoint_and_environment() -> None:
    config = image_config(["/hello.wasm", "--x"], ["y"])
    config["config"] |= {"Env": ["A=1", "B=x=y", "C="], "WorkingDir": "/srv"}
    result = planned(manifest(media.OCI_CONFIG, wasm(media.RUNWASI_LAYER)), config)
    assert result.layout is Layout.RUNWASI
    assert result.config.entrypoint == ("/hello.wasm", "--x")
    assert result.config.cmd == ("y",)
    assert result.config.env == (("A", "1"), ("B", "x=y"), ("C", ""))
    assert result.config.working_dir == "/srv"
    assert result.module_name == "hello.wasm"


def test_of_several_modules_the_entrypoint_picks_one() -> None:
    layers = [
        wasm(media.RUNWASI_LAYER, "a.wasm"),
        descriptor(COMPONENT, media.RUNWASI_LAYER, annotations={TITLE: "b.wasm"}),
    ]
    result = planned(manifest(media.OCI_CONFIG, *layers), image_config(["b.wasm"]))
    assert [layer.size for layer in result.layers] == [len(COMPONENT)]
    assert planned(manifest(media.OCI_CONFIG, *layers), image_config()).module_name == "a.wasm"


@pytest.mark.parametrize(
    ("config", "member"),
    [
        (image_config(["/app/main.wasm"]), "app/main.wasm"),
        (image_config(["main.wasm", "arg"]), "main.wasm"),
        (image_config(None, ["./main.wasm"]), "main.wasm"),
        (image_config(["../../main.wasm"]), "main.wasm"),
        ({**image_config(["main.wasm"]), "os": "linux", "architecture": "amd64"}, "main.wasm"),
        (
            {"os": "wasi", "architecture": "wasm", "config": {"Entrypoint": ["x.WASM"], "WorkingDir": "/srv"}},
            "srv/x.WASM",
        ),
    ],
)
@pytest.mark.parametrize("kind", [media.OCI_MANIFEST, media.DOCKER_MANIFEST])
def test_a_container_image_with_a_wasm_entrypoint_is_searched_for_it(
    config: dict[str, Any], member: str, kind: str
) -> None:
    docker = kind == media.DOCKER_MANIFEST
    body = manifest(
        media.DOCKER_CONFIG if docker else media.OCI_CONFIG,
        wasm(media.OCI_LAYER_TAR),
        wasm(media.DOCKER_LAYER_TAR_GZIP if docker else media.OCI_LAYER_TAR_GZIP),
        kind=kind,
    )
    result = planned(body, config, kind)
    assert (result.layout, result.member, len(result.layers)) == (Layout.WRAPPED, member, 2)
    assert result.module_name == member.rpartition("/")[2]


@pytest.mark.parametrize("entrypoint", [["/bin/sh"], None, [""]])
def test_a_linux_image_is_refused_as_the_wrong_architecture(entrypoint: list[str] | None) -> None:
    config = {"architecture": "amd64", "os": "linux", "config": {"Entrypoint": entrypoint}}
    with pytest.raises(LayoutError, match=r'^wrong architecture: the image is for "linux/amd64" .*WebAssembly only$'):
        planned(manifest(media.DOCKER_CONFIG, wasm(media.DOCKER_LAYER_TAR_GZIP)), config)


def test_an_artifact_for_something_else_is_refused_as_the_wrong_architecture() -> None:
    with pytest.raises(LayoutError, match=r'wrong architecture: .*"linux/arm64"'):
        planned(manifest(media.CNCF_WASM_CONFIG, wasm(media.CNCF_WASM_LAYER)), {"architecture": "arm64", "os": "linux"})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (manifest("application/vnd.cncf.helm.config.v1+json", wasm("x")), 'config media type "application/vnd.cncf'),
        (manifest("application/vnd.oci.empty.v1+json", wasm("x")), "config media type"),
        (manifest(media.CNCF_WASM_CONFIG, wasm("application/x-tar")), 'first layer has media type "application/x-tar"'),
        (manifest(media.CNCF_WASM_CONFIG), "has no layer"),
        (manifest(media.OCI_CONFIG, wasm("application/x-weird")), 'media type "application/x-weird", which is not'),
        (manifest(media.OCI_CONFIG), "no layer that could hold"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(body: bytes, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        planned(body, image_config(["x.wasm"]))


def index(*platforms: tuple[str, str] | None, **more: Any) -> bytes:
    entries = []
    for number, platform in enumerate(platforms):
        entry = {"mediaType": media.OCI_MANIFEST, "digest": "sha256:" + f"{number:064d}", "size": 10, **more}
        if platform:
            entry["platform"] = {"os": platform[0], "architecture": platform[1]}
        entries.append(entry)
    return json.dumps({"schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": entries}).encode()


def chosen(body: bytes) -> int:
    document = parse_manifest(body, media.OCI_INDEX)
    assert isinstance(document, Index)
    return int(document.choose().digest[7:])


@pytest.mark.parametrize(
    "platform", [("wasi", "wasm"), ("wasm", "wasi"), ("wasip1", "wasm"), ("wasip2", "wasm"), ("wasi", "wasm32")]
)
def test_an_index_leads_to_its_wasm_entry(platform: tuple[str, str]) -> None:
    assert chosen(index(("linux", "amd64"), ("unknown", "unknown"), platform, ("linux", "arm64"))) == 2


def test_an_index_without_platforms_leads_to_its_wasm_artifact() -> None:
    assert chosen(index(None)) == 0
    assert chosen(index(("linux", "amd64"), None, artifactType=media.CNCF_WASM_CONFIG)) == 1


def test_an_index_for_linux_alone_is_the_wrong_architecture() -> None:
    with pytest.raises(LayoutError, match=r"wrong architecture: .* only linux/amd64, linux/arm64$"):
        chosen(index(("linux", "arm64"), ("linux", "amd64"), ("unknown", "unknown")))


def test_an_index_of_many_platforms_does_not_flood_the_message() -> None:
    with pytest.raises(LayoutError, match=r"and 92 more$"):
        chosen(index(*[("os", f"arch{n:03d}") for n in range(100)]))


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", "", "not JSON"),
        (b"\xff\xfe", "", "not JSON"),
        (b"[" * 100_000, "", "not JSON"),
        (b"[]", media.OCI_MANIFEST, "not a JSON object"),
        (b"{}", "", 'media type "" is not supported'),
        (b'{"mediaType": 7}', media.OCI_MANIFEST, "not a string"),
        (b"{}", "application/vnd.docker.distribution.manifest.v1+prettyjws", "manifest.v1.prettyjws"),
        (manifest(media.OCI_CONFIG), media.DOCKER_MANIFEST, "calls itself"),
        (index(None), media.OCI_MANIFEST, "calls itself"),
        (b'{"schemaVersion": 2, "manifests": [], "layers": []}', media.OCI_INDEX, "ambiguous"),
        (b'{"schemaVersion": 2, "manifests": [], "config": {}}', media.OCI_MANIFEST, "ambiguous"),
        (b'{"config": {}, "layers": 7}', media.OCI_MANIFEST, "no media type"),
        (b'{"manifests": {}}', media.OCI_INDEX, "not a list"),
    ],
)
def test_a_bad_manifest_is_refused(body: bytes, kind: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse_manifest(body, kind)


@pytest.mark.parametrize(
    "change",
    [
        *({"size": size} for size in (-1, True, "7", 1e3, 1 << 63, None)),
        *({"digest": digest} for digest in ("sha256:0", "md5:" + "0" * 32, None)),
        {"mediaType": None},
    ],
)
def test_a_bad_descriptor_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match="descriptor of the manifest's layers"):
        parse_manifest(manifest(media.OCI_CONFIG, {**wasm(media.RUNWASI_LAYER), **change}), media.OCI_MANIFEST)


@pytest.mark.parametrize(
    "change",
    [
        *({"Env": env} for env in (["A"], ["=x"], "A=1", ["A=" + "x" * 100_000] * 3)),
        *({"Entrypoint": entrypoint} for entrypoint in ("sh", [1], ["a\0b"])),
        {"Cmd": ["\ud800"]},
        *({"WorkingDir": folder} for folder in (1, "a\0")),
    ],
)
def test_a_bad_image_config_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match=r"the image's config has an? "):
        planned(manifest(media.OCI_CONFIG, wasm(media.RUNWASI_LAYER)), {"config": change})


@pytest.mark.parametrize(
    ("title", "name"), [("../../etc/x.wasm", "x.wasm"), ("a\nb", ""), ("/", ""), ("x" * 300, ""), ("\ud800", "")]
)
def test_a_title_is_only_a_name(title: str, name: str) -> None:
    body = manifest(media.CNCF_WASM_CONFIG, wasm(media.CNCF_WASM_LAYER, title))
    assert planned(body, {"architecture": "wasm", "os": "wasip1"}).module_name == name


def mutate(randomly: random.Random, value: Any) -> Any:
    """Another value of any type somewhere in a JSON document."""
    if isinstance(value, dict) and value and randomly.random() < 0.85:
        key = randomly.choice(list(value))
        if randomly.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(randomly, value[key])}
    if isinstance(value, list) and value and randomly.random() < 0.85:
        position = randomly.randrange(len(value))
        return [*value[:position], mutate(randomly, value[position]), *value[position + 1 :]]
    return randomly.choice(
        [None, True, -1, 1 << 70, 1.5, "", "x", "\ud800", "\0", [], {}, [[]], [None], {"a": None}, SHA]
    )


def test_thousands_of_mutated_documents_end_in_nothing_but_layout_errors() -> None:
    randomly = random.Random(11)
    config = {
        "architecture": "wasm",
        "os": "wasip1",
        "config": {"Entrypoint": ["/a.wasm"], "Cmd": ["b"], "Env": ["A=1"], "WorkingDir": "/"},
    }
    seeds: list[Any] = [
        json.loads(manifest(media.CNCF_WASM_CONFIG, wasm(media.CNCF_WASM_LAYER, "x"))),
        json.loads(manifest(media.OCI_CONFIG, wasm(media.OCI_LAYER_TAR))),
        json.loads(manifest(media.OCI_CONFIG, wasm(media.RUNWASI_LAYER))),
        json.loads(index(("linux", "amd64"), ("wasi", "wasm"), None)),
    ]
    outcomes = {"refused": 0, "planned": 0, "chosen": 0}
    messages = set()
    for round_ in range(6000):
        document, used = seeds[round_ % 4], config
        for _ in range(randomly.randint(1, 3)):
            if randomly.random() < 0.5:
                document = mutate(randomly, document)
            else:
                used = mutate(randomly, used)
        try:
            parsed = parse_manifest(
                json.dumps(document).encode(), randomly.choice(["", media.OCI_MANIFEST, media.OCI_INDEX])
            )
            if isinstance(parsed, Index):
                parsed.choose()
                outcomes["chosen"] += 1
            else:
                plan(parsed, json.dumps(used).encode())
                outcomes["planned"] += 1
        except LayoutError as error:
            outcomes["refused"] += 1
            messages.add(str(error))
    assert all(message.isprintable() and len(message) < 2000 for message in messages)
    assert min(outcomes.values()) > 50
