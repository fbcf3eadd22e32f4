"""Building: nothing is done twice, nothing is missed, and what fails says why. The compiler is a small script."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from wasilet.apps.new_app import COMMAND, new_app, template_names
from wasilet.apps.samples import App, Demo, find_app
from wasilet.build import application as builds
from wasilet.build.application import build, built_already, wasi_version, workspace
from wasilet.build.builder import Made
from wasilet.build.cargo import CompileError, compile_module
from wasilet.build.toolchain import OVERRIDE, RustToolchain
from wasilet.errors import HarnessError, UsageError
from wasilet.oci.artifact import Layout, layout_named, make_artifact

pytestmark = pytest.mark.unit

MODULE = b"\0asm\x01\x00\x00\x00"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"WASILET_CACHE": str(tmp_path / "cache"), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}


@pytest.fixture
def app(tmp_path: Path) -> App:
    folder = tmp_path / "my_app"
    (folder / "src").mkdir(parents=True)
    (folder / "Cargo.toml").write_text('[package]\nname = "my_app"\n')
    (folder / "src" / "main.rs").write_text("fn main() {}")
    (folder / "pod.yaml.j2").write_text("kind: Pod")
    return App(name="my-app", folder=folder, demo=Demo())


class Compiler(list[int]):
    """A builder that counts its runs; its module is different each time."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._inputs = (folder / "rustc", folder / "shared.rs")
        for path in self._inputs:
            path.touch()

    def __call__(self, app: App, folder: Path, say: object, environ: object) -> Made:
        self.append(len(self))
        output = folder / "out.wasm"
        output.write_bytes(MODULE + bytes(len(self)))
        return Made(module=output, toolchain="a test", inputs=self._inputs)


@pytest.fixture
def compiled(tmp_path: Path) -> Compiler:
    return Compiler(tmp_path)


def quiet(_: str) -> None:
    """Says nothing."""


def test_unchanged_sources_are_not_compiled_again(app: App, environ: dict[str, str], compiled: Compiler) -> None:
    first = build(app, say=quiet, environ=environ, builder=compiled)
    second = build(app, say=quiet, environ=environ, builder=compiled)
    assert compiled == [0]
    assert (first.cached, second.cached) == (False, True)
    assert second.module.read_bytes() == MODULE + b"\0"
    assert second.digest == first.digest


@pytest.mark.parametrize(
    "change", ["edit", "new file", "removed file", "compiler", "path dependency", "flags", "module"]
)
def test_whatever_goes_into_a_module_brings_a_new_build(
    app: App, environ: dict[str, str], compiled: Compiler, tmp_path: Path, change: str
) -> None:
    (app.folder / "src" / "extra.rs").touch()
    built = build(app, say=quiet, environ=environ, builder=compiled)
    if change == "edit":
        (app.folder / "src" / "main.rs").write_text("fn main() { }")
    elif change == "new file":
        (app.folder / "src" / "cat.rs").touch()
    elif change == "removed file":
        (app.folder / "src" / "extra.rs").unlink()
    elif change == "compiler":
        os.utime(tmp_path / "rustc", (1, 1))
    elif change == "path dependency":
        (tmp_path / "shared.rs").write_text("changed")
    elif change == "flags":
        environ["RUSTFLAGS"] = "-C opt-level=z"
    else:
        built.module.unlink()
    build(app, say=quiet, environ=environ, builder=compiled)
    assert compiled == [0, 1]


def test_sources_beside_the_folder_are_inputs_however_cargo_writes_them(tmp_path: Path) -> None:
    folder, module = tmp_path / "app", tmp_path / "target" / "app.wasm"
    module.parent.mkdir()
    listed = f"{folder}/src/main.rs {folder}/../shared/lib.rs {tmp_path}/with\\ space/x.rs"
    module.with_suffix(".d").write_text(f"{module}: {listed}\n")
    assert list(builds.listed_by_cargo(module, folder)) == [tmp_path / "shared/lib.rs", tmp_path / "with space/x.rs"]


def test_editing_a_manifest_builds_nothing(app: App, environ: dict[str, str], compiled: Compiler) -> None:
    build(app, say=quiet, environ=environ, builder=compiled)
    (app.folder / "pod.yaml.j2").write_text("kind: Pod # changed")
    (app.folder / "README.md").write_text("new")
    build(app, say=quiet, environ=environ, builder=compiled)
    assert compiled == [0]


def test_a_source_that_changes_while_the_compiler_runs_is_built_again(
    app: App, environ: dict[str, str], compiled: Compiler
) -> None:
    def slow(given: App, folder: Path, say: builds.Say, environ: Mapping[str, str]) -> Made:
        made = compiled(given, folder, say, environ)
        (app.folder / "src" / "main.rs").write_text("fn main() { /* saved meanwhile */ }")
        return made

    build(app, say=quiet, environ=environ, builder=slow)
    assert built_already(app, environ) is None


def test_a_damaged_record_is_no_record(app: App, environ: dict[str, str], compiled: Compiler) -> None:
    build(app, say=quiet, environ=environ, builder=compiled)
    for text in ("", "[]", '{"version": 2}', "null"):
        (workspace(app, environ) / "build.json").write_text(text)
        assert built_already(app, environ) is None


def test_nothing_is_written_into_the_apps_folder(app: App, environ: dict[str, str], compiled: Compiler) -> None:
    before = sorted(app.folder.rglob("*"))
    build(app, say=quiet, environ=environ, builder=compiled)
    assert sorted(app.folder.rglob("*")) == before


def test_an_empty_folder_is_no_app(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds nothing to build"):
        build(find_app(str(tmp_path / "empty")), say=quiet, environ=environ)


def test_what_is_no_wasm_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.wasm"
    for data in (b"", b"\x7fELF\x02\x01\x01\x00", b"\0asm\x02\x00\x00\x00"):
        file.write_bytes(data)
        with pytest.raises(HarnessError, match="no WebAssembly module"):
            wasi_version(file)


# --- cargo -----------------------------------------------------------------------------------------------------------


class Cargo:
    """A toolchain whose cargo is a script: it writes down its arguments and does as told."""

    def __init__(self, root: Path, version: tuple[int, int, int]) -> None:
        self.root = root
        (root / "bin").mkdir()
        self.toolchain = RustToolchain(
            bin=root / "bin", target="wasm32-wasi", rustc_version=version, cargo_version=version, origin="a test"
        )

    def does(self, script: str) -> None:
        cargo = self.root / "bin" / "cargo"
        cargo.write_text(f'#!/bin/sh\necho "$RUSTC_BOOTSTRAP|$*" >> {self.root}/calls\n{script}\n')
        cargo.chmod(0o755)

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()

    def compile(self, app: App, environ: dict[str, str]) -> Path:
        return compile_module(
            app.folder,
            toolchain=self.toolchain,
            target_dir=self.root / "target",
            vendor_root=self.root / "crates",
            say=quiet,
            env=environ,
        )


def artifact_line(*names: str) -> str:
    message = {"reason": "compiler-artifact", "target": {"kind": ["bin"]}, "filenames": list(names)}
    return f"echo '{json.dumps(message)}'"


LOCK = 'version = 3\n[[package]]\nname = "log"\nversion = "0.4.0"\nsource = "registry+elsewhere"\n'


def test_a_compilers_refusal_is_shown_as_it_is_without_cargos_progress(
    app: App, environ: dict[str, str], tmp_path: Path
) -> None:
    cargo = Cargo(tmp_path, (1, 80, 0))
    cargo.does(
        'printf "   Compiling my_app v0.1.0\\nerror[E0308]: mismatched types\\n --> src/main.rs:1\\n" >&2; exit 101'
    )
    with pytest.raises(CompileError) as error:
        cargo.compile(app, environ)
    assert error.value.message == "my_app does not compile\nerror[E0308]: mismatched types\n --> src/main.rs:1"


VENDORS = 'case "$*" in *" vendor "*) for last; do :; done; /bin/mkdir -p "$last";; *) {made};; esac'


def test_an_old_cargo_fetches_by_the_unstable_flag_and_builds_stable_and_offline(
    app: App, environ: dict[str, str], tmp_path: Path
) -> None:
    (app.folder / "Cargo.lock").write_text(LOCK)
    cargo = Cargo(tmp_path, (1, 65, 0))
    cargo.does(VENDORS.format(made=artifact_line("/x/my_app.wasm")))
    environ |= {OVERRIDE: str(tmp_path / "bin")}
    assert cargo.compile(app, environ) == Path("/x/my_app.wasm")
    fetch, compile_ = cargo.calls()
    assert fetch.startswith("1|-Z sparse-registry vendor --versioned-dirs")
    assert compile_.startswith("|build --release")
    assert "--offline" in compile_
    cargo.compile(app, environ)
    assert len(cargo.calls()) == 3, "the dependencies were fetched twice"
    with (app.folder / "Cargo.toml").open("a") as manifest:
        manifest.write('[dependencies]\nlibm = "0.2"\n')
    cargo.compile(app, environ)
    assert "vendor" in cargo.calls()[3], "what was added by hand is fetched too"


@pytest.mark.parametrize("locked", [True, False])
def test_a_newer_cargo_chooses_and_fetches_for_an_old_one(
    app: App,
    environ: dict[str, str],
    tmp_path: Path,
    locked: bool,  # noqa: FBT001
) -> None:
    made = LOCK.replace("version = 3", "# made\nversion = 4")
    (app.folder / "Cargo.toml").write_text('[package]\nname = "x"\n[dependencies]\nlog = "0.4"\n')
    if locked:
        (app.folder / "Cargo.lock").write_text(made)
    cargo = Cargo(tmp_path, (1, 65, 0))
    cargo.does(artifact_line("/x/my_app.wasm"))
    newer = tmp_path / ".rustup" / "toolchains" / "stable-x" / "bin"
    newer.mkdir(parents=True)
    note = "$RUSTC|$RUSTC_BOOTSTRAP|$CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS|$PWD|$*"
    scripts = {
        "rustc": "echo rustc 1.90.0",
        "cargo": f'[ $1 != --version ] || {{ echo cargo 1.90.0; exit; }}; echo "{note}" >> {tmp_path}/newer\n'
        f"echo '{made}' > Cargo.lock; for last; do :; done; /bin/mkdir -p $last",
    }
    for tool, script in scripts.items():
        (newer / tool).write_text(f"#!/bin/sh\n{script}\n")
        (newer / tool).chmod(0o755)
    cargo.compile(app, {**environ, "HOME": str(tmp_path), "PATH": str(tmp_path)})
    (fetch,) = (tmp_path / "newer").read_text().splitlines()
    assert fetch.startswith(f"{tmp_path}/bin/rustc||fallback|{app.folder}|vendor --versioned-dirs")
    assert [call.split()[0] for call in cargo.calls()] == ["|build"]
    version = "version = 4" if locked else "version = 3"
    assert version in (app.folder / "Cargo.lock").read_text(), "only a lock file of our making is rewritten"


def test_an_old_cargo_without_dependencies_fetches_nothing(app: App, environ: dict[str, str], tmp_path: Path) -> None:
    cargo = Cargo(tmp_path, (1, 65, 0))
    cargo.does(artifact_line("/x/my_app.wasm"))
    cargo.compile(app, environ)
    assert len(cargo.calls()) == 1


def test_a_fetch_that_fails_leaves_no_half_filled_folder(app: App, environ: dict[str, str], tmp_path: Path) -> None:
    (app.folder / "Cargo.lock").write_text(LOCK)
    cargo = Cargo(tmp_path, (1, 65, 0))
    cargo.does('for last; do :; done; /bin/mkdir -p "$last"; echo "error: Could not resolve host" >&2; exit 101')
    with pytest.raises(HarnessError, match="Could not resolve host") as error:
        cargo.compile(app, environ | {OVERRIDE: str(tmp_path / "bin")})
    assert "no network" in error.value.hint
    assert list((tmp_path / "crates").iterdir()) == []


def test_a_crate_with_several_programs_asks_which(app: App, environ: dict[str, str], tmp_path: Path) -> None:
    cargo = Cargo(tmp_path, (1, 80, 0))
    cargo.does(f"{artifact_line('/x/one.wasm')}; {artifact_line('/x/two.wasm')}")
    with pytest.raises(HarnessError, match="several programs: one, two"):
        cargo.compile(app, environ)


# --- artifacts -------------------------------------------------------------------------------------------------------


def test_one_module_makes_one_digest_whenever_it_is_pushed(tmp_path: Path) -> None:
    module = tmp_path / "a.wasm"
    module.write_bytes(MODULE)
    os.utime(module, (1_600_000_000, 1_600_000_000))
    for layout in Layout:
        first = make_artifact(module, layout=layout, environ={})
        assert make_artifact(module, layout=layout, environ={}).digest == first.digest
    assert json.loads(make_artifact(module, environ={}).config.data)["created"] == "2020-09-13T12:26:40Z"
    assert b"1970-01-01T00:00:09Z" in make_artifact(module, environ={"SOURCE_DATE_EPOCH": "9"}).config.data


def test_the_cncf_config_names_system_and_layer(tmp_path: Path) -> None:
    module = tmp_path / "a.wasm"
    module.write_bytes(MODULE)
    artifact = make_artifact(module, environ={})
    config = json.loads(artifact.config.data)
    assert config["architecture"] == "wasm"
    assert config["os"] == "wasip1"
    assert config["layerDigests"] == [artifact.layer.digest]
    assert "component" not in config


def test_a_components_interfaces_are_in_its_config(tmp_path: Path) -> None:
    import wasmtime

    text = """(component
        (import "wasi:io/error@0.2.0" (instance $i (export "error" (type (sub resource)))))
        (import "plain" (func))
        (core module $m (func (export "run")))
        (core instance $c (instantiate $m))
        (func $run (canon lift (core func $c "run")))
        (instance $run-i (export "run" (func $run)))
        (export "wasi:cli/run@0.2.0" (instance $run-i))
        (export "again" (func $run)))"""
    data = wasmtime.wat2wasm(text)
    module = tmp_path / "c.wasm"
    module.write_bytes(data)
    config = json.loads(make_artifact(module, environ={}).config.data)
    assert config["os"] == "wasip2"
    assert config["component"] == {
        "exports": ["wasi:cli/run@0.2.0", "again"],
        "imports": ["wasi:io/error@0.2.0", "plain"],
        "target": "wasi:cli/command@0.2.0",
    }
    module.write_bytes(bytes(data)[:-1])
    with pytest.raises(HarnessError, match="damaged"):
        make_artifact(module, environ={})


def test_an_unknown_layout_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        layout_named("docker")
    assert "cncf, krustlet, runwasi, image" in error.value.hint


# --- a new app -------------------------------------------------------------------------------------------------------


def test_a_new_app_has_its_name_everywhere_and_a_demo_that_is_understood(tmp_path: Path) -> None:
    new_app("cat-door", str(tmp_path))
    made = find_app(str(tmp_path / "cat-door"))
    assert made.demo.expect[0].pod == "cat-door"
    files = [file for file in made.folder.rglob("*") if file.is_file()]
    assert made.folder / "test_app.py" in files
    assert made.folder / ".gitignore" in files
    assert all("__NAME__" not in file.read_text() for file in files)
    assert "fallback" in (made.folder / ".cargo" / "config.toml").read_text(), "cargo add takes what Rust 1.63 compiles"
    compile((made.folder / "test_app.py").read_text(), "test_app.py", "exec")


@pytest.mark.parametrize("template", [name for name in template_names() if name != COMMAND])
def test_a_new_service_is_the_sample_under_its_own_name(tmp_path: Path, template: str) -> None:
    new_app("cat-door", str(tmp_path), template=template)
    made = find_app(str(tmp_path / "cat-door"))
    assert [expected.title for expected in made.demo.expect][1:] == [
        "service/cat-door",
        "rolling update of deployment/cat-door",
    ]
    files = [file for file in made.folder.rglob("*") if file.is_file()]
    assert {".gitignore", "test_app.py", "README.md", "deployment.yaml.j2"} <= {file.name for file in files}
    assert not [file for file in files if "__NAME__" in file.read_text() or template in file.read_text()]
    compile((made.folder / "test_app.py").read_text(), "test_app.py", "exec")


def test_an_unknown_template_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no template 'http-cobol'") as error:
        new_app("cat", str(tmp_path), template="http-cobol")
    assert "command, http-" in error.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", "Cat", "cat_door", "-cat", "cat-", "9cats", "fn", "test", "core", "a/b", "..", "a" * 64]
)
def test_a_name_that_pod_or_crate_cannot_bear_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        new_app(name, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        new_app("cat", str(tmp_path))
    assert list((tmp_path / "cat").iterdir()) == []
