// SPDX-License-Identifier: MIT
/*
 * One workload, timed from inside and after its setting up: workload NAME COUNT
 * prints nanoseconds per operation. Meant for a guest under `-icount`, where a
 * nanosecond is a fixed number of instructions.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static double start;

static void begin(void)
{
	start = now();
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static struct sockaddr_in address(int port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port) };

	a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	return a;
}

/* One datagram sent and received: two records. */
static void udp(long count)
{
	int in = socket(AF_INET, SOCK_DGRAM, 0), out = socket(AF_INET, SOCK_DGRAM, 0);
	struct sockaddr_in a = address(7201);
	char buf[64] = "";

	if (bind(in, (void *)&a, sizeof(a)) || connect(out, (void *)&a, sizeof(a)))
		die("udp");
	begin();
	while (count--)
		if (send(out, buf, sizeof(buf), 0) < 0 || recv(in, buf, sizeof(buf), 0) < 0)
			die("udp");
}

/* connect, accept, one byte each way, close both. */
static void tcp(long count)
{
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	struct linger reset = { 1, 0 };
	struct sockaddr_in a = address(7202);
	char c = 0;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (void *)&a, sizeof(a)) || listen(listener, 16))
		die("tcp");
	begin();
	while (count--) {
		int client = socket(AF_INET, SOCK_STREAM, 0), server;

		if (connect(client, (void *)&a, sizeof(a)))
			die("connect");
		server = accept(listener, NULL, NULL);
		if (write(client, &c, 1) != 1 || read(server, &c, 1) != 1 ||
		    write(server, &c, 1) != 1 || read(client, &c, 1) != 1)
			die("tcp");
		setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(client);
		close(server);
	}
}

/* One request and answer on a standing connection, two processes. */
static void rr(long count)
{
	int pair[2], listener = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in a = address(7203);
	long left = count;
	char c = 0;

	if (bind(listener, (void *)&a, sizeof(a)) || listen(listener, 1))
		die("rr");
	if (!fork()) {
		pair[0] = accept(listener, NULL, NULL);
		while (read(pair[0], &c, 1) == 1)
			if (write(pair[0], &c, 1) != 1)
				break;
		_exit(0);
	}
	pair[1] = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(pair[1], (void *)&a, sizeof(a)))
		die("connect");
	begin();
	while (left--)
		if (write(pair[1], &c, 1) != 1 || read(pair[1], &c, 1) != 1)
			die("rr");
	close(pair[1]);
	wait(NULL);
}

/* open and close of a plain file: what the close probe costs everybody. */
static void closing(long count)
{
	begin();
	while (count--)
		close(open("/dev/null", O_RDONLY));
}

/* A socket that comes and goes without a packet. */
static void sockets(long count)
{
	begin();
	while (count--)
		close(socket(AF_INET, SOCK_DGRAM, 0));
}

/* fork, exit and wait, with so many descriptors to copy and to close. */
static void fork_with(long count, int descriptors, int sockets)
{
	int i;

	for (i = 0; i < descriptors; i++)
		if ((sockets ? socket(AF_INET, SOCK_DGRAM, 0) : open("/dev/null", O_RDONLY)) < 0)
			die("descriptors: raise ulimit -n");
	begin();
	while (count--) {
		pid_t pid = fork();

		if (!pid)
			_exit(0);
		waitpid(pid, NULL, 0);
	}
}

/* Any command. */
static void command(long count, char **argv)
{
	begin();
	while (count--) {
		int status;
		pid_t pid = fork();

		if (!pid) {
			execvp(argv[0], argv);
			die(argv[0]);
		}
		if (waitpid(pid, &status, 0) < 0 || status) {
			fprintf(stderr, "workload: %s failed\n", argv[0]);
			exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	const char *name = argc >= 3 ? argv[1] : "";
	long count = argc >= 3 ? atol(argv[2]) : 0;

	if (count < 1) {
		fprintf(stderr, "usage: workload udp|tcp|rr|socket|close|fork|fork-files|fork-sockets COUNT\n"
				"       workload command COUNT WORD...\n");
		return 2;
	}
	if (!strcmp(name, "udp"))
		udp(count);
	else if (!strcmp(name, "tcp"))
		tcp(count);
	else if (!strcmp(name, "rr"))
		rr(count);
	else if (!strcmp(name, "close"))
		closing(count);
	else if (!strcmp(name, "socket"))
		sockets(count);
	else if (!strcmp(name, "command") && argc > 3)
		command(count, argv + 3);
	else if (!strcmp(name, "fork"))
		fork_with(count, 0, 0);
	else if (!strcmp(name, "fork-files"))
		fork_with(count, 10000, 0);
	else if (!strcmp(name, "fork-sockets"))
		fork_with(count, 10000, 1);
	else
		return 2;
	printf("%.0f\n", (now() - start) / count);
	return 0;
}
