// SPDX-License-Identifier: MIT
/*
 * inherit TRUTH use|vfork PORT COUNT: descriptor 5 is a UDP socket that somebody
 * else made. use: send COUNT datagrams with it to 127.0.0.1:PORT and read the
 * replies. vfork: vfork a child that executes this program with "use", and wait.
 */
#include "truth.h"

int main(int argc, char **argv)
{
	struct sockaddr_in peer;
	int count, status;
	char data[100];
	pid_t pid;

	if (argc != 5)
		return 2;
	truth_open(argv);
	if (!strcmp(argv[2], "vfork")) {
		char *args[] = { "vforked", argv[1], "use", argv[3], argv[4], NULL };

		pid = vfork();
		if (!pid) {
			execv("/proc/self/exe", args);
			_exit(1);
		}
		if (pid < 0 || waitpid(pid, &status, 0) != pid)
			fail("vfork");
		return status != 0;
	}
	peer = loopback(atoi(argv[3]));
	count = atoi(argv[4]);
	truth_claim(5, (struct claim){ .proto = "udp", .out = count, .in = count, .exact = 1 });
	for (int i = 0; i < count; i++) {
		if (sendto(5, "after", 5, 0, (void *)&peer, sizeof(peer)) != 5)
			fail("sendto");
		if (recv(5, data, sizeof(data), 0) != 5)
			fail("recv");
	}
	return 0;
}
