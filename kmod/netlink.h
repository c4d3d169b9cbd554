/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_NETLINK_H
#define SNIFFER_NETLINK_H

#include <linux/skbuff.h>

#include "process.h"
#include "shared_proto.h"

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
void sniffer_netlink_process(const struct sniffer_proc *proc, u32 event);
u64 sniffer_netlink_process_lost(void);
int sniffer_netlink_init(void);
void sniffer_netlink_exit(void);

#endif /* SNIFFER_NETLINK_H */
