/* SPDX-License-Identifier: MIT */
/*
 * Truth lines for C workers, the same that truth.py writes. Called with
 * argv[0] the role (also the comm), argv[1] the truth file. Descriptor 4 is the
 * wire to the stage: one JSON message a packet.
 */
#ifndef TRUTH_H
#define TRUTH_H
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_COOKIE
#define SO_COOKIE 57
#endif
#define WIRE 4

static int truth_fd = -1;
static const char *truth_role = "?";

static inline void fail(const char *what)
{
	fprintf(stderr, "%s: %s: %s\n", truth_role, what, strerror(errno));
	_exit(1);
}

static inline uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

static inline void truth_open(char **argv)
{
	truth_role = argv[0];
	prctl(PR_SET_NAME, argv[0]);
	truth_fd = open(argv[1], O_WRONLY | O_APPEND | O_CLOEXEC);
	if (truth_fd < 0)
		fail(argv[1]);
}

/* Pid in the initial namespace and start time, from its own mount of /proc. */
static inline void truth_me(int *pid, unsigned long long *start, char *comm)
{
	char text[1024], *p;
	int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (n <= 0)
		fail("/proc/self/stat");
	close(fd);
	text[n] = 0;
	*pid = atoi(text);
	p = strrchr(text, ')');
	*p = 0;
	snprintf(comm, 16, "%s", strchr(text, '(') + 1);
	p += 2;
	for (int field = 3; field < 22; field++)
		p = strchr(p, ' ') + 1;
	*start = strtoull(p, NULL, 10);
}

struct claim {
	const char *proto;	/* "tcp" or "udp" */
	uint64_t t0;		/* 0: now */
	int len;		/* IP length, 0: any */
	int out, in;
	int exact;
	int remote;		/* also the connected peer's address */
};

static inline void address(struct sockaddr_storage *ss, char *text, int *port)
{
	if (ss->ss_family == AF_INET) {
		struct sockaddr_in *sin = (void *)ss;

		inet_ntop(AF_INET, &sin->sin_addr, text, INET6_ADDRSTRLEN);
		*port = ntohs(sin->sin_port);
	} else {
		struct sockaddr_in6 *sin6 = (void *)ss;

		inet_ntop(AF_INET6, &sin6->sin6_addr, text, INET6_ADDRSTRLEN);
		*port = ntohs(sin6->sin6_port);
	}
	if (!strcmp(text, "0.0.0.0") || !strcmp(text, "::"))
		text[0] = 0;
}

static inline void truth_claim(int sock, struct claim c)
{
	char laddr[INET6_ADDRSTRLEN] = "", raddr[INET6_ADDRSTRLEN] = "", comm[16], line[1024], lens[16] = "";
	int pid, n, lport = 0, rport = 0;
	unsigned long long start;
	struct sockaddr_storage ss;
	socklen_t size = sizeof(ss);
	uint64_t cookie = 0;
	struct stat st;

	truth_me(&pid, &start, comm);
	if (getsockname(sock, (void *)&ss, &size))
		fail("getsockname");
	address(&ss, laddr, &lport);
	size = sizeof(ss);
	if (c.remote && !getpeername(sock, (void *)&ss, &size))
		address(&ss, raddr, &rport);
	size = sizeof(cookie);
	getsockopt(sock, SOL_SOCKET, SO_COOKIE, &cookie, &size);
	if (stat("/proc/thread-self/ns/net", &st))
		fail("ns/net");
	if (c.len)
		snprintf(lens, sizeof(lens), "%d", c.len);
	n = snprintf(line, sizeof(line),
		     "{\"ev\":\"claim\",\"ident\":\"c%d.%llu\",\"role\":\"%s\",\"pid\":%d,"
		     "\"start\":%llu,\"comm\":\"%s\",\"netns\":%llu,\"proto\":\"%s\","
		     "\"laddr\":\"%s\",\"lport\":%d,\"raddr\":\"%s\",\"rport\":%d,"
		     "\"lens\":[%s],\"t0\":%llu,\"cookies\":[%llu],\"out\":%d,\"in_\":%d,"
		     "\"reasons\":[],\"flags\":[],\"exact\":%s}\n",
		     pid, (unsigned long long)now_ns(), truth_role, pid, start, comm,
		     (unsigned long long)st.st_ino, c.proto, laddr, lport, raddr, rport, lens,
		     (unsigned long long)(c.t0 ? c.t0 : now_ns()), (unsigned long long)cookie,
		     c.out, c.in, c.exact ? "true" : "false");
	if (write(truth_fd, line, n) != n)
		fail("truth");
}

/* Tell the stage a number. */
static inline void tell(int number)
{
	char text[16];
	int n = snprintf(text, sizeof(text), "%d", number);

	if (send(WIRE, text, n, 0) != n)
		fail("wire");
}

static inline void hear(void)
{
	char text[256];

	if (recv(WIRE, text, sizeof(text), 0) <= 0)
		fail("wire");
}

static inline struct sockaddr_in loopback(int port)
{
	struct sockaddr_in sin = {
		.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	return sin;
}

/* A socket bound to 127.0.0.1, on a port of the kernel's choice if 0. */
static inline int bound(int type, int port)
{
	struct sockaddr_in sin = loopback(port);
	int sock = socket(AF_INET, type | SOCK_CLOEXEC, 0);

	if (sock < 0 || bind(sock, (void *)&sin, sizeof(sin)))
		fail("bind");
	return sock;
}
#endif
