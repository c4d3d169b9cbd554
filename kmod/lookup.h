/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_LOOKUP_H
#define SNIFFER_LOOKUP_H

#include <linux/netfilter.h>
#include <linux/skbuff.h>
#include <net/sock.h>

#include "merge.h"
#include "shared_proto.h"

struct sniffer_owner;

/**
 * struct sniffer_flow - a packet on its way through hooks.c, parse.c, lookup.c and
 * name.c
 * @record: its record, filled step by step
 * @net: network namespace of the hook
 * @skb: the packet, data at the IP header
 * @thoff: offset of the TCP or UDP header
 * @place: where its record was added up, see sniffer_merge_add()
 * @version: version of @owner's stripe, read before @owner was looked up
 * @owner: the entry, found by the cookie of @sk, whose user the packet is named after;
 *	NULL if it is named otherwise
 * @sk: a full socket
 */
struct sniffer_flow {
	struct sniffer_record record;
	struct net *net;
	struct sk_buff *skb;
	int thoff;
	struct sniffer_merge_place place;
	unsigned int version;
	struct sniffer_owner *owner;
	const struct sock *sk;
};

struct sock *sniffer_lookup_in(struct sniffer_flow *flow, bool *put);
struct sock *sniffer_lookup_reverse(struct sniffer_flow *flow);
struct sock *sniffer_lookup_listener(struct sniffer_flow *flow, bool reverse);
void sniffer_lookup_untranslate(struct sniffer_flow *flow);
bool sniffer_lookup_is_local(const struct sniffer_flow *flow, const struct net_device *dev);
void sniffer_lookup_put(struct sock *sk);
void sniffer_lookup_hand_on(struct sk_buff *skb, struct sock *sk);
bool sniffer_lookup_is_multicast(const struct sniffer_flow *flow);
struct sock *sniffer_lookup_multicast(struct sniffer_flow *flow, struct sock *last);

#endif /* SNIFFER_LOOKUP_H */
