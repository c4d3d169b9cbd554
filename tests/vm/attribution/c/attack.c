// SPDX-License-Identifier: MIT
/*
 * attack KIND COUNT [PORT]: what a host has to bear, COUNT times.
 *
 * syn         segments with SYN to PORT, then ACKs that fit nothing, from forged addresses
 * scan        connect() to one port after the other
 * fragments   first fragments that never become whole, to PORT
 * namespaces  network namespaces made and destroyed
 * forks       children of a process with 200 sockets, each of which uses one
 */
#include "truth.h"
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <sched.h>

#define SHARED	200
#define AT_ONCE	40	/* children */

static unsigned int dice(void)
{
	static unsigned int state = 1;

	return state = state * 1664525 + 1013904223;
}

static unsigned short sum(const void *data, int size, unsigned int total)
{
	const unsigned short *word = data;

	for (; size > 1; size -= 2)
		total += *word++;
	while (total >> 16)
		total = (total & 0xffff) + (total >> 16);
	return ~total;
}

static void forge(int raw, unsigned short port, unsigned char protocol, unsigned short fragment,
		  unsigned char flags)
{
	struct {
		struct iphdr ip;
		union {
			struct tcphdr tcp;
			struct udphdr udp;
		};
	} packet = {};
	struct sockaddr_in where = loopback(port);
	int size = protocol == IPPROTO_TCP ? sizeof(packet.tcp) : sizeof(packet.udp);
	unsigned int pseudo = htons(protocol) + htons(size);

	packet.ip.version = 4;
	packet.ip.ihl = 5;
	packet.ip.ttl = 64;
	packet.ip.id = dice();
	packet.ip.protocol = protocol;
	packet.ip.frag_off = htons(fragment);
	packet.ip.tot_len = htons(sizeof(packet.ip) + size);
	packet.ip.saddr = htonl(0x7f000000 | (dice() >> 8 & 0xfefefe));
	packet.ip.daddr = where.sin_addr.s_addr;
	if (protocol == IPPROTO_TCP) {
		packet.tcp.source = htons(1024 + dice() % 60000);
		packet.tcp.dest = htons(port);
		packet.tcp.doff = 5;
		packet.tcp.syn = flags & 2;
		packet.tcp.ack = !!(flags & 16);
		packet.tcp.ack_seq = dice();
		packet.tcp.window = htons(1000);
		pseudo += (packet.ip.saddr & 0xffff) + (packet.ip.saddr >> 16) +
			  (packet.ip.daddr & 0xffff) + (packet.ip.daddr >> 16);
		packet.tcp.check = sum(&packet.tcp, size, pseudo);
	} else {
		packet.udp.source = htons(1024 + dice() % 60000);
		packet.udp.dest = htons(port);
		packet.udp.len = htons(2000);
	}
	sendto(raw, &packet, sizeof(packet.ip) + size, 0, (void *)&where, sizeof(where));
}

static void scan(int count)
{
	for (int i = 0; i < count; i++) {
		struct sockaddr_in where = loopback(1 + i % 65535);
		int sock = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

		if (sock < 0)
			fail("socket");
		connect(sock, (void *)&where, sizeof(where));
		close(sock);
	}
}

static void forks(int count)
{
	int sockets[SHARED], alive = 0;

	for (int i = 0; i < SHARED; i++)
		sockets[i] = bound(SOCK_DGRAM, 0);
	for (int i = 0; i < count; i++) {
		pid_t pid = fork();

		if (!pid) {
			struct sockaddr_in nobody = loopback(9);

			sendto(sockets[i % SHARED], "x", 1, 0, (void *)&nobody, sizeof(nobody));
			usleep(1000);
			_exit(0);
		}
		if (pid > 0)
			alive++;
		if (pid < 0 || alive >= AT_ONCE)
			alive -= wait(NULL) > 0;
	}
	while (wait(NULL) > 0)
		;
}

int main(int argc, char **argv)
{
	const char *kind = argc > 2 ? argv[1] : "";
	int count = argc > 2 ? atoi(argv[2]) : 0, port = argc > 3 ? atoi(argv[3]) : 9, raw = -1;

	if (!strcmp(kind, "scan")) {
		scan(count);
	} else if (!strcmp(kind, "forks")) {
		forks(count);
	} else if (!strcmp(kind, "namespaces")) {
		for (int i = 0; i < count; i++)
			if (unshare(CLONE_NEWNET))
				fail("unshare");
	} else if (!strcmp(kind, "syn") || !strcmp(kind, "fragments")) {
		raw = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
		if (raw < 0)
			fail("socket");
		for (int i = 0; i < count; i++)
			if (*kind == 's')
				forge(raw, port, IPPROTO_TCP, 0, i % 2 ? 16 : 2);
			else
				forge(raw, port, IPPROTO_UDP, 0x2000, 0);
	} else {
		return 2;
	}
	return 0;
}
