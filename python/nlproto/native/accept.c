/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared_proto.h"
#include "host.h"

#ifndef SO_PEERGROUPS
#define SO_PEERGROUPS 59
#endif

static int is_among(const uint32_t *some, uint32_t count, uint32_t one)
{
	for (uint32_t i = 0; i < count; i++) {
		if (some[i] == one)
			return 1;
	}
	return 0;
}

/* Is the peer one of `shut` and not in the group? An unknown peer is let through. */
static int is_shut_out(int fd, const uint32_t *shut, uint32_t count, int64_t group)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);
	uint32_t groups[256];

	if (!count || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) ||
	    !is_among(shut, count, peer.uid))
		return 0;
	if (group < 0)
		return 1;
	size = sizeof(groups);
	if (peer.gid == group || getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &size))
		return 0;
	return !is_among(groups, size / sizeof(*groups), (uint32_t)group);
}

int host_accept(int listener, int *fds, uint32_t max, const uint32_t *shut, uint32_t shut_count,
		int64_t group, uint32_t *refused)
{
	uint32_t n = 0;

	for (*refused = 0; n + *refused < max;) {
		int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (fd >= 0 && is_shut_out(fd, shut, shut_count, group)) {
			close(fd);
			++*refused;
		} else if (fd >= 0) {
			fds[n++] = fd;
		} else if (errno != EINTR && errno != ECONNABORTED) {
			return n || *refused ? (int)n : -errno;
		}
	}
	return (int)n;
}

void host_close(const int *fds, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		close(fds[i]);
}
