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

/* Read a file of a process; bytes, and a NUL behind them, or -errno. */
static int read_of(const char *proc, uint32_t pid, const char *name, char *buf, uint32_t size)
{
	char path[512];
	int n;

	snprintf(path, sizeof(path), "%s/%u/%s", proc, pid, name);
	n = host_read(path, buf, size - 1);
	buf[n > 0 ? n : 0] = 0;
	return n;
}

/* The number at `text`, which ends at a blank, a newline or the text's end; 0: there is none. */
static int number_at(const char *text, uint64_t *number)
{
	char *end;

	if (*text < '0' || *text > '9')
		return 0;
	*number = strtoull(text, &end, 10);
	return !*end || *end == ' ' || *end == '\n';
}

int host_parse_stat(struct host_owner *one, const char *text, uint32_t size)
{
	const char *comm = memchr(text, '(', size), *end = memrchr(text, ')', size), *field;
	uint64_t ppid = 0;
	uint32_t len;

	/* comm may hold blanks, newlines and parentheses of its own; no field behind it does */
	if (!comm || !end || end < comm)
		return 0;
	len = (uint32_t)(end - ++comm);
	if (len > sizeof(one->comm))
		len = sizeof(one->comm);
	field = end + 1;
	for (int number = 3; number <= 22; number++) {
		field = strchr(field, ' ');
		if (!field || (number == 4 && !number_at(field + 1, &ppid)))
			return 0;
		field++;
	}
	if (!number_at(field, &one->start_ticks))
		return 0;
	one->ppid = (uint32_t)ppid;
	memcpy(one->comm, comm, len);
	one->comm_len = len;
	return 1;
}

int host_stat(const char *proc, struct host_owner *one)
{
	char buf[4096];
	int size = read_of(proc, one->pid, "stat", buf, sizeof(buf));

	if (size < 0)
		return size;
	return host_parse_stat(one, buf, (uint32_t)size) ? 0 : -ESRCH;
}

void host_owners(const char *proc, struct host_owner *some, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		struct host_owner *one = &some[i];
		char buf[4096], *uid = NULL;

		/* newlines in the name, which is above the uids, are escaped */
		if (!host_stat(proc, one) && read_of(proc, one->pid, "status", buf, sizeof(buf)) > 0)
			uid = strstr(buf, "\nUid:\t");
		if (uid)
			one->uid = (uint32_t)strtoul(uid + 6, NULL, 10);
		else
			one->comm_len = UINT32_MAX;
	}
}

void host_net_namespaces(const char *proc, const uint32_t *pids, uint32_t count, uint64_t *inodes)
{
	for (uint32_t i = 0; i < count; i++) {
		char path[512], target[64];
		ssize_t len;

		snprintf(path, sizeof(path), "%s/%u/ns/net", proc, pids[i]);
		len = readlink(path, target, sizeof(target) - 1);
		target[len > 0 ? len : 0] = 0;
		inodes[i] = strncmp(target, "net:[", 5) ? 0 : strtoull(target + 5, NULL, 10);
	}
}

void host_still_held(const char *proc, struct host_held *held, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		char wanted[64], path[512], target[64];
		int want = snprintf(wanted, sizeof(wanted), "socket:[%llu]",
				    (unsigned long long)held[i].inode);
		ssize_t len;

		snprintf(path, sizeof(path), "%s/%u/fd/%u", proc, held[i].pid, held[i].fd);
		len = readlink(path, target, sizeof(target));
		if (len != want || memcmp(target, wanted, want))
			held[i].pid = 0;
	}
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
