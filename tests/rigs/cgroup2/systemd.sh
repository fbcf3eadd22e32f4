# systemd as the first process; a service that keeps a container is restarted, stopped, and its containers after it.
. "$REPOSITORY/tests/rigs/cgroup2/machine.sh"
mkdir -p /run/systemd/system
cat > /run/systemd/system/wasilet-rig.service <<UNIT
[Service]
Type=exec
Environment=HOME=/mnt TMPDIR=/mnt PYTHONDONTWRITEBYTECODE=1
WorkingDirectory=$REPOSITORY
ExecStart="$PYTHON" -m tests.rigs.cgroup2.service /mnt/data /mnt/seen
KillMode=process
Delegate=yes
$HARDENING
UNIT
cat > /run/systemd/system/rig.service <<UNIT
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
Environment="PASSED=$PASSED"
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
ExecStart=/bin/sh $REPOSITORY/tests/rigs/cgroup2/restart.sh
ExecStopPost=/bin/sh -c "echo o > /proc/sysrq-trigger; sleep 10"
UNIT
printf '[Unit]\nDefaultDependencies=no\nWants=rig.service\n' > /run/systemd/system/rig.target
exec /lib/systemd/systemd --system --unit=rig.target --show-status=0 --log-level=warning --log-target=console
