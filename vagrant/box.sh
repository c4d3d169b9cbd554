#!/bin/bash
# SPDX-License-Identifier: MIT
# Builds a libvirt box for the Vagrantfile from Debian packages: vagrant/box.sh FILE
#
# Needs root (mount, chroot) and mmdebstrap, extlinux, e2fsprogs, qemu-utils, vagrant (its public key).
# PACKET_HUNTER_MIRROR names another Debian mirror. The box has the packages in vagrant/packages, so
# that a guest without network can build the module; everybody knows its ssh keys, as with any box
# before `vagrant up` replaces them.
set -euo pipefail

usage="usage: vagrant/box.sh FILE"
target=$(realpath -m -- "${1:?$usage}")
here=$(dirname -- "$(realpath -- "$0")")
key=$(find /usr/share/vagrant* /usr/share/rubygems-integration /opt/vagrant \
	-path '*/keys/vagrant.pub' -print -quit 2>/dev/null || true)

[ "$(id -u)" = 0 ] || { echo "box.sh: needs root; run: sudo vagrant/box.sh $1" >&2; exit 1; }
for tool in mmdebstrap:mmdebstrap extlinux:extlinux mke2fs:e2fsprogs qemu-img:qemu-utils; do
	command -v "${tool%:*}" >/dev/null ||
		{ echo "box.sh: ${tool%:*} is missing; run: apt-get install ${tool#*:}" >&2; exit 1; }
done
[ -n "$key" ] || { echo "box.sh: Vagrant's public key is missing; run: apt-get install vagrant" >&2; exit 1; }

scratch=$(mktemp -d "${TMPDIR:-/tmp}/packet-hunter-box.XXXXXX")
root=$scratch/root
finish() {
	if mountpoint -q "$scratch/disk"; then umount "$scratch/disk"; fi
	rm -rf "$scratch"
}
trap finish EXIT

packages=$(sed '/^#/d' "$here/packages" | paste -sd,)
system=systemd-sysv,udev,dbus,initramfs-tools,lz4,openssh-server,sudo,rsync,ca-certificates

# What has to be there before the kernel's initramfs is made: small, and quick to unpack.
setup=$scratch/setup
cat >"$setup" <<'SETUP'
set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=lz4\n' >"$1/etc/initramfs-tools/conf.d/small"
printf '%s\n' virtio_pci virtio_blk virtio_scsi virtio_net ext4 \
	>"$1/usr/share/initramfs-tools/modules.d/virtio"
SETUP

# The user and services Vagrant expects.
customize=$scratch/customize
cat >"$customize" <<'CUSTOMIZE'
set -eu
root=$1 key=$2
chroot "$root" useradd --create-home --shell /bin/bash vagrant
echo 'vagrant:vagrant' | chroot "$root" chpasswd
install -d -m 700 "$root/home/vagrant/.ssh"
install -m 600 "$key" "$root/home/vagrant/.ssh/authorized_keys"
chroot "$root" chown -R vagrant:vagrant /home/vagrant/.ssh
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
chmod 440 "$root/etc/sudoers.d/vagrant"
echo 'UseDNS no' >"$root/etc/ssh/sshd_config.d/vagrant.conf"
echo packet-hunter >"$root/etc/hostname"
printf '127.0.0.1 localhost packet-hunter\n::1 localhost\n' >"$root/etc/hosts"
echo '/dev/vda / ext4 noatime,errors=remount-ro 0 1' >"$root/etc/fstab"
echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' >"$root/etc/systemd/network/80-dhcp.network"
chroot "$root" systemctl --quiet enable systemd-networkd
# Each ssh login would wait for it under emulation.
chroot "$root" systemctl --quiet mask systemd-logind
chroot "$root" systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer fstrim.timer
mkdir -p "$root/boot/extlinux"
cat >"$root/boot/extlinux/extlinux.conf" <<'BOOT'
DEFAULT linux
LABEL linux
  LINUX /vmlinuz
  INITRD /initrd.img
  APPEND root=/dev/vda ro quiet mitigations=off console=tty0 console=ttyS0
BOOT
CUSTOMIZE

proxies=()
while IFS= read -r line; do
	proxies+=("--aptopt=${line%;}")
done < <(apt-config dump | grep -iE '^Acquire::https?::proxy "[^"]' || true)

mmdebstrap --quiet --variant=apt --include="$system,$packages" \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' \
	"${proxies[@]}" \
	--essential-hook="sh $setup \"\$1\"" --customize-hook="sh $customize \"\$1\" $key" \
	bookworm "$root" ${PACKET_HUNTER_MIRROR:+"$PACKET_HUNTER_MIRROR"}

# One file system on the whole disk; extlinux sits in the sector before it begins. extlinux does
# not read the two features that are left out.
truncate -s 8G "$scratch/disk.raw"
mke2fs -q -t ext4 -O '^64bit,^metadata_csum' -E root_owner=0:0 -d "$root" "$scratch/disk.raw"
mkdir "$scratch/disk"
mount -o loop "$scratch/disk.raw" "$scratch/disk"
extlinux --install "$scratch/disk/boot/extlinux" >/dev/null 2>&1
umount "$scratch/disk"

qemu-img convert -c -O qcow2 -o compression_type=zstd "$scratch/disk.raw" "$scratch/box.img"
cat >"$scratch/metadata.json" <<'METADATA'
{"provider": "libvirt", "format": "qcow2", "virtual_size": 8, "architecture": "amd64"}
METADATA
: >"$scratch/Vagrantfile"
mkdir -p "$(dirname -- "$target")"
tar -C "$scratch" -cf "$target.new" metadata.json Vagrantfile box.img
mv "$target.new" "$target"
