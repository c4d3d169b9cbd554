// SPDX-License-Identifier: MIT
/*
 * native.c - the C that reads packets, sockets, records and /proc/PID/stat, under libFuzzer with ASan and UBSan.
 *
 * The first byte says which. Frames of a ring come from the kernel, but what is in them is
 * anybody's; replies of sock_diag and records are of the kernel or of our module.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include <linux/if_packet.h>
#include <netinet/in.h>
#include <stdint.h>

#include "shared_proto.h"
#include "host.h"
#include "../../python/nlproto/native/flows.c"

#define FRAME 512
#define FRAMES 4
#define MOST 64

static void ring(const uint8_t *data, size_t size)
{
	static uint8_t frames[FRAMES * FRAME] __attribute__((aligned(16)));
	static struct sniffer_record records[FRAMES];
	static struct host_frame to_all[FRAMES];
	static struct host_snap room[FRAMES];
	struct host_ring ring = { .frames = frames, .count = FRAMES, .size = FRAME, .vnet = 1 };
	size_t net = TPACKET_ALIGN(TPACKET2_HDRLEN) + 32;

	memset(frames, 0, sizeof(frames));
	for (int i = 0; i < FRAMES && size > 4; i++) {
		struct tpacket2_hdr *h = (void *)(frames + i * FRAME);
		size_t take = data[0] | (data[1] & 1) << 8;

		if (take > size - 2)
			take = size - 2;
		if (take > FRAME - net)
			take = FRAME - net;
		/* as the kernel writes it: what is captured lies inside the frame */
		h->tp_status = TP_STATUS_USER;
		h->tp_mac = h->tp_net = net;
		h->tp_snaplen = h->tp_len = take;
		memcpy((uint8_t *)h + net, data + 2, take);
		data += take + 2;
		size -= take + 2;
	}
	ring.snaps = room;
	host_ring_waiting(&ring);
	host_ring_read(&ring, records, to_all, FRAMES);
}

static void diag(const uint8_t *data, size_t size)
{
	struct host_socket *sockets = malloc(MOST * sizeof(*sockets));
	struct host_tcp *tcp = malloc(MOST * sizeof(*tcp));
	uint8_t *buf = malloc(size + 4);
	int done = 0;

	memcpy(buf, data, size);
	host_diag_read(buf, size, 1, IPPROTO_TCP, sockets, MOST, &done);
	host_tcp_read(buf, size, 1, tcp, MOST, &done);
	free(buf);
	free(tcp);
	free(sockets);
}

static void sum(const uint8_t *data, size_t size)
{
	uint32_t count = size / sizeof(struct sniffer_record), bits = 8;
	struct sniffer_record *records = malloc(size + 1);
	struct flow *flows = malloc(count * sizeof(*flows) + 1);
	uint32_t *belongs = malloc(count * sizeof(*belongs) + 1);
	uint32_t *slots;

	while ((1u << bits) <= count)
		bits++;
	slots = calloc(1u << bits, sizeof(*slots));
	memcpy(records, data, count * sizeof(*records));
	if (flows_sum(records, count, 1, flows, belongs, slots, bits) > count)
		abort();
	memset(slots, 0, sizeof(*slots) << bits);
	flows_processes(records, count, 1, belongs, slots, bits);
	flows_unnamed(records, count, ~0u, belongs);
	free(slots);
	free(belongs);
	free(flows);
	free(records);
}

static void owner(const uint8_t *data, size_t size)
{
	struct host_owner one = { 0 };
	char *text = malloc(size + 1);

	memcpy(text, data, size);
	text[size] = 0;
	if (host_parse_stat(&one, text, size) && one.comm_len > sizeof(one.comm))
		abort();
	free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!size)
		return 0;
	switch (data[0] % 4) {
	case 0:
		ring(data + 1, size - 1);
		break;
	case 1:
		diag(data + 1, size - 1);
		break;
	case 2:
		sum(data + 1, size - 1);
		break;
	case 3:
		owner(data + 1, size - 1);
		break;
	}
	return 0;
}
