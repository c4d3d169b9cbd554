/* SPDX-License-Identifier: MIT */
/* Descriptors and namespaces of processes. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shared_proto.h"
#include "host.h"

int host_setns_net(int fd)
{
	return setns(fd, CLONE_NEWNET) ? -errno : 0;
}

/* The sockets in one open /proc/PID/fd, which is closed. */
static uint32_t held_by(DIR *dir, uint32_t pid, struct host_held *held, uint32_t max)
{
	struct dirent *entry;
	uint32_t n = 0;

	while (n < max && (entry = readdir(dir))) {
		char target[64];
		ssize_t len;

		if (entry->d_name[0] == '.')
			continue;
		len = readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1);
		if (len < 9)
			continue;
		target[len] = 0;
		if (strncmp(target, "socket:[", 8))
			continue;
		held[n].inode = strtoull(target + 8, NULL, 10);
		held[n].fd = (uint32_t)strtoul(entry->d_name, NULL, 10);
		held[n++].pid = pid;
	}
	closedir(dir);
	return n;
}

int host_held_sockets(int procfd, const uint32_t *pids, uint32_t count, struct host_held *held,
		      uint32_t max, uint32_t *refused)
{
	uint32_t n = 0;

	*refused = 0;
	for (uint32_t i = 0; i < count && n < max; i++) {
		char path[32];
		DIR *dir;
		int fd;

		snprintf(path, sizeof(path), "%u/fd", pids[i]);
		fd = openat(procfd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (fd < 0 && (errno == EACCES || errno == EPERM || errno == EMFILE ||
			       errno == ENFILE))
			++*refused;
		if (fd < 0)
			continue;
		dir = fdopendir(fd);
		if (!dir) {
			close(fd);
			++*refused;
			continue;
		}
		n += held_by(dir, pids[i], held + n, max - n);
	}
	return (int)n;
}

int host_read(const char *path, char *buf, uint32_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return -errno;
	n = read(fd, buf, size);
	if (n < 0)
		n = -errno;
	close(fd);
	return (int)n;
}

int host_open_beneath(int directory, const char *path)
{
	struct open_how how = {
		.flags = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV,
	};
	long fd = syscall(SYS_openat2, directory, path, &how, sizeof(how));

	return fd < 0 ? -errno : (int)fd;
}
