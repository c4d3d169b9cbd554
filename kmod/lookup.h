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
 * struct sniffer_flow - where a packet's headers are
 * @record: what is known of it so far
 * @net: the network namespace the hook ran in
 * @skb: the packet, data at the IP header
 * @thoff: offset of the TCP or UDP header
 * @place: where it was summed up
 * @version: of the owner table's entry, read before it was
 * @owner: the entry whose user it was named after, found by the cookie of @sk, NULL if named otherwise
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
