/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_PACKET_H
#define HUNTER_PACKET_H
/* Reads a packet's headers into its record, and sends the record to the reader. */
#include "snap.h"

#define TCP_FIN		1
#define TCP_SYN		2
#define TCP_RST		4
#define TCP_ACK		16
#define HEADERS		60	/* IPv6 and TCP without options; struct skb_shared_info is longer */
#define EXTENSIONS	8	/* headers between IPv6's and TCP's or UDP's that are walked */
#define WAKE_NS		(10 * 1000000ULL)

/* Copies bytes of a packet; at: from its IP header on. Returns 0 if they are there. */
typedef long (*packet_reader)(const void *packet, u32 at, void *to, u32 size);

/* Offset of an IPv6 packet's transport header, and its protocol. Returns 0 if there is none. */
static __always_inline u32 parse_extensions(const void *packet, packet_reader read, u8 *proto)
{
	u32 at = 40;
	u8 ext[8];
	int i;

	APART();
	for (i = 0; i < EXTENSIONS; i++) {
		if (*proto == IPPROTO_TCP || *proto == IPPROTO_UDP)
			return at;
		if (*proto != 0 && *proto != 43 && *proto != 44 && *proto != 60)
			return 0;
		if (read(packet, at, ext, sizeof(ext)))
			return 0;
		if (*proto == 44) {
			if (ext[2] | (ext[3] & 0xf8))
				return 0;	/* a later fragment */
			at += 8;
		} else {
			at += (ext[1] + 1) * 8;
		}
		*proto = ext[0];
		at &= 0xfff;
	}
	return 0;
}

static __always_inline int parse_transport(struct sniffer_record *r, const u8 *transport,
					   u32 thoff)
{
	if (r->proto == IPPROTO_TCP) {
		r->tcp_flags = transport[13];
		thoff += (transport[12] >> 4) * 4;
	} else {
		thoff += 8;
	}
	r->sport = transport[0] << 8 | transport[1];
	r->dport = transport[2] << 8 | transport[3];
	r->hdr_len = thoff > 255 ? 255 : thoff;
	return 1;
}

/*
 * Reads the headers. Returns 0 if the packet is none for us. If thoff is 0, searches for
 * the transport header; else r->proto is its protocol. beyond: memory after the packet's
 * end can be read, so all is read at once.
 */
static __always_inline int parse_headers(struct sniffer_record *r, const void *packet,
					 packet_reader read, u32 thoff, bool beyond)
{
	u8 all[HEADERS] __attribute__((aligned(8)));
	u8 *head = all, proto;

	if (read(packet, 0, head, beyond ? HEADERS : 20))
		return 0;
	if (head[0] >> 4 == 4) {
		r->family = AF_INET;
		proto = head[9];
		if (!thoff) {
			if ((head[6] & 0x1f) | head[7])
				return 0;	/* a later fragment */
			thoff = (head[0] & 15) * 4;
		}
		__builtin_memcpy(r->saddr, head + 12, 4);
		__builtin_memcpy(r->daddr, head + 16, 4);
	} else {
		if (!beyond && read(packet, 0, head, 40))
			return 0;
		r->family = AF_INET6;
		proto = thoff ? r->proto : head[6];
		__builtin_memcpy(r->saddr, head + 8, 16);
		__builtin_memcpy(r->daddr, head + 24, 16);
		if (!thoff)
			thoff = parse_extensions(packet, read, &proto);
		if (!thoff)
			return 0;
	}
	if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
		return 0;
	r->proto = proto;
	if (beyond && thoff == 20)
		return parse_transport(r, all + 20, thoff);
	if (beyond && thoff == 40)
		return parse_transport(r, all + 40, thoff);
	if (read(packet, thoff, all, proto == IPPROTO_TCP ? 20 : 8))
		return 0;
	return parse_transport(r, all, thoff);
}

/* Sets length and number of segments. size: of each segment, 0 if it is one. */
static __always_inline void parse_size(struct sniffer_record *r, u32 len, u32 size, u32 segments)
{
	r->len = len;
	r->gso_segs = 1;
	if (size)
		r->gso_segs = segments ?: (len - r->hdr_len + size - 1) / size;
	r->time_ns = bpf_ktime_get_ns();
}

static __always_inline void shape_out(struct sk_buff *skb, struct shape *s)
{
	s->net = (u64)skb->head + skb->network_header;
	s->len = skb->len;
	s->thoff = 0;
	s->end = (u64)skb->head + skb->end;
	s->linear = (u32)((u64)skb->data - s->net) + skb->len - skb->data_len;
}

/* The stack has taken the IP header off already. */
static __always_inline void shape_in(struct sk_buff *skb, struct shape *s)
{
	s->net = (u64)skb->head + skb->network_header;
	s->thoff = (u16)(skb->transport_header - skb->network_header);
	s->len = skb->len + s->thoff;
	s->end = (u64)skb->head + skb->end;
	s->linear = s->len - skb->data_len;
}

static __always_inline long read_address(const void *packet, u32 at, void *to, u32 size)
{
	return bpf_probe_read_kernel(to, size, packet + at);
}

/* Fills in what the packet tells. Returns 0 if it is none for us. */
__noinline int parse(struct sniffer_record *r, struct shape *s)
{
	u32 at = bpf_core_field_offset(struct skb_shared_info, gso_size);
	struct skb_shared_info *info;
	u16 gso[2] = {};

	if (!r || !s || !parse_headers(r, (void *)s->net, read_address, s->thoff, true))
		return 0;
	info = (void *)s->end;
	if (bpf_core_field_offset(struct skb_shared_info, gso_segs) == at + sizeof(gso[0])) {
		bpf_probe_read_kernel(gso, sizeof(gso), (void *)info + at);
	} else {
		gso[0] = BPF_CORE_READ(info, gso_size);
		gso[1] = BPF_CORE_READ(info, gso_segs);
	}
	parse_size(r, s->len, gso[0], gso[1]);
	return 1;
}

static __always_inline void skip(void)
{
	struct counters *c;
	u32 cpu;

	c = counters_here(&cpu);
	if (c)
		__sync_fetch_and_add(&c->skipped, 1);
}

/*
 * Sends a record to the reader. Wakes the reader for each 256th record, and if the last
 * time was WAKE_NS ago. Else the reader looks by itself.
 */
static __always_inline void emit(struct sniffer_record *r, struct shape *s)
{
	u64 flags = BPF_RB_NO_WAKEUP;
	struct sniffer_record *to;
	struct counters *c;
	u32 cpu;

	c = counters_here(&cpu);
	if (!c)
		return;
	r->cpu = cpu;
	if (r->flags & SNIFFER_F_COPY)
		__sync_fetch_and_add(&c->copies, 1);
	r->seq = __sync_fetch_and_add(&c->seq, 1);
	if ((r->seq & 255) == 255 || r->time_ns - c->woken > WAKE_NS) {
		c->woken = r->time_ns;
		flags = BPF_RB_FORCE_WAKEUP;
	}
	if (s && snaps_wanted())
		snap_record(r, s);
	to = bpf_ringbuf_reserve(&ring, sizeof(*r), 0);
	if (!to) {
		__sync_fetch_and_add(&c->lost, 1);
		return;
	}
	__builtin_memcpy(to, r, sizeof(*r));
	bpf_ringbuf_submit(to, flags);
}

#endif /* HUNTER_PACKET_H */
