// SPDX-License-Identifier: GPL-2.0-only
/*
 * For comparison: a plain module. Each packet at LOCAL_IN and LOCAL_OUT becomes a
 * Netlink message of its own to one reader, which says hello.
 */
#include <linux/ip.h>
#include <linux/module.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/netlink.h>
#include <net/netlink.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#define UNICAST_NETLINK	31	/* as in bench/reader.c */

struct unicast_message {
	__be32 saddr, daddr;
	u32 ports;
	u32 len;
	u32 pid;
	char comm[TASK_COMM_LEN];
};

static struct sock *unicast_socket;
static u32 unicast_reader;	/* its port, 0: nobody said hello */

static unsigned int unicast_packet(void *priv, struct sk_buff *skb,
				   const struct nf_hook_state *state)
{
	struct unicast_message *message;
	const struct iphdr *ip = ip_hdr(skb);
	u32 buffer, *ports, reader = READ_ONCE(unicast_reader);
	struct nlmsghdr *nlh;
	struct sk_buff *out;

	if (!reader || (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP))
		return NF_ACCEPT;
	out = nlmsg_new(sizeof(*message), GFP_ATOMIC);
	if (!out)
		return NF_ACCEPT;
	nlh = nlmsg_put(out, 0, 0, NLMSG_DONE, sizeof(*message), 0);
	message = nlmsg_data(nlh);
	message->saddr = ip->saddr;
	message->daddr = ip->daddr;
	ports = skb_header_pointer(skb, ip->ihl * 4, sizeof(buffer), &buffer);
	message->ports = ports ? *ports : 0;
	message->len = skb->len;
	message->pid = current->tgid;
	memcpy(message->comm, current->comm, TASK_COMM_LEN);
	nlmsg_unicast(unicast_socket, out, reader);
	return NF_ACCEPT;
}

static const struct nf_hook_ops unicast_hooks[] = {
	{ .hook = unicast_packet, .pf = NFPROTO_IPV4, .hooknum = NF_INET_LOCAL_IN },
	{ .hook = unicast_packet, .pf = NFPROTO_IPV4, .hooknum = NF_INET_LOCAL_OUT },
};

static void unicast_hello(struct sk_buff *skb)
{
	WRITE_ONCE(unicast_reader, NETLINK_CB(skb).portid);
}

static int __init unicast_init(void)
{
	struct netlink_kernel_cfg config = { .input = unicast_hello };
	int err;

	unicast_socket = netlink_kernel_create(&init_net, UNICAST_NETLINK, &config);
	if (!unicast_socket)
		return -ENOMEM;
	err = nf_register_net_hooks(&init_net, unicast_hooks, ARRAY_SIZE(unicast_hooks));
	if (err)
		netlink_kernel_release(unicast_socket);
	return err;
}

static void __exit unicast_exit(void)
{
	nf_unregister_net_hooks(&init_net, unicast_hooks, ARRAY_SIZE(unicast_hooks));
	netlink_kernel_release(unicast_socket);
}

module_init(unicast_init);
module_exit(unicast_exit);

MODULE_DESCRIPTION("For comparison: one Netlink message a packet");
MODULE_LICENSE("GPL");
