"""TypeScript of several modules by the real tools: a component that answers. The sample in JavaScript has its demo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wasilet.apps.samples import find_app
from wasilet.build.application import build
from wasilet.build.cargo import CompileError
from wasilet_common.components import read_interfaces

from tests.e2e.guests import needs_node

pytestmark = pytest.mark.e2e

APP = """\
import { greet, type Person } from "./greet.ts";
addEventListener("fetch", (event: FetchEvent) => event.respondWith(answer(event.request)));
async function answer(request: Request): Promise<Response> {
  return new Response(greet({ name: new URL(request.url).pathname } satisfies Person));
}
"""
GREET = """\
export interface Person { readonly name: string }
enum Tone { Loud = "!" }
export const greet = (person: Person): string => `hello ${person.name}${Tone.Loud}`;
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    needs_node()
    made = tmp_path / "greeter"
    made.mkdir()
    (made / "app.ts").write_text(APP)
    (made / "greet.ts").write_text(GREET)
    (made / "demo.yaml").write_text("description: greets\nmanifests: []\n")
    return made


def test_typescript_of_several_modules_becomes_a_server(folder: Path) -> None:
    built = build(find_app(str(folder)), say=lambda _: None, environ=os.environ)
    assert built.target == "wasip2"
    with built.module.open("rb") as file:
        interfaces = read_interfaces(file)
    assert interfaces.is_server
    assert not [name for name in interfaces.imports if "sockets" in name], "it has what it imports, and no more"


def test_an_import_that_leads_nowhere_is_named_with_its_line(folder: Path) -> None:
    (folder / "greet.ts").write_text('import { readFileSync } from "node:fs";\n' + GREET + "readFileSync;\n")
    with pytest.raises(CompileError, match=r"Could not resolve 'node:fs' in greet.ts"):
        build(find_app(str(folder)), say=lambda _: None, environ=os.environ)
