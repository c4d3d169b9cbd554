// SPDX-License-Identifier: GPL-2.0-only
/*
 * Multicast messages with one attribute, and the question whether anybody listens. This
 * file knows nothing of what is sent.
 */
#include <net/genetlink.h>
#include <net/net_namespace.h>

#include "netlink.h"

/* registered by commands.c */
static struct genl_family *netlink_family;

/* Command and attribute of each group's messages. */
static const struct {
	u8 cmd;
	u16 attr;
} netlink_kinds[] = {
	[SNIFFER_GROUP_INDEX_PACKETS] = { SNIFFER_CMD_PACKETS, SNIFFER_A_RECORDS },
	[SNIFFER_GROUP_INDEX_PROCESSES] = { SNIFFER_CMD_PROCESS, SNIFFER_A_PROCESS },
	[SNIFFER_GROUP_INDEX_SNAPS] = { SNIFFER_CMD_SNAPS, SNIFFER_A_SNAPS },
	[SNIFFER_GROUP_INDEX_FLOWS] = { SNIFFER_CMD_FLOWS, SNIFFER_A_FLOWS },
};

/**
 * sniffer_netlink_listening - has a group any member?
 * @group: the group
 */
bool sniffer_netlink_listening(enum sniffer_group group)
{
	return genl_has_listeners(netlink_family, &init_net, group);
}

/**
 * sniffer_netlink_begin - start a multicast message of one attribute
 * @group: receivers
 * @room: bytes that may be put into it; they begin 8-aligned
 *
 * Any context. Return: the message, which skb_put() fills, or NULL.
 */
struct sk_buff *sniffer_netlink_begin(enum sniffer_group group, size_t room)
{
	struct sk_buff *skb = genlmsg_new(nla_total_size(room), GFP_ATOMIC | __GFP_NOWARN);

	if (!skb)
		return NULL;
	if (!genlmsg_put(skb, 0, 0, netlink_family, 0, netlink_kinds[group].cmd) ||
	    !nla_reserve(skb, netlink_kinds[group].attr, 0)) {
		nlmsg_free(skb);
		return NULL;
	}
	return skb;
}

/**
 * sniffer_netlink_send - finish a message and multicast it
 * @skb: from sniffer_netlink_begin(); consumed
 * @group: to whom
 *
 * Any context. Return: 0, or an error if no member got it.
 */
int sniffer_netlink_send(struct sk_buff *skb, enum sniffer_group group)
{
	struct nlmsghdr *nlh = nlmsg_hdr(skb);
	struct nlattr *nla = nlmsg_data(nlh) + GENL_HDRLEN;
	int err;

	nla->nla_len = skb->len - NLMSG_HDRLEN - GENL_HDRLEN;
	nlh->nlmsg_len = skb->len;
	err = genlmsg_multicast_netns(netlink_family, &init_net, skb, 0, group, GFP_ATOMIC);
	/*
	 * a member with NETLINK_BROADCAST_ERROR had no room, and knows it; others may
	 * have got the message
	 */
	return err == -ENOBUFS ? 0 : err;
}

/**
 * sniffer_netlink_init - allow messages from now on
 * @family: registered
 */
void sniffer_netlink_init(struct genl_family *family)
{
	netlink_family = family;
}
