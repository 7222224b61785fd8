#!/bin/sh
# Fetch what `make test-numa` needs from Debian or Ubuntu: QEMU (installed, as root) and a kernel (unpacked into $1 only).
set -u
folder=$1
machine=$(uname -m)
if [ "$machine" != x86_64 ]; then
    echo "test-numa: the virtual machine is an x86_64 one, this is $machine" >&2
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "test-numa: no apt-get here; install qemu-system-x86_64 and put a kernel (vmlinuz*) into $folder/boot" >&2
    exit 0
fi
if ! command -v qemu-system-x86_64 >/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends qemu-system-x86
    else
        echo "test-numa: QEMU is missing and only root can install it: sudo apt-get install qemu-system-x86" >&2
    fi
fi
if ! ls "$folder"/boot/vmlinuz* >/dev/null 2>&1; then
    # the meta-package names the current kernel; the unsigned image needs no boot loader around it
    kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: //p' | head -n 1)
    kernel=${kernel:-$(apt-cache depends linux-image-virtual 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9]\)/\1/p' | head -n 1)}
    mkdir -p "$folder/packages"
    if [ -n "$kernel" ] && (cd "$folder/packages" && apt-get download -qq "$kernel"); then
        dpkg-deb --fsys-tarfile "$folder"/packages/linux-image-*.deb | tar -x -C "$folder" --wildcards './boot/vmlinuz*'
    else
        echo "test-numa: no kernel package could be fetched; put a kernel (vmlinuz*) into $folder/boot" >&2
    fi
fi
exit 0
