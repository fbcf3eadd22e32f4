# What every machine of this rig begins with: file systems, a folder that can be written, version 2 alone.
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/mnt TMPDIR=/mnt PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /mnt
