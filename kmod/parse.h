/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_PARSE_H
#define SNIFFER_PARSE_H

#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/kernel.h>
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/ip.h>
#include <net/tcp.h>

#include "lookup.h"

/**
 * struct sniffer_ends - what the headers of a plain packet say, in the packet's own order
 * @saddr: of the IP header
 * @daddr: the same
 * @ports: both
 * @thoff: offset of the TCP or UDP header
 * @proto: IPPROTO_TCP or IPPROTO_UDP
 */
struct sniffer_ends {
	const void *saddr;
	const void *daddr;
	u32 ports;
	int thoff;
	u8 proto;
};

bool sniffer_parse(struct sniffer_flow *flow);

/* Reads an IPv4 header without options or a lone IPv6 header, with what follows, if in one piece. */
static __always_inline bool sniffer_parse_plain(const struct sk_buff *skb, u8 family,
						struct sniffer_ends *ends)
{
	int room = skb_headlen(skb);
	u8 proto;

	if (family == AF_INET) {
		const struct iphdr *ip = (const struct iphdr *)skb->data;

		ends->thoff = sizeof(*ip);
		if (room < (int)(sizeof(*ip) + sizeof(struct udphdr)) ||
		    *(const u8 *)ip != 0x45 || ip->frag_off & htons(IP_OFFSET))
			return false;
		ends->saddr = &ip->saddr;
		ends->daddr = &ip->daddr;
		ends->ports = *(const u32 *)(ip + 1);
		proto = ip->protocol;
	} else {
		const struct ipv6hdr *ip = (const struct ipv6hdr *)skb->data;

		ends->thoff = sizeof(*ip);
		if (room < (int)(sizeof(*ip) + sizeof(struct udphdr)))
			return false;
		ends->saddr = &ip->saddr;
		ends->daddr = &ip->daddr;
		ends->ports = *(const u32 *)(ip + 1);
		proto = ip->nexthdr;
	}
	if (proto == IPPROTO_TCP ? room < (int)(ends->thoff + sizeof(struct tcphdr)) :
				   proto != IPPROTO_UDP)
		return false;
	ends->proto = proto;
	return true;
}

/* How much of it there is: @r->hdr_len is known. */
static __always_inline void sniffer_parse_sizes(struct sniffer_record *r, const struct sk_buff *skb)
{
	r->len = skb->len;
	r->gso_segs = 1;
	if (skb_is_gso(skb)) {
		r->gso_segs = skb_shinfo(skb)->gso_segs;
		if (!r->gso_segs)
			r->gso_segs = max_t(int, 1, DIV_ROUND_UP((int)(skb->len - r->hdr_len),
								 skb_shinfo(skb)->gso_size));
	}
}

/* The same as sniffer_parse(), of what sniffer_parse_plain() has read. */
static __always_inline void sniffer_parse_ends(struct sniffer_flow *flow,
					       const struct sniffer_ends *ends)
{
	struct sniffer_record *r = &flow->record;
	const struct tcphdr *tcp;
	__be16 ports[2];

	flow->thoff = ends->thoff;
	if (r->family == AF_INET) {
		memcpy(r->saddr, ends->saddr, 4);
		memcpy(r->daddr, ends->daddr, 4);
	} else {
		memcpy(r->saddr, ends->saddr, 16);
		memcpy(r->daddr, ends->daddr, 16);
	}
	memcpy(ports, &ends->ports, sizeof(ports));
	r->sport = ntohs(ports[0]);
	r->dport = ntohs(ports[1]);
	r->proto = ends->proto;
	r->hdr_len = ends->thoff + sizeof(struct udphdr);
	if (ends->proto == IPPROTO_TCP) {
		tcp = (const struct tcphdr *)(flow->skb->data + ends->thoff);
		r->tcp_flags = tcp_flag_byte(tcp);
		r->hdr_len = ends->thoff + tcp->doff * 4;
	}
	sniffer_parse_sizes(r, flow->skb);
}

#endif /* SNIFFER_PARSE_H */
