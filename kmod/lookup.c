// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which socket will receive this packet? These are the stack's own lookups, done a
 * moment before the stack does them. All of it runs under the hook's RCU.
 */
#include <linux/igmp.h>
#include <linux/inetdevice.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <net/addrconf.h>
#include <net/inet_hashtables.h>
#include <net/inet6_hashtables.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/netfilter/nf_conntrack.h>
#include <net/route.h>
#include <net/sock_reuseport.h>
#include <net/tcp.h>
#include <net/udp.h>

#include "compat.h"
#include "lookup.h"

/* The two ends of a packet, seen from the socket that would receive it. */
struct lookup_ends {
	const struct in6_addr *remote6;
	const struct in6_addr *local6;
	__be32 remote;
	__be32 local;
	__be16 rport;
	u16 lport;
	int dif;
	int sdif;
};

/* Inlined, so that kernels that zero all variables see that every field is written. */
static __always_inline void lookup_ends_of(const struct sniffer_flow *flow, bool reverse,
					   struct lookup_ends *ends)
{
	const struct sniffer_record *r = &flow->record;
	const u8 *remote = reverse ? r->daddr : r->saddr;
	const u8 *local = reverse ? r->saddr : r->daddr;

	ends->remote6 = (const struct in6_addr *)remote;
	ends->local6 = (const struct in6_addr *)local;
	memcpy(&ends->remote, remote, sizeof(ends->remote));
	memcpy(&ends->local, local, sizeof(ends->local));
	ends->rport = htons(reverse ? r->dport : r->sport);
	ends->lport = reverse ? r->sport : r->dport;
	if (reverse) {
		ends->dif = r->ifindex;
		ends->sdif = 0;
	} else if (r->family == AF_INET) {
		ends->dif = inet_iif(flow->skb);
		ends->sdif = inet_sdif(flow->skb);
	} else {
		ends->dif = inet6_iif(flow->skb);
		ends->sdif = inet6_sdif(flow->skb);
	}
}

static struct sock *lookup_established(struct sniffer_flow *flow, const struct lookup_ends *ends)
{
	struct net *net = flow->net;

	if (flow->record.family == AF_INET)
		return __inet_lookup_established(net, SNIFFER_TCP_TABLE(net)
						 ends->remote, ends->rport,
						 ends->local, ends->lport,
						 ends->dif, ends->sdif);
	return __inet6_lookup_established(net, SNIFFER_TCP_TABLE(net)
					  ends->remote6, ends->rport,
					  ends->local6, ends->lport,
					  ends->dif, ends->sdif);
}

/* With an skb, SO_REUSEPORT programs and sk_lookup see the packet itself. */
static struct sock *lookup_listening(struct sniffer_flow *flow, const struct lookup_ends *ends,
				     struct sk_buff *skb)
{
	int doff = flow->record.hdr_len - flow->thoff;
	struct net *net = flow->net;

	if (flow->record.family == AF_INET)
		return __inet_lookup_listener(net, SNIFFER_TCP_TABLE(net) skb, doff,
					      ends->remote, ends->rport,
					      ends->local, ends->lport,
					      ends->dif, ends->sdif);
	return inet6_lookup_listener(net, SNIFFER_TCP_TABLE(net) skb, doff,
				     ends->remote6, ends->rport,
				     ends->local6, ends->lport,
				     ends->dif, ends->sdif);
}

static struct sock *lookup_udp(struct sniffer_flow *flow, const struct lookup_ends *ends,
			       struct sk_buff *skb)
{
	struct net *net = flow->net;

	if (flow->record.family == AF_INET)
		return __udp4_lib_lookup(net, ends->remote, ends->rport,
					 ends->local, htons(ends->lport),
					 ends->dif, ends->sdif,
					 SNIFFER_UDP_TABLE(net) skb);
	return __udp6_lib_lookup(net, ends->remote6, ends->rport,
				 ends->local6, htons(ends->lport),
				 ends->dif, ends->sdif,
				 SNIFFER_UDP_TABLE(net) skb);
}

/*
 * Is the timestamp of this SYN newer than @recent? Returns 0 without a timestamp, as
 * the stack does.
 */
static s32 lookup_newer(const u8 *option, const u8 *end, u32 recent)
{
	while (end - option >= TCPOLEN_TIMESTAMP && *option != TCPOPT_EOL) {
		if (*option == TCPOPT_NOP) {
			option++;
			continue;
		}
		if (option[0] == TCPOPT_TIMESTAMP && option[1] == TCPOLEN_TIMESTAMP)
			return (s32)(get_unaligned_be32(option + 2) - recent);
		option += max_t(u8, option[1], 2);
	}
	return 0;
}

/* Will this packet end a TIME_WAIT, as tcp_timewait_state_process() decides? */
static bool lookup_reopens(const struct sniffer_flow *flow, const struct sock *sk)
{
	const struct tcp_timewait_sock *tw = tcp_twsk(sk);
	const u8 flags = flow->record.tcp_flags;
	const struct tcphdr *th;
	s32 newer = 0;
	u8 buf[60];
	int size;

	if ((flags & (TCPHDR_SYN | TCPHDR_ACK | TCPHDR_RST)) != TCPHDR_SYN ||
	    inet_twsk(sk)->tw_substate != TCP_TIME_WAIT)
		return false;
	size = clamp_t(int, flow->record.hdr_len - flow->thoff, sizeof(*th), sizeof(buf));
	th = skb_header_pointer(flow->skb, flow->thoff, size, buf);
	if (!th)
		return false;
	if (tw->tw_ts_recent_stamp)
		newer = lookup_newer((const u8 *)(th + 1), (const u8 *)th + size, tw->tw_ts_recent);
	return newer > 0 || (!newer && after(ntohl(th->seq), tw->tw_rcv_nxt));
}

/* True if the stack will ignore @sk, found for this packet, and look for a listener. */
static bool lookup_is_over(const struct sniffer_flow *flow, const struct sock *sk)
{
	const struct sock *listener;

	if (sk->sk_state == TCP_TIME_WAIT)
		return lookup_reopens(flow, sk);
	if (sk->sk_state != TCP_NEW_SYN_RECV)
		return false;
	listener = inet_reqsk((struct sock *)sk)->rsk_listener;
	return listener && READ_ONCE(listener->sk_state) != TCP_LISTEN;
}

/*
 * A program chose @sk from an SO_REUSEPORT group. It may choose at random or in turn.
 * If the stack asked it again, it would choose another socket, or skip one. So the
 * packet keeps this choice, as after early demux.
 */
static void lookup_settle(struct sk_buff *skb, struct sock *sk)
{
	const struct sock_reuseport *group = rcu_dereference(sk->sk_reuseport_cb);

	if (!group || !rcu_access_pointer(group->prog) || skb->destructor ||
	    !refcount_inc_not_zero(&sk->sk_refcnt))
		return;
	skb->sk = sk;
	skb->destructor = sock_edemux;
}

/**
 * sniffer_lookup_in - find the socket that a unicast packet at LOCAL_IN will reach
 * @flow: the packet
 * @put: set when the caller must give the socket to sniffer_lookup_put()
 *
 * On loopback early demux has not run, so nearly every packet is looked up.
 *
 * Return: a socket (maybe a request or a TIME_WAIT one), or NULL.
 */
struct sock *sniffer_lookup_in(struct sniffer_flow *flow, bool *put)
{
	struct sk_buff *skb = flow->skb;
	struct sock *sk = skb->sk, *next;
	struct lookup_ends ends;

	*put = false;
	if (sk && (flow->record.proto != IPPROTO_TCP || !lookup_is_over(flow, sk)))
		return sk;
	lookup_ends_of(flow, false, &ends);
	if (!sk && flow->record.proto == IPPROTO_TCP) {
		sk = lookup_established(flow, &ends);
		*put = sk;
		if (sk && !lookup_is_over(flow, sk))
			return sk;
	}
	/*
	 * SO_REUSEPORT programs expect the data at the transport header, as
	 * tcp_v4_rcv() and udp_rcv() have it. The stack does the same pull
	 * right after this hook.
	 */
	if (!skb_shared(skb) && skb_headlen(skb) >= flow->thoff) {
		__skb_pull(skb, flow->thoff);
		next = flow->record.proto == IPPROTO_TCP ?
			lookup_listening(flow, &ends, skb) : lookup_udp(flow, &ends, skb);
		__skb_push(skb, flow->thoff);
		if (!sk && next)
			lookup_settle(skb, next);
	} else {
		next = flow->record.proto == IPPROTO_TCP ?
			lookup_listening(flow, &ends, NULL) : lookup_udp(flow, &ends, NULL);
	}
	if (!next)
		return sk;
	if (*put)
		sniffer_lookup_put(sk);
	*put = false;
	return next;
}

/**
 * sniffer_lookup_reverse - find the TCP socket for which a packet without a socket was
 * sent
 * @flow: the packet, at LOCAL_OUT
 *
 * Answers of a TIME_WAIT, resets, and SYN-ACKs of SYN cookies have no socket.
 *
 * Return: a socket for sniffer_lookup_put(), or NULL.
 */
struct sock *sniffer_lookup_reverse(struct sniffer_flow *flow)
{
	struct lookup_ends ends;

	lookup_ends_of(flow, true, &ends);
	return lookup_established(flow, &ends);
}

/**
 * sniffer_lookup_listener - find the TCP listener at the local end of a packet
 * @flow: the packet
 * @reverse: the packet is outgoing
 *
 * Return: a socket, valid under RCU, or NULL.
 */
struct sock *sniffer_lookup_listener(struct sniffer_flow *flow, bool reverse)
{
	struct lookup_ends ends;

	lookup_ends_of(flow, reverse, &ends);
	return lookup_listening(flow, &ends, NULL);
}

/**
 * sniffer_lookup_untranslate - undo NAT in an outgoing packet's record
 * @flow: the packet; its record gets the addresses that the packet was sent with
 *
 * The stack's tables have those addresses. NAT has changed the packet's.
 */
void sniffer_lookup_untranslate(struct sniffer_flow *flow)
{
#if IS_ENABLED(CONFIG_NF_CONNTRACK)
	struct sniffer_record *r = &flow->record;
	const struct nf_conntrack_tuple *sent;
	enum ip_conntrack_info info;
	const struct nf_conn *ct = nf_ct_get(flow->skb, &info);

	if (!ct || !(READ_ONCE(ct->status) & IPS_NAT_MASK))
		return;
	sent = &ct->tuplehash[CTINFO2DIR(info)].tuple;
	memcpy(r->saddr, &sent->src.u3, sizeof(r->saddr));
	memcpy(r->daddr, &sent->dst.u3, sizeof(r->daddr));
	r->sport = ntohs(sent->src.u.all);
	r->dport = ntohs(sent->dst.u.all);
#endif
}

/**
 * sniffer_lookup_is_local - is the source of a packet an address of this host?
 * @flow: the packet
 * @dev: the device it leaves by, which selects the routing table
 */
bool sniffer_lookup_is_local(const struct sniffer_flow *flow, const struct net_device *dev)
{
	const u8 *source = flow->record.saddr;
	__be32 address;

	if (flow->record.family == AF_INET6)
		return ipv6_chk_addr(flow->net, (const struct in6_addr *)source, NULL, 0);
	memcpy(&address, source, sizeof(address));
	return inet_addr_type_dev_table(flow->net, dev, address) == RTN_LOCAL;
}

/**
 * sniffer_lookup_put - give a socket back
 * @sk: from a lookup that says so
 */
void sniffer_lookup_put(struct sock *sk)
{
	sock_gen_put(sk);
}

/**
 * sniffer_lookup_hand_on - give a socket back, by the packet if the stack would look it up again
 * @skb: a TCP packet at LOCAL_IN
 * @sk: what sniffer_lookup_in() found for it, with a reference
 *
 * As early demux does, which has not run on loopback. Of a connection alone: what the
 * stack does with a request or a TIME_WAIT is not to depend on how it was found.
 */
void sniffer_lookup_hand_on(struct sk_buff *skb, struct sock *sk)
{
	if (skb->sk || skb->destructor || skb_shared(skb) || !sk_fullsock(sk)) {
		sock_gen_put(sk);
		return;
	}
	skb->sk = sk;
	skb->destructor = sock_edemux;	/* until the stack takes it */
}

/**
 * sniffer_lookup_is_multicast - can several sockets receive this packet?
 * @flow: a UDP packet at LOCAL_IN
 */
bool sniffer_lookup_is_multicast(const struct sniffer_flow *flow)
{
	const struct rtable *rt;

	if (flow->record.family == AF_INET6)
		return ipv6_addr_is_multicast((const struct in6_addr *)flow->record.daddr);
	rt = skb_rtable(flow->skb);
	return rt && rt->rt_flags & (RTCF_BROADCAST | RTCF_MULTICAST);
}

/*
 * Membership and source filters. Same rules as ip_mc_sf_allow() and inet6_mc_check(),
 * which are not exported.
 */
static bool lookup_joined4(const struct sock *sk, const struct lookup_ends *ends)
{
	const struct ip_mc_socklist *mc;
	const struct ip_sf_socklist *sources;
	unsigned int i;

	if (!ipv4_is_multicast(ends->local))
		return true;
	for (mc = rcu_dereference(inet_sk(sk)->mc_list); mc; mc = rcu_dereference(mc->next_rcu)) {
		if (mc->multi.imr_multiaddr.s_addr != ends->local ||
		    (mc->multi.imr_ifindex != ends->dif &&
		     !(ends->sdif && mc->multi.imr_ifindex == ends->sdif)))
			continue;
		sources = rcu_dereference(mc->sflist);
		for (i = 0; sources && i < sources->sl_count; i++)
			if (sources->sl_addr[i] == ends->remote)
				return mc->sfmode == MCAST_INCLUDE;
		return mc->sfmode == MCAST_EXCLUDE;
	}
	return sniffer_mc_all4(sk);
}

static bool lookup_joined6(const struct sock *sk, const struct lookup_ends *ends)
{
	const struct ipv6_mc_socklist *mc;

	for (mc = rcu_dereference(inet6_sk(sk)->ipv6_mc_list); mc; mc = rcu_dereference(mc->next))
		if (ipv6_addr_equal(&mc->addr, ends->local6))
			return sniffer_mc_source6(mc, ends->remote6);
	return sniffer_mc_all6(sk);
}

/* The same decision as the stack's multicast delivery (net/ipv4/udp.c, net/ipv6/udp.c). */
static bool lookup_receives(const struct sniffer_flow *flow, const struct lookup_ends *ends,
			    struct sock *sk)
{
	const struct inet_sock *inet = inet_sk(sk);

	if (!net_eq(sock_net(sk), flow->net) || inet->inet_num != ends->lport)
		return false;
	if (inet->inet_dport && inet->inet_dport != ends->rport)
		return false;
	if (!udp_sk_bound_dev_eq(flow->net, sk->sk_bound_dev_if, ends->dif, ends->sdif))
		return false;
	if (flow->record.family == AF_INET) {
		if (sk->sk_family == AF_INET6 && ipv6_only_sock(sk))
			return false;
		if (inet->inet_daddr && inet->inet_daddr != ends->remote)
			return false;
		if (inet->inet_rcv_saddr && inet->inet_rcv_saddr != ends->local)
			return false;
		return lookup_joined4(sk, ends);
	}
	if (sk->sk_family != AF_INET6)
		return false;
	if (!ipv6_addr_any(&sk->sk_v6_daddr) && !ipv6_addr_equal(&sk->sk_v6_daddr, ends->remote6))
		return false;
	if (!ipv6_addr_any(&sk->sk_v6_rcv_saddr) &&
	    !ipv6_addr_equal(&sk->sk_v6_rcv_saddr, ends->local6))
		return false;
	return lookup_joined6(sk, ends);
}

/**
 * sniffer_lookup_multicast - walk the sockets that will receive a packet
 * @flow: a UDP packet at LOCAL_IN, multicast or broadcast
 * @last: the socket before, NULL to begin
 *
 * The number is not bounded. The stack copies the packet to each of them too.
 *
 * Return: the next one, valid under RCU, or NULL.
 */
struct sock *sniffer_lookup_multicast(struct sniffer_flow *flow, struct sock *last)
{
	struct udp_hslot *slot;
	struct lookup_ends ends;
	struct hlist_node *node;
	struct sock *sk;

	lookup_ends_of(flow, false, &ends);
	if (last) {
		node = rcu_dereference(hlist_next_rcu(&last->sk_node));
	} else {
		slot = udp_hashslot(sniffer_udp_table(flow->net), flow->net, flow->record.dport);
		node = rcu_dereference(hlist_first_rcu(&slot->head));
	}
	for (; node; node = rcu_dereference(hlist_next_rcu(node))) {
		sk = hlist_entry(node, struct sock, sk_node);
		if (lookup_receives(flow, &ends, sk))
			return sk;
	}
	return NULL;
}
