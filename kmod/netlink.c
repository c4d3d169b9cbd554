// SPDX-License-Identifier: GPL-2.0-only
/*
 * Multicast: messages of one growing attribute, and whether anybody listens.
 * It knows nobody who sends.
 */
#include <net/genetlink.h>
#include <net/net_namespace.h>

#include "netlink.h"

/* commands.c registers it */
static struct genl_family *netlink_family;

/**
 * sniffer_netlink_listening - does anybody want what a group gets?
 * @group: the group
 */
bool sniffer_netlink_listening(enum sniffer_group group)
{
	return genl_has_listeners(netlink_family, &init_net, group);
}

/**
 * sniffer_netlink_begin - start a multicast message of one growing attribute
 * @attr: enum sniffer_attr
 * @cmd: enum sniffer_cmd
 * @head: bytes at its start that are there from the beginning
 * @room: bytes that may be added after them
 * @data: set to the attribute's first byte, 8-aligned
 *
 * Any context.
 *
 * Return: the message or NULL.
 */
struct sk_buff *sniffer_netlink_begin(int attr, u8 cmd, size_t head, size_t room, void **data)
{
	struct sk_buff *skb;
	struct nlattr *nla;

	skb = genlmsg_new(nla_total_size(head + room), GFP_ATOMIC | __GFP_NOWARN);
	if (!skb)
		return NULL;
	if (!genlmsg_put(skb, 0, 0, netlink_family, 0, cmd))
		goto free;
	nla = nla_reserve(skb, attr, head);
	if (!nla)
		goto free;
	*data = nla_data(nla);
	return skb;
free:
	nlmsg_free(skb);
	return NULL;
}

/**
 * sniffer_netlink_send - finish a message and multicast it
 * @skb: from sniffer_netlink_begin(); consumed
 * @group: to whom
 * @used: bytes written after the head
 *
 * Any context. Return: 0, or an error when nobody got it.
 */
int sniffer_netlink_send(struct sk_buff *skb, enum sniffer_group group, size_t used)
{
	struct nlmsghdr *nlh = nlmsg_hdr(skb);
	struct nlattr *nla = nlmsg_data(nlh) + GENL_HDRLEN;
	int err;

	skb_put(skb, used);
	nla->nla_len += used;
	nlh->nlmsg_len = skb->len;
	err = genlmsg_multicast_netns(netlink_family, &init_net, skb, 0, group, GFP_ATOMIC);
	/* one with NETLINK_BROADCAST_ERROR had no room, and knows; others may have got it */
	return err == -ENOBUFS ? 0 : err;
}

/**
 * sniffer_netlink_init - from now on messages can be made
 * @family: registered
 */
void sniffer_netlink_init(struct genl_family *family)
{
	netlink_family = family;
}
