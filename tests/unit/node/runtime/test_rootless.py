from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wasilet_node.runtime import rootless

from tests.ordinary_user import ordinary_user

pytestmark = pytest.mark.unit

needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="another user is made by root")


@pytest.mark.parametrize(
    ("sysctl", "value", "words"),
    [
        ("user/max_user_namespaces", "0", "user.max_user_namespaces is 0"),
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone is 0"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns is 1"),
        ("user/max_user_namespaces", "100", "ordinary users may make no networks in user namespaces: Operation not"),
    ],
)
def test_the_reason_names_the_sysctl_that_forbids_it(tmp_path: Path, sysctl: str, value: str, words: str) -> None:
    (tmp_path / sysctl).parent.mkdir(parents=True)
    (tmp_path / sysctl).write_text(f"{value}\n")
    reason = rootless._reason(PermissionError(errno.EPERM, os.strerror(errno.EPERM)), tmp_path)
    assert words in reason
    assert "\n" not in reason


@needs_root
def test_where_no_user_namespace_may_be_made_the_trial_says_so() -> None:
    """The limit is one of the test's own user namespace."""
    trial = f"{sys.executable} -P -m wasilet_node.runtime.rootless"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", f"echo 0 > /proc/sys/user/max_user_namespaces; {trial}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == (
        "user namespaces are switched off (user.max_user_namespaces is 0)\n",
        1,
    ), done.stderr


@needs_root
def test_an_ordinary_user_has_rights_inside_and_what_it_executes_has_them_only_when_they_are_passed_on() -> None:
    program = (
        "import os, subprocess; from wasilet_node.runtime import linux, rootless\n"
        "def held(): return subprocess.run(['grep', 'CapEff', '/proc/self/status'], stdout=-1).stdout.split()[1]\n"
        "before = os.getuid(); rootless.make(); linux.keep_only_capabilities(rootless.RIGHTS)\n"
        "nested = subprocess.run(['unshare', '--user', 'true'], stderr=-3).returncode\n"
        "plain = held()\n"
        "with rootless.passing_on(): passed = held()\n"
        "print(os.getuid() == before, rootless.is_inside(), nested != 0)\n"
        "print(int(plain, 16), int(passed, 16), int(held(), 16))"
    )
    with ordinary_user() as user:
        said = user.run(sys.executable, "-P", "-c", program).split()
    rights = sum(1 << right for right in rootless.RIGHTS)
    assert said == ["True", "True", "True", "0", str(rights), "0"]


@needs_root
def test_root_is_never_taken_for_such_a_user() -> None:
    assert not rootless.is_inside()
