"""A memory volume with a size takes no more memory than that, however native code in its pod tries."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from wasilet_node.runtime import user_namespace
from wasilet_node.runtime.protocol import Mount
from wasilet_node.volumes import sized_memory

from tests.attacks.tally import Tally
from tests.attacks.test_sandbox_user import hostile, said, started

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not user_namespace.may_be_had(), reason="only root's memory volumes are held by the kernel"),
]

SIZE = 2**20


async def test_a_memory_volume_holds_what_its_size_says_and_no_more(tmp_path: Path, tally: Tally) -> None:
    rows = yaml.safe_load((Path(__file__).parent / "memory_volume.yaml").read_text())
    volume = tmp_path / "pod" / "volumes" / "memory"
    volume.mkdir(parents=True)
    if not sized_memory.hold_size(volume, SIZE):
        pytest.skip("this process may not mount")
    try:
        async with hostile(tmp_path / "data", "user and root") as rig:
            mounts = (Mount(host=str(volume), guest="/volume"),)
            config, _ = await started(rig, "fill", {"volume": "/mount0", "size": SIZE}, mounts=mounts)
            found = await said(rig, config)
    finally:
        sized_memory.unmount_volumes(tmp_path / "pod")
    assert {name: outcome for name, (outcome, _) in found.items()} == rows
    assert {name: held for name, (_, held) in found.items() if held > SIZE} == {}
    tally.count("refused", len(rows))
