// SPDX-License-Identifier: MIT
/*
 * swarm TRUTH udp|tcp PORT COUNT: COUNT processes, each of which opens a socket,
 * sends one message to 127.0.0.1:PORT and exits at once. udp: one after another,
 * as quick as fork is, each with a length of its own. tcp: all connect at the same moment.
 */
#include "truth.h"

static void once(int port, int stream, int number)
{
	struct sockaddr_in peer = loopback(port);
	int sock = bound(stream ? SOCK_STREAM : SOCK_DGRAM, 0);
	char data[4096] = "swarm";

	if (stream)
		truth_claim(sock, (struct claim){ .proto = "tcp", .out = 3, .in = 1 });
	else
		truth_claim(sock, (struct claim){ .proto = "udp", .out = 1, .exact = 1,
						  .len = 28 + 1 + number % 4000 });
	if (stream && connect(sock, (void *)&peer, sizeof(peer)))
		fail("connect");
	if (sendto(sock, data, 1 + number % 4000, 0, stream ? NULL : (void *)&peer, sizeof(peer)) < 0)
		fail("send");
	_exit(0);
}

int main(int argc, char **argv)
{
	int stream, port, count, alive = 0, status, bad = 0, gate[2];

	if (argc != 5)
		return 2;
	truth_open(argv);
	stream = !strcmp(argv[2], "tcp");
	port = atoi(argv[3]);
	count = atoi(argv[4]);
	if (pipe2(gate, O_CLOEXEC))
		fail("pipe");
	for (int i = 0; i < count; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork");
		if (!pid) {
			char c;

			close(gate[1]);
			if (stream && read(gate[0], &c, 1) < 0)
				fail("gate");
			once(port, stream, i);
		}
		alive++;
		if (!stream && alive >= 8) {
			wait(&status);
			bad += status != 0;
			alive--;
		}
	}
	close(gate[1]);
	while (wait(&status) > 0)
		bad += status != 0;
	if (bad)
		fprintf(stderr, "%d of %d failed\n", bad, count);
	return bad != 0;
}
