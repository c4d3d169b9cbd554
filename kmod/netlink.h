/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_NETLINK_H
#define SNIFFER_NETLINK_H

#include <linux/skbuff.h>

#include "shared_proto.h"

struct genl_family;

enum sniffer_group {
	SNIFFER_GROUP_INDEX_PACKETS,
	SNIFFER_GROUP_INDEX_PROCESSES,
	SNIFFER_GROUP_INDEX_SNAPS,
	SNIFFER_GROUP_INDEX_FLOWS,
	SNIFFER_GROUPS,
};

bool sniffer_netlink_listening(enum sniffer_group group);
struct sk_buff *sniffer_netlink_begin(enum sniffer_group group, size_t room);
int sniffer_netlink_send(struct sk_buff *skb, enum sniffer_group group);
void sniffer_netlink_init(struct genl_family *family);

#endif /* SNIFFER_NETLINK_H */
