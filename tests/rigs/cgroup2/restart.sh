# Runs under systemd. Each start of the service writes a line to /mnt/seen: the containers that it found, with their pids.
set -e
: > /mnt/seen
lines() {
  for _ in $(seq 1 120); do
    if [ "$(wc -l < /mnt/seen)" -ge "$1" ]; then return; fi
    sleep 0.5
  done
  echo "the service did not come up"
  systemctl status --no-pager wasilet-rig.service || true
  false
}
systemctl start wasilet-rig.service
lines 1
systemctl restart wasilet-rig.service
lines 2
systemctl daemon-reload
cat /mnt/seen
[ "$(sed -n 1p /mnt/seen)" = "$(sed -n 2p /mnt/seen)" ]
grep -q 'running in wasilet-supervisor-[0-9a-f]*\.scope' /mnt/seen
# What the unit takes away is nothing that a sandbox's own fences need.
[ -z "$(grep "name='own [a-z ]*', holds=False" /mnt/seen)" ]
systemctl stop wasilet-rig.service
systemctl --no-legend --no-pager list-units 'wasilet-supervisor-*' | grep -q running
systemctl stop 'wasilet-supervisor-*'
[ -z "$(systemctl --no-legend --no-pager list-units 'wasilet-supervisor-*')" ]
grep -q '"exit_code": 1[34][0-9]' /mnt/data/containers/*/exit.json
echo "$PASSED"
