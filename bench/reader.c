// SPDX-License-Identifier: MIT
/*
 * The cheapest possible reader of a group, reader [packets|flows|unicast]: joins, says so, and throws
 * away what it receives. With unicast it says hello to bench/unicast instead.
 * What a run with it costs more than one without is the module's work for a listener.
 */
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../shared_proto.h"

#define UNICAST_NETLINK	31	/* as in bench/unicast */
#define BUFFER	(16 << 20)

static char buf[128 << 10];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Asks for the family and returns the number of its group @wanted. */
static unsigned int group(int fd, const char *wanted)
{
	struct {
		struct nlmsghdr n;
		struct genlmsghdr g;
		struct nlattr a;
		char name[8];
	} ask = {
		{ sizeof(ask), GENL_ID_CTRL, NLM_F_REQUEST, 1, 0 },
		{ CTRL_CMD_GETFAMILY, 1, 0 },
		{ sizeof(ask.a) + sizeof(ask.name), CTRL_ATTR_FAMILY_NAME },
		SNIFFER_FAMILY,
	};
	struct nlattr *id, *name;
	char *at, *end;
	ssize_t size;

	if (send(fd, &ask, sizeof(ask), 0) < 0 || (size = recv(fd, buf, sizeof(buf), 0)) < 0)
		die("family");
	/* a group's number stands right before its name: no need to walk the nesting */
	for (at = buf, end = buf + size; at + 12 < end; at += 4) {
		id = (struct nlattr *)at;
		name = (struct nlattr *)(at + 8);
		if (id->nla_type == CTRL_ATTR_MCAST_GRP_ID && id->nla_len == 8 &&
		    name->nla_type == CTRL_ATTR_MCAST_GRP_NAME &&
		    !strcmp((char *)(name + 1), wanted))
			return *(unsigned int *)(id + 1);
	}
	fprintf(stderr, "reader: no such group of " SNIFFER_FAMILY "; load sniffer.ko\n");
	exit(1);
}

/* Says hello to the module of bench/unicast. */
static void hello(int fd)
{
	struct nlmsghdr n = { .nlmsg_len = sizeof(n) };
	struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };

	if (sendto(fd, &n, sizeof(n), 0, (void *)&kernel, sizeof(kernel)) < 0)
		die("hello");
}

int main(int argc, char **argv)
{
	int unicast = argc > 1 && !strcmp(argv[1], "unicast");
	int fd = socket(AF_NETLINK, SOCK_RAW, unicast ? UNICAST_NETLINK : NETLINK_GENERIC);
	int size = BUFFER;
	struct sockaddr_nl self = { .nl_family = AF_NETLINK };
	unsigned int number;

	if (fd < 0 || bind(fd, (void *)&self, sizeof(self)))
		die("netlink");
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	number = unicast ? 0 : group(fd, argc > 1 ? argv[1] : SNIFFER_GROUP_PACKETS);
	if (unicast)
		hello(fd);
	else if (setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &number, sizeof(number)))
		die("join");
	puts("joined");
	fflush(stdout);
	while (recv(fd, buf, sizeof(buf), 0) > 0)
		;
	return 0;
}
