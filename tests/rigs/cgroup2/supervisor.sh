# The supervisor's own tests, in a group that was delegated to whoever runs them.
. "$REPOSITORY/tests/rigs/cgroup2/machine.sh"
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/rig.slice/delegated
echo "+memory +cpu" > /sys/fs/cgroup/cgroup.subtree_control
echo "+memory +cpu" > /sys/fs/cgroup/rig.slice/cgroup.subtree_control
cd "$REPOSITORY" || exit
sh -c 'echo $$ > /sys/fs/cgroup/rig.slice/delegated/cgroup.procs
       exec "$PYTHON" -P -m pytest -q -rs -p no:cacheprovider --basetemp=/mnt/pytest tests/unit/node/runtime/test_supervisor.py -k "$SELECTION"' \
  > /mnt/out 2>&1 && grep -q ' passed' /mnt/out && ! grep -q skipped /mnt/out && echo "$PASSED" >> /mnt/out
cat /mnt/out
echo o > /proc/sysrq-trigger
sleep 10
