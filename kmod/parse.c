// SPDX-License-Identifier: GPL-2.0-only
/*
 * From a packet's headers to the first half of its record.
 */
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/mm.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/ipv6.h>
#include <net/tcp.h>

#include "parse.h"
#include "skip.h"

/* Does the routing header of this IPv6 packet name another router or its receiver? */
static bool parse_goes_on(const struct sniffer_flow *flow)
{
	int flags = IP6_FH_F_SKIP_RH;	/* those of which nothing is left */
	unsigned int at = 0;

	return flow->thoff > (int)sizeof(struct ipv6hdr) &&
	       ipv6_find_hdr(flow->skb, &at, NEXTHDR_ROUTING, NULL, &flags) >= 0;
}

/**
 * sniffer_parse - read a packet's headers
 * @flow: @skb, and the record's family and direction, are set; fills in addresses, ports, lengths and
 *	flags
 *
 * Return: false when the packet has been counted as skipped.
 */
bool sniffer_parse(struct sniffer_flow *flow)
{
	struct sniffer_record *r = &flow->record;
	struct sk_buff *skb = flow->skb;
	enum sniffer_skip why = SNIFFER_SKIP_TRUNCATED;
	union {
		struct iphdr ip;
		struct ipv6hdr ip6;
		struct tcphdr tcp;
		struct udphdr udp;
	} buf;
	unsigned short fragment = 0;
	int proto;

	if (r->family == AF_INET) {
		const struct iphdr *ip = skb_header_pointer(skb, 0, sizeof(buf.ip), &buf);

		if (!ip)
			goto skip;
		proto = ip->protocol;
		fragment = ntohs(ip->frag_off) & IP_OFFSET;
		flow->thoff = ip->ihl * 4;
		memcpy(r->saddr, &ip->saddr, 4);
		memcpy(r->daddr, &ip->daddr, 4);
	} else {
		const struct ipv6hdr *ip6 = skb_header_pointer(skb, 0, sizeof(buf.ip6), &buf);
		int flags = IP6_FH_F_AUTH;	/* without this header it passes the hook, too */

		if (!ip6)
			goto skip;
		memcpy(r->saddr, &ip6->saddr, 16);
		memcpy(r->daddr, &ip6->daddr, 16);
		flow->thoff = 0;
		proto = ipv6_find_hdr(skb, (unsigned int *)&flow->thoff, -1, &fragment, &flags);
		if (proto < 0)
			goto skip;
		why = SNIFFER_SKIP_OTHER;
		if (r->dir == SNIFFER_DIR_IN && parse_goes_on(flow))
			goto skip;
	}

	why = SNIFFER_SKIP_OTHER;
	if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
		goto skip;
	why = SNIFFER_SKIP_FRAGMENT;
	if (fragment)
		goto skip;
	why = SNIFFER_SKIP_TRUNCATED;
	if (proto == IPPROTO_TCP) {
		const struct tcphdr *tcp = skb_header_pointer(skb, flow->thoff, sizeof(buf.tcp),
							      &buf);

		if (!tcp)
			goto skip;
		r->sport = ntohs(tcp->source);
		r->dport = ntohs(tcp->dest);
		r->tcp_flags = tcp_flag_byte(tcp);
		r->hdr_len = min(flow->thoff + tcp->doff * 4, 255);
	} else {
		const struct udphdr *udp = skb_header_pointer(skb, flow->thoff, sizeof(buf.udp),
							      &buf);

		if (!udp)
			goto skip;
		r->sport = ntohs(udp->source);
		r->dport = ntohs(udp->dest);
		r->hdr_len = min_t(int, flow->thoff + sizeof(*udp), 255);
	}
	r->proto = proto;
	sniffer_parse_sizes(r, skb);
	return true;
skip:
	sniffer_skip(why);
	return false;
}
