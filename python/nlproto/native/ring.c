/* SPDX-License-Identifier: MIT */
/* Packets of an AF_PACKET ring, as records. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared_proto.h"
#include "host.h"

_Static_assert(sizeof(((struct host_snap *)0)->data) == SNIFFER_SNAP_LEN, "snap");

enum parsed { RECORDED, FRAGMENT, TRUNCATED, OTHER };

static uint16_t load16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static enum parsed parse_ports(const uint8_t *l4, const uint8_t *end, uint32_t ip_len,
			       struct sniffer_record *r)
{
	uint32_t l4_len = 8;

	if (end - l4 < 8)
		return TRUNCATED;
	r->sport = load16(l4);
	r->dport = load16(l4 + 2);
	if (r->proto == IPPROTO_TCP) {
		if (end - l4 < 14)
			return TRUNCATED;
		l4_len = (l4[12] >> 4) * 4u;
		r->tcp_flags = l4[13];
	}
	r->hdr_len = ip_len + l4_len > 255 ? 255 : (uint8_t)(ip_len + l4_len);
	return RECORDED;
}

static enum parsed parse_v4(const uint8_t *ip, const uint8_t *end, struct sniffer_record *r)
{
	uint32_t ip_len;

	if (end - ip < 20)
		return TRUNCATED;
	ip_len = (ip[0] & 15) * 4u;
	if (ip_len < 20 || (uint32_t)(end - ip) < ip_len)
		return TRUNCATED;
	r->family = AF_INET;
	r->proto = ip[9];
	if (r->proto != IPPROTO_TCP && r->proto != IPPROTO_UDP)
		return OTHER;
	if (load16(ip + 6) & 0x1fff)
		return FRAGMENT;
	if (load16(ip + 2))	/* 0: larger than 64 KiB (BIG TCP) */
		r->len = load16(ip + 2);
	memcpy(r->saddr, ip + 12, 4);
	memcpy(r->daddr, ip + 16, 4);
	return parse_ports(ip + ip_len, end, ip_len, r);
}

static enum parsed parse_v6(const uint8_t *ip, const uint8_t *end, struct sniffer_record *r)
{
	const uint8_t *at = ip + 40;
	uint8_t next;

	if (end - ip < 40)
		return TRUNCATED;
	r->family = AF_INET6;
	if (load16(ip + 4))
		r->len = 40u + load16(ip + 4);
	memcpy(r->saddr, ip + 8, 16);
	memcpy(r->daddr, ip + 24, 16);
	next = ip[6];
	while (next != IPPROTO_TCP && next != IPPROTO_UDP) {
		if (end - at < 8)
			return TRUNCATED;
		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
			next = at[0];
			at += (at[1] + 1) * 8;
			break;
		case IPPROTO_FRAGMENT:
			if (load16(at + 2) & 0xfff8)
				return FRAGMENT;
			next = at[0];
			at += 8;
			break;
		case IPPROTO_AH:
			next = at[0];
			at += (at[1] + 2) * 4;
			break;
		default:
			return OTHER;
		}
		if (at > end)
			return TRUNCATED;
	}
	r->proto = next;
	return parse_ports(at, end, (uint32_t)(at - ip), r);
}

static void fill_segments(const struct virtio_net_hdr *vnet, struct sniffer_record *r)
{
	uint32_t payload = r->len > r->hdr_len ? r->len - r->hdr_len : 0;

	r->gso_segs = 1;
	if (vnet->gso_type != VIRTIO_NET_HDR_GSO_NONE && vnet->gso_size && payload)
		r->gso_segs = (uint16_t)((payload + vnet->gso_size - 1) / vnet->gso_size);
}

static void fill_snap(const struct tpacket2_hdr *h, struct host_snap *snap)
{
	uint32_t there = h->tp_snaplen - (uint32_t)(h->tp_net - h->tp_mac);

	snap->caplen = there < SNIFFER_SNAP_LEN ? there : SNIFFER_SNAP_LEN;
	memcpy(snap->data, (const uint8_t *)h + h->tp_net, snap->caplen);
}

static enum parsed parse_frame(const struct host_ring *ring, const struct tpacket2_hdr *h,
			       struct sniffer_record *r, struct host_frame *f)
{
	const uint8_t *base = (const uint8_t *)h;
	const struct sockaddr_ll *ll;
	struct virtio_net_hdr vnet = { 0 };
	const uint8_t *ip = base + h->tp_net;
	const uint8_t *end = base + h->tp_mac + h->tp_snaplen;
	uint32_t link_len = (uint32_t)(h->tp_net - h->tp_mac);
	enum parsed result;

	memset(r, 0, sizeof(*r));
	ll = (const void *)(base + TPACKET_ALIGN(sizeof(*h)));
	if (h->tp_net < h->tp_mac || end > base + ring->size || ip >= end)
		return TRUNCATED;
	r->len = h->tp_len > link_len ? h->tp_len - link_len : 0;
	result = (ip[0] >> 4) == 4 ? parse_v4(ip, end, r) :
		 (ip[0] >> 4) == 6 ? parse_v6(ip, end, r) : OTHER;
	if (result != RECORDED)
		return result;
	r->time_ns = (uint64_t)((int64_t)h->tp_sec * 1000000000 + h->tp_nsec + ring->mono_offset);
	r->netns = ring->netns;
	r->ifindex = (uint32_t)ll->sll_ifindex;
	r->dir = ll->sll_pkttype == PACKET_OUTGOING ? SNIFFER_DIR_OUT : SNIFFER_DIR_IN;
	f->to_all = ll->sll_pkttype == PACKET_MULTICAST || ll->sll_pkttype == PACKET_BROADCAST;
	if (ring->vnet)
		memcpy(&vnet, base + h->tp_mac - sizeof(vnet), sizeof(vnet));
	fill_segments(&vnet, r);
	return RECORDED;
}

uint32_t host_ring_read(struct host_ring *ring, struct sniffer_record *records,
			struct host_frame *frames, uint32_t max)
{
	uint32_t n = 0;

	while (n < max) {
		struct tpacket2_hdr *h =
			(void *)(ring->frames + (size_t)ring->at * ring->size);

		if (!(__atomic_load_n(&h->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
			break;
		ring->packets++;
		switch (parse_frame(ring, h, &records[n], &frames[n])) {
		case RECORDED:
			if (ring->snaps)
				fill_snap(h, &ring->snaps[n]);
			n++;
			break;
		case FRAGMENT:
			ring->fragments++;
			break;
		case TRUNCATED:
			ring->truncated++;
			break;
		case OTHER:
			ring->other++;
			break;
		}
		__atomic_store_n(&h->tp_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
		ring->at = (ring->at + 1) % ring->count;
	}
	return n;
}

uint32_t host_ring_waiting(const struct host_ring *ring)
{
	uint32_t n = 0;

	while (n < ring->count) {
		uint32_t at = (ring->at + n) % ring->count;
		struct tpacket2_hdr *h = (void *)(ring->frames + (size_t)at * ring->size);

		if (!(__atomic_load_n(&h->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
			break;
		n++;
	}
	return n;
}

int host_ring_holds(const struct host_ring *ring, uint32_t frames)
{
	uint32_t at = (ring->at + frames - 1) % ring->count;
	const struct tpacket2_hdr *h = (const void *)(ring->frames + (size_t)at * ring->size);

	return (__atomic_load_n(&h->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER) != 0;
}

uint32_t host_frame_size(uint32_t snap)
{
	uint32_t need = TPACKET2_HDRLEN + 64 + sizeof(struct virtio_net_hdr) + snap;
	uint32_t size = 256;

	while (size < need)	/* a power of two, so that frames never straddle blocks */
		size *= 2;
	return size;
}

int host_capture_all(int fd)
{
	struct sockaddr_ll ll = {
		.sll_family = AF_PACKET,
		.sll_protocol = htons(ETH_P_ALL),
	};

	return bind(fd, (struct sockaddr *)&ll, sizeof(ll)) ? -errno : 0;
}
