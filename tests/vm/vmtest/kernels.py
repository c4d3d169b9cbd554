# SPDX-License-Identifier: MIT
"""The kernels under test, from Debian's suites: downloaded and unpacked, never installed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "KERNELS",
    "MATRIX",
    "Kernel",
    "Unavailable",
    "UnpackedKernel",
    "cache_directory",
    "enter",
    "proxy_options",
    "unpack",
]

TOOLCHAIN = ("gcc", "make", "binutils", "mawk", "dash", "coreutils", "grep", "sed", "sparse")


# What compiles a kernel, besides.
COMPILING = (
    *("bc", "bison", "cpio", "diffutils", "findutils", "flex", "gzip", "kmod"),
    *("libelf-dev", "libssl-dev", "perl", "tar", "xz-utils"),
)
# What finds data races. It knows no other bugs: KASAN and it exclude each other.
RACE_OPTIONS = """\
CONFIG_LOCALVERSION="-races"
CONFIG_KCSAN=y
CONFIG_KCSAN_SKIP_WATCH=1000
"""
# What finds other bugs. Not PROVE_RAW_LOCK_NESTING: 6.1's printk() to a serial console fails it at
# boot; then lockdep is off.
DEBUG_OPTIONS = """\
CONFIG_LOCALVERSION="-debug"
CONFIG_KASAN=y
CONFIG_KASAN_INLINE=y
CONFIG_KASAN_VMALLOC=y
CONFIG_PROVE_LOCKING=y
CONFIG_RCU_EXPERT=y
CONFIG_PROVE_RCU_LIST=y
CONFIG_DEBUG_OBJECTS=y
CONFIG_DEBUG_OBJECTS_RCU_HEAD=y
CONFIG_DEBUG_OBJECTS_TIMERS=y
CONFIG_DEBUG_OBJECTS_WORK=y
CONFIG_DEBUG_KMEMLEAK=y
CONFIG_DEBUG_KMEMLEAK_MEM_POOL_SIZE=40000
# CONFIG_DEBUG_KMEMLEAK_AUTO_SCAN is not set
CONFIG_DEBUG_ATOMIC_SLEEP=y
CONFIG_DEBUG_LIST=y
CONFIG_SOFTLOCKUP_DETECTOR=y
CONFIG_DETECT_HUNG_TASK=y
CONFIG_FAULT_INJECTION=y
CONFIG_FAILSLAB=y
CONFIG_FAIL_PAGE_ALLOC=y
CONFIG_FAULT_INJECTION_DEBUG_FS=y
CONFIG_FAULT_INJECTION_STACKTRACE_FILTER=y
"""
# What both need, and what the tests use that defconfig and kvm_guest.config leave out.
TEST_OPTIONS = """\
CONFIG_DEBUG_INFO_NONE=y
CONFIG_MODULES=y
CONFIG_MODULE_UNLOAD=y
CONFIG_KPROBES=y
CONFIG_FUNCTION_TRACER=y
CONFIG_DEBUG_FS=y
CONFIG_CHECKPOINT_RESTORE=y
CONFIG_USER_NS=y
CONFIG_BPF_SYSCALL=y
CONFIG_OVERLAY_FS=y
CONFIG_VIRTIO_CONSOLE=y
CONFIG_IPV6=y
CONFIG_SECURITY_NETWORK=y
CONFIG_MPTCP=y
CONFIG_MPTCP_IPV6=y
CONFIG_INET_DIAG=y
CONFIG_INET_UDP_DIAG=y
CONFIG_INET_DIAG_DESTROY=y
CONFIG_DUMMY=y
CONFIG_TUN=y
CONFIG_VETH=y
CONFIG_VXLAN=y
CONFIG_NETFILTER_ADVANCED=y
CONFIG_NF_CONNTRACK=y
CONFIG_NF_TABLES=y
CONFIG_NF_TABLES_INET=y
CONFIG_NF_TABLES_IPV4=y
CONFIG_NF_TABLES_IPV6=y
CONFIG_NFT_CT=y
CONFIG_NFT_NAT=y
CONFIG_NFT_MASQ=y
CONFIG_NFT_REDIR=y
CONFIG_NFT_REJECT=y
CONFIG_NFT_QUEUE=y
CONFIG_NETFILTER_NETLINK_QUEUE=y
CONFIG_NFT_TPROXY=m
CONFIG_NFT_SOCKET=m
CONFIG_NET_VRF=m
CONFIG_NET_L3_MASTER_DEV=y
CONFIG_IP_ADVANCED_ROUTER=y
CONFIG_IP_MULTIPLE_TABLES=y
CONFIG_IPV6_MULTIPLE_TABLES=y
CONFIG_CONFIGFS_FS=y
CONFIG_KPROBE_EVENTS=y
CONFIG_CGROUP_BPF=y
CONFIG_MEMCG=y
CONFIG_IPVLAN=m
CONFIG_MACVLAN=m
CONFIG_BRIDGE=m
CONFIG_INET_ESP=m
CONFIG_INET_AH=m
CONFIG_INET_IPCOMP=m
CONFIG_INET6_IPCOMP=m
CONFIG_LWTUNNEL=y
CONFIG_IPV6_SEG6_LWTUNNEL=y
CONFIG_L2TP=m
CONFIG_L2TP_V3=y
CONFIG_L2TP_ETH=m
CONFIG_AF_KCM=m
CONFIG_XFRM_USER=y
CONFIG_TLS=m
CONFIG_NET_IPIP=m
CONFIG_NET_FOU=m
CONFIG_NET_FOU_IP_TUNNELS=y
CONFIG_IP_VS=m
CONFIG_IP_VS_PROTO_TCP=y
CONFIG_IP_VS_RR=m
CONFIG_BLK_DEV_NBD=m
CONFIG_NFS_FS=m
CONFIG_NFS_V4=m
CONFIG_NFSD=m
CONFIG_NFSD_V4=y
CONFIG_NVME_TARGET=m
CONFIG_NVME_TARGET_TCP=m
# CONFIG_CPU_MITIGATIONS is not set
# CONFIG_RANDOMIZE_BASE is not set
# CONFIG_STACKPROTECTOR is not set
# CONFIG_IA32_EMULATION is not set
# CONFIG_KEXEC is not set
# CONFIG_CRASH_DUMP is not set
# CONFIG_SWAP is not set
# CONFIG_MICROCODE is not set
# CONFIG_PERF_EVENTS_INTEL_UNCORE is not set
# CONFIG_PERF_EVENTS_INTEL_RAPL is not set
# CONFIG_PERF_EVENTS_INTEL_CSTATE is not set
# CONFIG_PERF_EVENTS_AMD_UNCORE is not set
# CONFIG_ACPI_AC is not set
# CONFIG_ACPI_BATTERY is not set
# CONFIG_ACPI_VIDEO is not set
# CONFIG_ACPI_FAN is not set
# CONFIG_ACPI_DOCK is not set
# CONFIG_ACPI_THERMAL is not set
# CONFIG_ACPI_CONTAINER is not set
# CONFIG_HOTPLUG_PCI is not set
# CONFIG_PCIEPORTBUS is not set
# CONFIG_EFI_PARTITION is not set
# CONFIG_BLK_DEV_LOOP is not set
# CONFIG_MQ_IOSCHED_KYBER is not set
# CONFIG_PHYLIB is not set
# CONFIG_FIXED_PHY is not set
# CONFIG_INPUT_MOUSE is not set
# CONFIG_INPUT_JOYSTICK is not set
# CONFIG_INPUT_TABLET is not set
# CONFIG_INPUT_TOUCHSCREEN is not set
# CONFIG_INPUT_MISC is not set
# CONFIG_INPUT_EVDEV is not set
# CONFIG_SERIAL_8250_EXTENDED is not set
# CONFIG_SERIAL_NONSTANDARD is not set
# CONFIG_HW_RANDOM is not set
# CONFIG_I2C is not set
# CONFIG_HWMON is not set
# CONFIG_THERMAL is not set
# CONFIG_WATCHDOG is not set
# CONFIG_NEW_LEDS is not set
# CONFIG_RTC_CLASS is not set
# CONFIG_DMADEVICES is not set
# CONFIG_SURFACE_PLATFORMS is not set
# CONFIG_X86_PLATFORM_DEVICES is not set
# CONFIG_MAILBOX is not set
# CONFIG_IOMMU_SUPPORT is not set
# CONFIG_EXT4_FS is not set
# CONFIG_AUTOFS_FS is not set
# CONFIG_AUTOFS4_FS is not set
# CONFIG_ISO9660_FS is not set
# CONFIG_MSDOS_FS is not set
# CONFIG_VFAT_FS is not set
# CONFIG_NETLABEL is not set
# CONFIG_IP6_NF_IPTABLES is not set
# CONFIG_IP_NF_IPTABLES is not set
# CONFIG_CRYPTO_HW is not set
# CONFIG_PTP_1588_CLOCK is not set
# CONFIG_POWER_SUPPLY is not set
# CONFIG_BACKLIGHT_CLASS_DEVICE is not set
# CONFIG_INIT_STACK_ALL_ZERO is not set
# CONFIG_CPU_IDLE is not set
# CONFIG_VIRTIO_INPUT is not set
# CONFIG_EDAC is not set
# CONFIG_RD_BZIP2 is not set
# CONFIG_RD_LZMA is not set
# CONFIG_RD_LZO is not set
# CONFIG_RD_LZ4 is not set
CONFIG_INIT_STACK_NONE=y
# CONFIG_DRM is not set
# CONFIG_SOUND is not set
# CONFIG_USB_SUPPORT is not set
# CONFIG_WIRELESS is not set
# CONFIG_WLAN is not set
# CONFIG_RFKILL is not set
# CONFIG_ETHERNET is not set
# CONFIG_ATA is not set
# CONFIG_SCSI is not set
# CONFIG_MD is not set
CONFIG_9P_FS=y
# CONFIG_SUSPEND is not set
# CONFIG_HIBERNATION is not set
# CONFIG_HID is not set
# CONFIG_PCCARD is not set
# CONFIG_AGP is not set
# CONFIG_EFI is not set
# CONFIG_SECURITY_SELINUX is not set
# CONFIG_AUDIT is not set
# CONFIG_CPU_FREQ is not set
# CONFIG_X86_MCE is not set
# CONFIG_MACINTOSH_DRIVERS is not set
# CONFIG_QUOTA is not set
# CONFIG_NETCONSOLE is not set
# CONFIG_BLK_DEV_IO_TRACE is not set
# CONFIG_PROVIDE_OHCI1394_DMA_INIT is not set
"""


class Unavailable(Exception):
    """This kernel cannot be had now; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel to test on: where Debian keeps it.

    `suite` is the suite its packages and compiler come from, `pockets` further suites of the same
    archive. `version` is the infix of its meta-packages. With `options` Debian's source of it
    is compiled with them (ten minutes, once).
    """

    name: str
    suite: str
    pockets: tuple[str, ...] = ()
    version: str = ""
    options: str = ""

    @property
    def series(self) -> str:
        """What its release must begin with: the name up to the suite that tells it from others."""
        return self.name.partition("-")[0]

    def packages(self) -> tuple[str, ...]:
        if self.options:
            return (f"linux-source-{self.version}", *COMPILING)
        infix = f"{self.version}-" if self.version else ""
        return (f"linux-image-{infix}amd64", f"linux-headers-{infix}amd64")


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("5.10", "bullseye"),
        Kernel("6.1", "bookworm"),
        Kernel("6.12-deb12", "bookworm", version="6.12"),
        Kernel("6.12-deb13", "trixie"),
        Kernel("7.2", "sid"),
        Kernel("7.3", "trixie", pockets=("trixie-backports",)),
        Kernel("6.1-debug", "bookworm", version="6.1", options=DEBUG_OPTIONS),
        Kernel("6.1-races", "bookworm", version="6.1", options=RACE_OPTIONS),
    )
}
MATRIX = tuple(name for name, kernel in KERNELS.items() if not kernel.options)


@dataclass(frozen=True, slots=True)
class UnpackedKernel:
    """A kernel in the cache: its root directory, and its release as `uname -r` tells it."""

    name: str
    root: Path
    release: str

    @property
    def image(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.release}"


def cache_directory() -> Path:
    """PACKET_HUNTER_CACHE, or packet-hunter in the user's cache directory."""
    chosen = os.environ.get("PACKET_HUNTER_CACHE")
    if chosen:
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "packet-hunter"


def unpack(kernel: Kernel, cache: Path) -> UnpackedKernel:
    """The kernel from the cache, or downloaded into it first (about 20 s, 0.8 GB).

    :raises Unavailable: it is not in the cache, and the mirror lacks it or cannot be reached.
    """
    root = cache / "kernels" / kernel.name
    root.parent.mkdir(parents=True, exist_ok=True)
    with _locked(root.with_name(f"{kernel.name}.lock")):
        if not root.is_dir():
            _download(kernel, root)
    return _unpacked(kernel, root)


def _unpacked(kernel: Kernel, root: Path) -> UnpackedKernel:
    images = sorted((root / "boot").glob("vmlinuz-*"), reverse=True)
    for image in images:
        release = image.name.removeprefix("vmlinuz-")
        built = (root / "lib/modules" / release / "build").is_symlink()
        if built and release.startswith(f"{kernel.series}."):
            return UnpackedKernel(kernel.name, root, release)
    found = ", ".join(image.name.removeprefix("vmlinuz-") for image in images) or "none"
    raise Unavailable(
        f"{kernel.name}: Debian {(kernel.suite, *kernel.pockets)[-1]} had no such kernel with"
        f" headers (but {found}); once the mirror has it, remove {root}"
    )


def _download(kernel: Kernel, root: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise Unavailable("mmdebstrap is not installed; ./build.sh --test-tools installs it")
    print(f"vmtest: downloading kernel {kernel.name} (Debian {kernel.suite})", file=sys.stderr)
    started = time.monotonic()
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{kernel.name}.") as scratch:
            target = Path(scratch) / "root"
            target.mkdir()
            error = _unpack_packages(kernel, target)
            if error is None:
                _finish(target)
                if kernel.options:
                    _compile(kernel, target)
                target.rename(root)
                print(f"vmtest: took {time.monotonic() - started:.0f} s", file=sys.stderr)
                return
        if attempt == 1:
            print(f"vmtest: {error}; trying once more", file=sys.stderr)
    raise Unavailable(f"{kernel.name}: {error}")


def _unpack_packages(kernel: Kernel, target: Path) -> str | None:
    """Returns None, or why it failed.

    mmdebstrap writes a tar file and we unpack it as ourselves: the same way with and without root,
    and files that their user can delete.
    """
    command = [
        "mmdebstrap",
        "--variant=extract",
        f"--include={','.join((*kernel.packages(), *TOOLCHAIN))}",
        # A frozen mirror, as companies keep them, serves expired Release files.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        *proxy_options(),
        *(_pocket_option(kernel.suite, pocket) for pocket in kernel.pockets),
        kernel.suite,
        "-",
        *filter(None, [os.environ.get("PACKET_HUNTER_MIRROR")]),
    ]
    untar = ["tar", "-x", "-C", str(target), "--no-same-owner", "--exclude=./dev/*"]
    with tempfile.TemporaryFile() as log:
        pack = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert pack.stdout is not None
        unpacked = subprocess.run(untar, stdin=pack.stdout, stderr=subprocess.PIPE, text=True)
        pack.stdout.close()
        failed = pack.wait() != 0
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    if failed:
        errors = [line for line in lines if re.match(r"(E:|W: Fail|Err)", line)]
        return f"mmdebstrap {kernel.suite}: {(errors or lines or ['failed'])[0].strip()}"
    if unpacked.returncode != 0:
        return f"tar: {unpacked.stderr.strip().splitlines()[-1]}"
    return None


def _pocket_option(suite: str, pocket: str) -> str:
    """Adds a pocket to the sources mmdebstrap chose, whatever mirror that is.

    Backports are pinned low by their archive; here the newest kernel is wanted, with what it
    needs of its own suite. The compiler may come from either.
    """
    script = (
        f'sed -n "s/ {suite} / {pocket} /p" "$1"/etc/apt/sources.list'
        f' > "$1"/etc/apt/sources.list.d/{pocket}.list;'
        f' printf "Package: linux-*\\nPin: release n={pocket}\\nPin-Priority: 900\\n"'
        ' > "$1"/etc/apt/preferences.d/pocket'
    )
    return f"--setup-hook={script}"


def proxy_options() -> Iterator[str]:
    """mmdebstrap does not read the host's apt configuration: hand on its proxies."""
    if shutil.which("apt-config") is None:
        return
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout
    for line in dump.splitlines():
        if re.match(r'Acquire::(http|https)::proxy "[^"]+";', line, re.IGNORECASE):
            yield f"--aptopt={line.rstrip(';')}"


def _finish(root: Path) -> None:
    """What maintainer scripts would have done, as far as a build needs it."""
    # From Debian 13 on only base-files, which nothing here asks for, has these links.
    for name in ("bin", "sbin", "lib", "lib64"):
        if not os.path.lexists(root / name) and (root / "usr" / name).is_dir():
            (root / name).symlink_to(f"usr/{name}")
    for name, target in (("usr/bin/awk", "mawk"), ("usr/bin/sh", "dash"), ("bin/sh", "dash")):
        link = root / name
        if not os.path.lexists(link) and link.parent.is_dir():
            link.symlink_to(target)
    for name in ("proc", "dev", "tmp", "src", "boot"):
        (root / name).mkdir(exist_ok=True)
    # 7.x comes with its image among its modules.
    for image in (root / "lib/modules").glob("*/vmlinuz"):
        shutil.copy(image, root / "boot" / f"vmlinuz-{image.parent.name}")


def _compile(kernel: Kernel, root: Path) -> None:
    """Debian's source -> boot/vmlinuz-* and lib/modules/*, with all that builds modules for it."""
    print(f"vmtest: compiling {kernel.name}, about ten minutes", file=sys.stderr)
    (root / "src/debug.config").write_text(kernel.options + TEST_OPTIONS)
    script = f"""set -e
        tar -xf /usr/src/linux-source-{kernel.version}.tar.xz -C /usr/src
        cd /usr/src/linux-source-{kernel.version}
        # fault injection by call chain: allowed on x86 from 6.2 on, with the same unwinder
        sed -i "/^config FAULT_INJECTION_STACKTRACE_FILTER/,/help/s/depends on !X86_64//" \\
            lib/Kconfig.debug
        make defconfig kvm_guest.config
        cat /src/debug.config >> .config
        make olddefconfig
        make -j"$(($(nproc) + 1))" bzImage modules
        make modules_install
        release=$(make -s kernelrelease)
        cp arch/x86/boot/bzImage /boot/vmlinuz-$release
        rm -f vmlinux.o vmlinux.a /usr/src/*.tar.xz
        find . -name "*.[oa]" -not -path "./tools/*" -not -path "./scripts/*" -delete
    """
    log = root.parent / "log"
    with log.open("w") as output:
        done = enter(root, ["sh", "-c", script], stdout=output, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise Unavailable(f"{kernel.name} does not compile:\n{log.read_text()[-5000:]}")


def enter(
    root: Path, command: Sequence[str], binds: Mapping[str, Path] | None = None, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Runs a command in `root`, whose paths in `binds` show other files; `options` are run's."""
    # objtool of 7.x wants /proc, gcc wants /dev/null. All mounts end with the namespace.
    script = (
        "root=$1; shift"
        ' && mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev" || exit 1;'
        ' while [ "$1" != -- ]; do mount --bind "$2" "$root$1" || exit 1; shift 2; done;'
        ' shift; exec chroot "$root" "$@"'
    )
    wrapper = ["unshare", "--mount", "--pid", "--fork"]
    if os.geteuid() != 0:
        wrapper.append("--map-root-user")
    wrapper += ["sh", "-c", script, "sh", str(root)]
    for shown, file in (binds or {}).items():
        wrapper += [shown, str(file)]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    return subprocess.run(
        [*wrapper, "--", *command], stdin=subprocess.DEVNULL, env=environment, **options
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One download at a time of the same kernel, however many runs want it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
