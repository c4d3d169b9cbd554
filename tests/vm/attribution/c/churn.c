// SPDX-License-Identifier: MIT
/*
 * churn CPU COUNT: COUNT sockets that live for a moment, made and let go of on
 * one CPU. Of ten, eight are UDP's that send one datagram; the others are the
 * ends of a TCP connection, which one of them resets: a FIN would leave a
 * TIME_WAIT, rightly kept. UDP's go by close(), dup2(), close_range() and with
 * their process in turn.
 */
#include "truth.h"
#include <sched.h>

#define ROUND	8	/* UDP sockets that are open at once */

static int room;	/* sockets get this descriptor and those after it, nothing else has them */

static void udp(const struct sockaddr_in *nobody)
{
	for (int i = 0; i < ROUND; i++) {
		int sock = socket(AF_INET, SOCK_DGRAM, 0);

		if (sock != room + i)
			fail("socket");
		/* what came back to another one's port makes it fail */
		sendto(sock, "x", 1, 0, (void *)nobody, sizeof(*nobody));
	}
}

static void let_go(int way)
{
	int status;
	pid_t pid;

	switch (way) {
	case 0:
		for (int i = 0; i < ROUND; i++)
			close(room + i);
		break;
	case 1:
		for (int i = 0; i < ROUND; i++)
			if (dup2(0, room + i) < 0)
				fail("dup2");
		syscall(SYS_close_range, room, room + ROUND - 1, 0);
		break;
	case 2:
		if (syscall(SYS_close_range, room, room + ROUND - 1, 0))
			fail("close_range");
		break;
	default:
		/* a child has them last */
		pid = fork();
		if (pid < 0)
			fail("fork");
		if (!pid)
			_exit(0);
		for (int i = 0; i < ROUND; i++)
			close(room + i);
		if (waitpid(pid, &status, 0) != pid)
			fail("waitpid");
	}
}

static void tcp(int listener, const struct sockaddr_in *where, int number)
{
	struct linger reset = { .l_onoff = 1 };
	int client = socket(AF_INET, SOCK_STREAM, 0), peer, last;

	if (client < 0 || connect(client, (void *)where, sizeof(*where)))
		fail("connect");
	peer = accept(listener, NULL, NULL);
	if (peer < 0)
		fail("accept");
	last = number % 2 ? client : peer;
	setsockopt(last, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(last);
	close(client == last ? peer : client);
}

int main(int argc, char **argv)
{
	struct sockaddr_in nobody = loopback(9), where;
	socklen_t size = sizeof(where);
	int listener, count, way;
	cpu_set_t cpus;

	if (argc != 3)
		return 2;
	CPU_ZERO(&cpus);
	CPU_SET(atoi(argv[1]), &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		fail("sched_setaffinity");
	count = atoi(argv[2]);
	if (syscall(SYS_close_range, 3, ~0U, 0))
		fail("close_range");
	listener = bound(SOCK_STREAM, 0);
	if (listen(listener, 8) || getsockname(listener, (void *)&where, &size))
		fail("listen");
	room = listener + 1;
	for (int i = 0; i < count / (ROUND + 2); i++) {
		way = i % 100 ? i % 3 : 3;
		udp(&nobody);
		let_go(way);
		tcp(listener, &where, i);
	}
	return 0;
}
