// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where packets come in: Netfilter hooks in every network namespace. They
 * accept every packet and change none (lookup.c may settle its socket early, as
 * early demux does); each becomes a record or is counted.
 *
 * The hooks have the last priority. So they run after NAT: a record has the translated
 * addresses, and at LOCAL_IN those are the socket's. They run after filters: a packet
 * that a firewall drops was neither sent nor received. Among hooks of equal priority
 * the older one runs last. If conntrack was in use before the module was loaded, it is
 * the older one. Then packets that conntrack drops when it confirms a connection count
 * as received.
 */
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/netfilter_ipv6.h>
#include <net/ip6_fib.h>
#include <net/net_namespace.h>
#include <net/route.h>

#include "alive.h"
#include "batch.h"
#include "hooks.h"
#include "lookup.h"
#include "memo.h"
#include "name.h"
#include "parse.h"
#include "skip.h"

static void hooks_record(struct sniffer_flow *flow)
{
	sniffer_batch_add(&flow->record, flow->skb, &flow->place);
}

static void hooks_in_multicast(struct sniffer_flow *flow)
{
	const struct sniffer_record plain = flow->record;
	struct sock *sk = sniffer_lookup_multicast(flow, NULL);

	if (!sk) {
		flow->record.how = SNIFFER_HOW_NO_SOCKET;
		hooks_record(flow);
		return;
	}
	for (; sk; sk = sniffer_lookup_multicast(flow, sk)) {
		sniffer_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
		hooks_record(flow);
		flow->record = plain;
		flow->record.flags = SNIFFER_F_COPY;
		flow->place.message = 0;	/* a copy is another flow */
	}
}

/* Return: what is to be given back once all else is done, or NULL. */
static struct sock *hooks_in(struct sniffer_flow *flow)
{
	struct sock *sk;
	bool put;

	sk = sniffer_lookup_in(flow, &put);
	if (!sk) {
		flow->record.how = SNIFFER_HOW_NO_SOCKET;
		return NULL;
	}
	sniffer_name_socket(flow, sk, SNIFFER_HOW_SOCKET);
	return put ? sk : NULL;
}

/* Records it, and remembers it for others like it. */
static void hooks_finish(struct sniffer_flow *flow, const struct net_device *dev, bool trusted)
{
	bool task = !softirq_count();

	if (task)
		local_bh_disable();	/* once for both */
	hooks_record(flow);
	/* what passes a VRF passes it twice, and is not told apart there */
	if (flow->owner && !(dev && netif_is_l3_master(dev)))
		sniffer_memo_keep(flow, trusted);
	if (task)
		local_bh_enable();
}

/*
 * IPsec passes this hook again with what it has made of a packet. IPComp leaves a small
 * packet as it was. UDP from another port than the socket's is wrapped around a packet.
 */
static bool hooks_is_again(const struct sk_buff *skb, const struct sniffer_record *r)
{
	const struct sock *sk = skb->sk;

	if (r->family == AF_INET ? !(IPCB(skb)->flags & IPSKB_XFRM_TRANSFORMED) :
				   !(IP6CB(skb)->flags & IP6SKB_XFRM_TRANSFORMED))
		return false;
	return r->proto == IPPROTO_TCP ||
	       (sk && sk_fullsock(sk) && inet_sk(sk)->inet_num == r->sport);
}

/* Makes the record of a packet, and hands it on. */
static void hooks_make_record(struct sk_buff *skb, const struct nf_hook_state *state, u8 family,
			      u8 dir, const struct net_device *dev)
{
	const bool trusted = dir == SNIFFER_DIR_OUT && sniffer_trust_current();
	/* zeroed once, here: kernels that zero all variables then add no work */
	struct sniffer_flow flow = {
		.net = dir == SNIFFER_DIR_IN ? dev_net(skb->dev) : state->net,
		.skb = skb,
		.record = { .family = family, .dir = dir },
	};
	struct sock *found = NULL;
	struct sniffer_ends ends;

	if (likely(sniffer_parse_plain(skb, family, &ends)))
		sniffer_parse_ends(&flow, &ends);
	else if (!sniffer_parse(&flow))
		return;
	if (dir == SNIFFER_DIR_OUT && hooks_is_again(skb, &flow.record)) {
		sniffer_skip(SNIFFER_SKIP_OTHER);
		return;
	}

	flow.record.time_ns = ktime_get_ns();
	flow.record.netns = flow.net->ns.inum;
	flow.record.ifindex = dev ? dev->ifindex : 0;

	if (dir == SNIFFER_DIR_OUT) {
		sniffer_name_out(&flow, state, trusted);
	} else if (dir == SNIFFER_DIR_FWD) {
		flow.record.how = SNIFFER_HOW_FORWARDED;
	} else if (flow.record.proto == IPPROTO_UDP && !skb->sk &&
		   sniffer_lookup_is_multicast(&flow)) {
		hooks_in_multicast(&flow);
		return;	/* recorded in there, once for each receiver */
	} else {
		found = hooks_in(&flow);
	}
	hooks_finish(&flow, dev, trusted);
	if (found)
		sniffer_lookup_hand_on(skb, found);
}

/*
 * A VRF shows what it sends twice. The first time its device is the hook's, and if it has
 * a queue (tc), also the route's. What stays inside the VRF has a local route.
 */
static bool hooks_passes_vrf(const struct sk_buff *skb, u8 family, const struct net_device *dev)
{
	const struct dst_entry *dst = skb_dst(skb);

	if (!dev || !netif_is_l3_master(dev) || !dst)
		return false;
	if (dst->dev != dev)
		return true;
	return family == AF_INET ? !(skb_rtable(skb)->rt_flags & RTCF_LOCAL) :
				   !(((const struct rt6_info *)dst)->rt6i_flags & RTF_LOCAL);
}

static noinline void hooks_packet(struct sk_buff *skb, const struct nf_hook_state *state, u8 family,
				  u8 dir)
{
	/* skb->dev as the stack sees it: ipvlan has moved the packet to its namespace by now */
	const struct net_device *dev = dir == SNIFFER_DIR_IN ? skb->dev : state->out;

	if (!sniffer_batch_wanted()) {
		sniffer_skip(SNIFFER_SKIP_LISTENER);
		return;
	}
	if (dir == SNIFFER_DIR_OUT && hooks_passes_vrf(skb, family, dev)) {
		sniffer_skip(SNIFFER_SKIP_OTHER);
		return;
	}
	hooks_make_record(skb, state, family, dir, dev);
}

static bool hooks_no_memo(struct sk_buff *skb, const struct nf_hook_state *state)
{
	return false;
}

#define HOOKS_FUNCTION(name, memo, family, dir)						\
static unsigned int name(void *priv, struct sk_buff *skb, const struct nf_hook_state *state) \
{											\
	if (!static_branch_unlikely(&sniffer_listening))				\
		sniffer_skip(SNIFFER_SKIP_LISTENER);					\
	else if (!memo(skb, state))						\
		hooks_packet(skb, state, family, dir);					\
	return NF_ACCEPT;								\
}

HOOKS_FUNCTION(hooks_in4, sniffer_memo_in4, AF_INET, SNIFFER_DIR_IN)
HOOKS_FUNCTION(hooks_out4, sniffer_memo_out4, AF_INET, SNIFFER_DIR_OUT)
HOOKS_FUNCTION(hooks_fwd4, hooks_no_memo, AF_INET, SNIFFER_DIR_FWD)
HOOKS_FUNCTION(hooks_in6, sniffer_memo_in6, AF_INET6, SNIFFER_DIR_IN)
HOOKS_FUNCTION(hooks_out6, sniffer_memo_out6, AF_INET6, SNIFFER_DIR_OUT)
HOOKS_FUNCTION(hooks_fwd6, hooks_no_memo, AF_INET6, SNIFFER_DIR_FWD)

#define HOOKS_ENTRY(function, family, number)	\
	{ .hook = function, .pf = family, .hooknum = number, .priority = NF_IP_PRI_LAST }

static const struct nf_hook_ops hooks_ops[] = {
	HOOKS_ENTRY(hooks_in4, NFPROTO_IPV4, NF_INET_LOCAL_IN),
	HOOKS_ENTRY(hooks_out4, NFPROTO_IPV4, NF_INET_LOCAL_OUT),
	HOOKS_ENTRY(hooks_fwd4, NFPROTO_IPV4, NF_INET_FORWARD),
	HOOKS_ENTRY(hooks_in6, NFPROTO_IPV6, NF_INET_LOCAL_IN),
	HOOKS_ENTRY(hooks_out6, NFPROTO_IPV6, NF_INET_LOCAL_OUT),
	HOOKS_ENTRY(hooks_fwd6, NFPROTO_IPV6, NF_INET_FORWARD),
};

static int __net_init hooks_net_init(struct net *net)
{
	return nf_register_net_hooks(net, hooks_ops, ARRAY_SIZE(hooks_ops));
}

static void __net_exit hooks_net_exit(struct net *net)
{
	nf_unregister_net_hooks(net, hooks_ops, ARRAY_SIZE(hooks_ops));
}

static struct pernet_operations hooks_net_ops = {
	.init = hooks_net_init,
	.exit = hooks_net_exit,
};

int sniffer_hooks_init(void)
{
	return register_pernet_subsys(&hooks_net_ops);
}

void sniffer_hooks_exit(void)
{
	unregister_pernet_subsys(&hooks_net_ops);
	synchronize_net();
}
