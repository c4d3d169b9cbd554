/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef HUNTER_PARTS_H
#define HUNTER_PARTS_H
/*
 * Used where trampolines are refused: tracepoints and the hooks of the root cgroup
 * report packets and TCP states. Outgoing packets are seen after the last NAT, and once
 * for each fragment. Nothing reports a queue that a closed listener leaves to another
 * one: AMBIGUOUS.
 */
#include "calls.h"
#include "out.h"

#define PROTOCOL_IP	bpf_htons(0x0800)
#define PROTOCOL_IP6	bpf_htons(0x86DD)
#define TIMEWAIT	(65 * SECOND)

/* A connection of this host. Of each address it has the last four bytes. */
struct ends {
	u32 netns;
	u32 local, remote;
	u16 local_port, remote_port;
};

struct rest {
	u64 cookie;
	u64 since;
};

/* Connections in TIME_WAIT. No hook of a cgroup sees their packets. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct ends);
	__type(value, struct rest);
} rests SEC(".maps");

static __always_inline void ends_of(struct sock *sk, struct ends *ends)
{
	struct sock_common *c = &sk->__sk_common;
	u32 at = 12;

	__builtin_memset(ends, 0, sizeof(*ends));
	ends->netns = c->skc_net.net->ns.inum;
	ends->local_port = c->skc_num;
	ends->remote_port = bpf_ntohs(c->skc_dport);
	if (c->skc_family == AF_INET) {
		ends->local = c->skc_rcv_saddr;
		ends->remote = c->skc_daddr;
	} else {
		bpf_probe_read_kernel(&ends->local, 4, (void *)&c->skc_v6_rcv_saddr + at);
		bpf_probe_read_kernel(&ends->remote, 4, (void *)&c->skc_v6_daddr + at);
	}
}

static __always_inline void ends_of_packet(struct sniffer_record *r, bool in, struct ends *ends)
{
	u32 at = r->family == AF_INET ? 0 : 12;
	u32 from, to;

	__builtin_memset(ends, 0, sizeof(*ends));
	ends->netns = r->netns;
	from = at ? *(u32 *)(r->saddr + 12) : *(u32 *)r->saddr;
	to = at ? *(u32 *)(r->daddr + 12) : *(u32 *)r->daddr;
	ends->local = in ? to : from;
	ends->remote = in ? from : to;
	ends->local_port = in ? r->dport : r->sport;
	ends->remote_port = in ? r->sport : r->dport;
}

/* An incoming packet has ended the TIME_WAIT. */
static __always_inline void rest_forget(struct sniffer_record *r)
{
	struct ends ends;

	ends_of_packet(r, true, &ends);
	bpf_map_delete_elem(&rests, &ends);
}

/* The entry of the TIME_WAIT that a TCP packet belongs to, or NULL. */
static __always_inline struct owner *rest_find(struct sniffer_record *r, bool in)
{
	struct ends ends;
	struct rest *rest;

	ends_of_packet(r, in, &ends);
	rest = bpf_map_lookup_elem(&rests, &ends);
	if (!rest || bpf_ktime_get_ns() - rest->since > TIMEWAIT)
		return NULL;
	r->cookie = rest->cookie;
	return owner_find(rest->cookie);
}

/* A listener's child. Until it is accepted it belongs to the listener's owner. */
static __always_inline void child_of(const u64 *via, u64 cookie)
{
	if (!via || *via == cookie)
		return;
	if (*via == KERNELS)
		owner_kernel(cookie);
	else if (owner_find(*via))
		owner_refer(cookie, *via, SNIFFER_HOW_LISTENER);
}

SEC("cgroup/sock_create")
int part_create(struct bpf_sock *sk)
{
	struct task_struct *current = bpf_get_current_task_btf();
	u64 cookie = bpf_get_socket_cookie(sk);
	struct owner *o;

	use_take(cookie, 0, 0);
	o = owner_find(cookie);
	if (o)
		o->netns = current->nsproxy->net_ns->ns.inum;
	return 1;
}

SEC("cgroup/sock_release")
int part_release(struct bpf_sock *sk)
{
	u64 cookie = bpf_get_socket_cookie(sk);
	struct owner *o = owner_find(cookie);

	owner_release(cookie);
	if (o && sk->protocol != IPPROTO_TCP && sk->protocol != IPPROTO_MPTCP)
		o->dead = bpf_ktime_get_ns();
	return 1;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(part_state, struct sock *sk, int oldstate, int newstate)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct socket *sock = sk->sk_socket;
	u32 netns = sk->__sk_common.skc_net.net->ns.inum;
	struct rest rest = {};
	struct ends ends;
	struct owner *o;
	struct sock *whole;
	u64 cookie, via;

	if (sk->sk_protocol == IPPROTO_MPTCP && newstate == TCP_CLOSE) {
		o = owner_find(sk->__sk_common.skc_cookie.counter);
		if (o)
			o->dead = bpf_ktime_get_ns();
	}
	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (newstate == TCP_LISTEN) {
		via = COOKIE(sk);
		whole = sock ? sock->sk : NULL;
		if (whole && whole != sk)
			via = whole->__sk_common.skc_cookie.counter;
		if (is_kernel(sk))
			via = KERNELS;
		bpf_sk_storage_get(&listeners, sk, &via, BPF_SK_STORAGE_GET_F_CREATE);
	}
	if (!wants(sk))
		return 0;
	if (newstate == TCP_LISTEN || newstate == TCP_SYN_SENT) {
		cookie = COOKIE(sk);
		if (sock && in_task_only(current))
			use(cookie, address(sock->file), 1);
	} else if (newstate == TCP_ESTABLISHED) {
		cookie = COOKIE(sk);
		if (oldstate == TCP_SYN_RECV)
			child_of(bpf_sk_storage_get(&listeners, sk, NULL, 0), cookie);
		ends_of(sk, &ends);
		bpf_map_delete_elem(&rests, &ends);
	} else if (newstate == TCP_CLOSE) {
		cookie = sk->__sk_common.skc_cookie.counter;
		if (oldstate == TCP_FIN_WAIT2 || oldstate == TCP_CLOSING) {
			rest.cookie = cookie;
			rest.since = bpf_ktime_get_ns();
			ends_of(sk, &ends);
			bpf_map_update_elem(&rests, &ends, &rest, BPF_ANY);
		}
		o = owner_find(cookie);
		if (o && oldstate != TCP_LISTEN) {
			o->dead = bpf_ktime_get_ns();
			o->waits = oldstate == TCP_FIN_WAIT2 || oldstate == TCP_CLOSING;
		}
		return 0;
	} else {
		return 0;
	}
	o = owner_find(cookie);
	if (o)
		o->netns = netns;
	return 0;
}

/* What this processor sent last. The tracepoint fires once for each device on the way. */
struct sent {
	u64 skb;
	u64 ends;	/* as much of addresses and ports as tells packets apart */
	u32 netns;
	u32 ifindex;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct sent);
} sents SEC(".maps");

/* Is it on its way through a further device (VLAN, bond, bridge) of the same namespace? */
static __always_inline bool is_sent_on(struct sniffer_record *r, struct sk_buff *skb)
{
	u32 zero = 0, from = *(u32 *)(r->saddr + (r->family == AF_INET ? 0 : 12));
	struct sent *sent = bpf_map_lookup_elem(&sents, &zero);
	u64 ends = ((u64)r->sport << 48 | (u64)r->dport << 32 | from) ^ r->len;
	bool again;

	if (!sent)
		return false;
	again = sent->skb == (u64)skb && sent->ends == ends && sent->netns == r->netns &&
		sent->ifindex != r->ifindex;
	sent->skb = (u64)skb;
	sent->ends = ends;
	sent->netns = r->netns;
	sent->ifindex = r->ifindex;
	return again;
}

static __always_inline bool is_mini(u8 state)
{
	return state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV;
}

/* Out: on the way to a device. The sender is still at work. */
SEC("tp_btf/net_dev_queue")
int BPF_PROG(part_out, struct sk_buff *skb)
{
	struct net_device *dev = skb->dev;
	u16 protocol = skb->protocol;
	struct sniffer_record r = {};
	struct sock *sk = skb->sk;
	struct owner *o;
	struct shape s;
	u64 *via;

	if (protocol != PROTOCOL_IP && protocol != PROTOCOL_IP6)
		return 0;
	shape_out(skb, &s);
	s.len = skb->len - (u32)(s.net - (u64)skb->data);
	if (!parse(&r, &s)) {
		skip();
		return 0;
	}
	r.ifindex = dev->ifindex;
	r.netns = dev->nd_net.net->ns.inum;
	if (is_sent_on(&r, skb))
		return 0;
	r.dir = SNIFFER_DIR_OUT;
	out_named(&r, dev->nd_net.net, sk, skb, false);
	/* a tunnel wraps a packet of the kernel's own */
	if (r.how == SNIFFER_HOW_NO_SOCKET && r.proto == IPPROTO_UDP &&
	    skb->inner_network_header > skb->network_header)
		name_kernel(&r);
	/* a child of Fast Open sends before it has a cookie */
	if (r.how == SNIFFER_HOW_PREDATES && !r.cookie && sk && r.proto == IPPROTO_TCP &&
	    !is_mini(sk->__sk_common.skc_state)) {
		via = bpf_sk_storage_get(&listeners, sk, NULL, 0);
		o = via ? owner_find(*via) : NULL;
		if (o && o->user.tgid)
			name_acceptor(&r, o);
	}
	if (r.how == SNIFFER_HOW_NO_SOCKET && r.proto == IPPROTO_TCP) {
		o = rest_find(&r, false);
		if (o && o->user.tgid)
			name_owner(&r, o, SNIFFER_HOW_REVERSE);
	}
	o = owner_find(r.cookie);
	if (o && !o->netns)
		o->netns = r.netns;
	emit(&r, &s);
	return 0;
}

static __always_inline long read_skb(const void *skb, u32 at, void *to, u32 size)
{
	return bpf_skb_load_bytes(skb, at, to, size);
}

/* Remembers the packet for its answer: a SYN-ACK of a SYN cookie has no socket. */
static __always_inline void in_remember(struct sniffer_record *r, struct about *a)
{
	u32 zero = 0;
	struct slot *slot = bpf_map_lookup_elem(&slots, &zero);

	if (!slot)
		return;
	slot->r = *r;
	slot->found = *a;
	slot->active = r->proto;
	slot->known = 1;
}

/* The cookie of the MPTCP socket whose subflow this is, or 0. */
static __always_inline u64 parent_of(struct bpf_sock *sk)
{
	struct mptcp_sock *parent;

	if (!bpf_core_type_exists(struct mptcp_sock))
		return 0;
	parent = bpf_skc_to_mptcp_sock(sk);
	return parent ? ((struct sock *)parent)->__sk_common.skc_cookie.counter : 0;
}

/* A packet to a TCP socket that has no entry: whose is it? */
static __always_inline void in_relate(struct bpf_sock *sk, struct about *a)
{
	u64 *via = bpf_sk_storage_get(&listeners, sk, NULL, 0);

	a->parent = parent_of(sk);
	if (a->state != TCP_LISTEN) {
		child_of(via, a->cookie);
		return;
	}
	/* MPTCP's listener may be older than the programs: its children will get this too */
	if (!via && a->parent)
		via = bpf_sk_storage_get(&listeners, sk, &a->parent, BPF_SK_STORAGE_GET_F_CREATE);
	if (via && *via == KERNELS)
		a->servers = 1;
	else if (via)
		a->parent = *via;
}

/* In: to a socket of any kind but a TIME_WAIT. */
SEC("cgroup_skb/ingress")
int part_in(struct __sk_buff *skb)
{
	struct sniffer_record r = {};
	struct bpf_sock *sk = skb->sk;
	struct about a = { .full = 1 };
	struct owner *o;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	/* raw sockets get copies */
	if (!sk || sk->type == SOCK_RAW)
		return 1;
	if (!parse_headers(&r, skb, read_skb, 0, false)) {
		skip();
		return 1;
	}
	parse_size(&r, skb->len, skb->gso_size, skb->gso_segs);
	a.cookie = bpf_get_socket_cookie(skb);
	a.state = sk->state;
	r.ifindex = skb->ifindex;
	r.dir = SNIFFER_DIR_IN;
	o = owner_find(a.cookie);
	if (!o && r.proto == IPPROTO_TCP) {
		in_relate(sk, &a);
		o = owner_find(a.cookie);
	}
	r.netns = o ? o->netns : 0;	/* 0: user space puts its own namespace there */
	if (a.state == TCP_LISTEN)
		in_remember(&r, &a);
	name(&r, &a, SNIFFER_HOW_SOCKET);
	emit(&r, NULL);
	if (snaps_wanted())
		snap_at_hand(&r, skb);
	return 1;
}

/* In: to a TIME_WAIT. */
SEC("tp_btf/netif_receive_skb")
int BPF_PROG(part_timewait, struct sk_buff *skb)
{
	struct net_device *dev = skb->dev;
	u16 protocol = skb->protocol;
	struct sniffer_record r = {};
	struct owner *o;
	struct shape s;

	if (protocol != PROTOCOL_IP && protocol != PROTOCOL_IP6)
		return 0;
	s.net = (u64)skb->data;
	s.len = skb->len;
	s.thoff = 0;
	s.end = (u64)skb->head + skb->end;
	s.linear = skb->len - skb->data_len;
	if (!parse(&r, &s) || r.proto != IPPROTO_TCP || r.tcp_flags & TCP_SYN)
		return 0;
	r.ifindex = dev->ifindex;
	r.netns = dev->nd_net.net->ns.inum;
	r.dir = SNIFFER_DIR_IN;
	o = rest_find(&r, true);
	if (!o || !o->user.tgid)
		return 0;
	name_owner(&r, o, SNIFFER_HOW_SOCKET);
	emit(&r, &s);
	if (r.tcp_flags & TCP_RST)
		rest_forget(&r);
	return 0;
}

/* In: nobody has such a socket. */
SEC("tp_btf/kfree_skb")
int BPF_PROG(part_unwanted, struct sk_buff *skb, void *location, u64 reason)
{
	struct net_device *dev = skb->dev;
	struct sniffer_record r = {};
	struct shape s;

	if ((u32)reason != bpf_core_enum_value(enum skb_drop_reason___x,
					       SKB_DROP_REASON_NO_SOCKET___x) || !dev)
		return 0;
	shape_in(skb, &s);
	s.thoff = 0;
	if (!parse(&r, &s))
		return 0;
	r.ifindex = dev->ifindex;
	r.netns = dev->nd_net.net->ns.inum;
	r.dir = SNIFFER_DIR_IN;
	r.how = SNIFFER_HOW_NO_SOCKET;
	emit(&r, &s);
	return 0;
}

#endif /* HUNTER_PARTS_H */
